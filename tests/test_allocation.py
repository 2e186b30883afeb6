import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource, sys
from ddp_sgd.host import keep_freed_memory
if len(sys.argv) > 1: sys.platform = sys.argv[1]
keep_freed_memory()

def use(size):
    bytearray(size)  # cleared, and freed at once

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for size in (2**28, 2**20):
    use(size)
    before = faults()
    for _ in range(10): use(size)
    print(faults() - before)
"""
PAGES = 2**28 // 4096


def count_faults(*platform, **environ):
    """Page faults of taking 256 MiB, and of taking 1 MiB, ten times after the first time."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *platform], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))} | environ,
    )  # fmt: skip
    return [int(line) for line in done.stdout.split()]


def test_what_is_freed_is_there_the_next_time():
    assert max(count_faults()) < PAGES // 100


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_choice_of_the_users_stays(name):
    assert count_faults(**{name: ""})[0] > 9 * PAGES


def test_elsewhere_nothing_changes():
    assert count_faults("darwin")[0] > 9 * PAGES
