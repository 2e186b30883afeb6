import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from ddp_sgd.companion import start_companion, to_companion

ECHO = """
import os, sys
from ddp_sgd.companion import serve_the_rank

def main():
    said, told = serve_the_rank()
    print("for people", flush=True)
    os.system("echo of a program of its own")
    while line := said.readline():
        told.write(line.upper())
        told.flush()
"""


@contextmanager
def companion(tmp_path, monkeypatch):
    """A process that answers lines by what it has heard, in capitals."""
    (tmp_path / "echo_of_a_test.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    process = start_companion("echo_of_a_test")
    try:
        yield process
    finally:
        to_companion(process).close()
        process.wait(60)
        process.stdout.close()


def ask(process, line):
    to_companion(process).write(line)
    to_companion(process).flush()
    return process.stdout.readline()


def test_it_hears_and_answers_and_whatever_else_it_prints_goes_elsewhere(
    tmp_path, monkeypatch, capfd
):
    with companion(tmp_path, monkeypatch) as process:
        assert ask(process, b"one\n") == b"ONE\n"
        assert ask(process, b"two\n") == b"TWO\n"
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "for people\nof a program of its own\n"


def test_it_ends_as_soon_as_the_rank_is_gone_though_it_is_not_listening(tmp_path, monkeypatch):
    with companion(tmp_path, monkeypatch) as process:
        assert ask(process, b"one\n") == b"ONE\n"
        to_companion(process).close()
        assert process.wait(60) in (0, 1)  # it had nothing to do: whichever end it saw first


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_it_is_deaf_to_what_is_for_the_rank(name, tmp_path, monkeypatch):
    with companion(tmp_path, monkeypatch) as process:
        process.send_signal(signal.Signals[name])  # long before it has loaded anything
        assert ask(process, b"one\n") == b"ONE\n"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_a_fork_does_not_hold_the_pipe_open(tmp_path, monkeypatch):
    with companion(tmp_path, monkeypatch) as process:
        assert ask(process, b"one\n") == b"ONE\n"
        reading, writing = os.pipe()
        fork = os.fork()
        if fork == 0:
            os.close(writing)
            os.read(reading, 1)  # until the test is over
            os._exit(0)
        os.close(reading)
        to_companion(process).close()
        assert process.wait(60) in (0, 1)
        os.close(writing)
        assert os.waitpid(fork, 0)[1] == 0


def test_a_process_without_a_pipe_is_none_of_ours():
    class Bare:
        stdin = None

    with pytest.raises(RuntimeError, match="without a pipe"):
        to_companion(Bare())


def test_what_tells_of_a_hang_up_stays_open_to_the_end():
    """Else a process that is done at once would take its own end for that of the rank."""
    code = (
        "import os; from types import SimpleNamespace as Some\n"
        "from ddp_sgd import companion as module\n"
        "kept = []\n"
        "module.Thread = lambda target, args, daemon: kept.extend(args) or Some(start=list)\n"
        "said, told = module.serve_the_rank(); said.close(); told.close(); os.fstat(kept[0])"
    )
    subprocess.run([sys.executable, "-c", code], input=b"", check=True)
