import subprocess
import sys
import threading

import pytest
from limits import WAIT_S

from ddp_sgd.distributed.process_exit import call_with_timeout


def test_value_and_error_come_through():
    assert call_with_timeout(20, lambda: 7) == 7
    with pytest.raises(KeyError):
        call_with_timeout(20, {}.popitem)


def test_wait_is_bounded():
    never = threading.Event()
    with pytest.raises(TimeoutError, match="there is no answer"):
        call_with_timeout(0.05, never.wait)
    never.set()


ABANDONED = """
import atexit, ctypes
from ddp_sgd.distributed.process_exit import call_with_timeout, leave
atexit.register(print, ", exit hooks ran")
try:
    call_with_timeout({limit_s}, lambda: ctypes.CDLL(None).usleep({microseconds}))
except TimeoutError:
    pass
print("said", end="")
leave(75)
"""


@pytest.mark.parametrize(
    ("limit_s", "microseconds", "said"),
    [(0.2, 600_000_000, "said"), (60, 1000, "said, exit hooks ran\n")],
)
def test_exit_code_is_kept_whatever_a_thread_is_in(limit_s, microseconds, said):
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED.format(limit_s=limit_s, microseconds=microseconds)],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, said, "")
