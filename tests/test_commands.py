"""Forks of a server start, run and end as interpreters do."""

import os
import signal
import subprocess
import sys

import commands
import pytest
from limits import WAIT_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are real starts elsewhere")

ENDINGS = {
    "done": "print('done')",
    "code": "import sys; sys.exit(3)",
    "text": "raise SystemExit('no luck')",
    "error": "def fail(): 1 / 0\nfail()",
    "signal": "import os; os.kill(os.getpid(), 15)",
    "thread": "import threading\nthreading.Thread(target=print, args=['late']).start()",
    "exit hook": "import atexit; atexit.register(print, 'bye')",
    "about itself": (
        "import os, sys; print(os.getcwd(), os.environ['X'], sys.argv, os.getppid(), "
        "__name__, sys.stdin.read())"
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_fork_ends_as_an_interpreter_does(name, tmp_path):
    ended = []
    for run in (commands.run, subprocess.run):
        done = run(
            [sys.executable, "-c", ENDINGS[name], "a", "b"],
            cwd=tmp_path,
            env=os.environ | {"X": "ours"},
            input="said",
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        ended.append((done.returncode, done.stdout, done.stderr))
    assert ended[0] == ended[1]


def test_a_fork_is_a_child_of_the_caller_and_has_its_own_session():
    sleep = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"]
    with commands.Popen(sleep, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"1\n"
        assert os.getsid(process.pid) == process.pid
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(WAIT_S) == -signal.SIGKILL
