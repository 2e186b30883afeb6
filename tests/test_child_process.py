import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from limits import WAIT_S

from ddp_sgd.child_process import start_child_process

ECHO = """
import os, sys, time
from ddp_sgd.child_process import serve_the_rank

def main():
    said, told = serve_the_rank()
    said, told = os.fdopen(said, "rb"), os.fdopen(told, "wb")
    print("for people", flush=True)
    os.system("echo of a program of its own")
    while line := said.readline():
        told.write(line.upper())
        told.flush()
        if line == b"sleep\\n":
            time.sleep(600)
"""


@contextmanager
def child_process(tmp_path, monkeypatch, **options):
    """A process that answers lines by what it has heard, in capitals."""
    (tmp_path / "echo_of_a_test.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    process = start_child_process("echo_of_a_test", **options)
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(WAIT_S)
        process.stdout.close()


def ask(process, line):
    process.stdin.write(line)
    process.stdin.flush()
    return process.stdout.readline()


def test_it_hears_and_answers_and_whatever_else_it_prints_goes_elsewhere(
    tmp_path, monkeypatch, capfd
):
    with child_process(tmp_path, monkeypatch) as process:
        assert ask(process, b"one\n") == b"ONE\n"
        assert ask(process, b"two\n") == b"TWO\n"
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "for people\nof a program of its own\n"


def test_it_ends_as_soon_as_the_rank_is_gone_though_it_is_not_listening(tmp_path, monkeypatch):
    with child_process(tmp_path, monkeypatch) as process:
        assert ask(process, b"sleep\n") == b"SLEEP\n"
        process.stdin.close()
        assert process.wait(WAIT_S) == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_it_is_deaf_to_what_is_for_the_rank(name, tmp_path, monkeypatch):
    with child_process(tmp_path, monkeypatch) as process:
        process.send_signal(signal.Signals[name])  # long before it has loaded anything
        assert ask(process, b"one\n") == b"ONE\n"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_what_tells_of_a_hang_up_stays_open_to_the_end():
    """Else a process that is done at once would take its own end for that of the rank."""
    code = (
        "import os; from types import SimpleNamespace as Some\n"
        "from ddp_sgd import child_process as module\n"
        "kept = []\n"
        "module.Thread = lambda target, args, daemon: kept.extend(args) or Some(start=list)\n"
        "said, told = module.serve_the_rank(); os.close(said); os.close(told); os.fstat(kept[0])"
    )
    subprocess.run([sys.executable, "-c", code], input=b"", check=True)


def test_it_steps_back_as_far_as_it_is_told(tmp_path, monkeypatch):
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    with child_process(tmp_path, monkeypatch, niceness=3) as process:
        assert ask(process, b"one\n") == b"ONE\n"
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(19, mine + 3)
