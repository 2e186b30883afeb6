import os
import signal
import subprocess
import sys
from itertools import product

import pytest
from limits import WAIT_S

from ddp_sgd.errors import ExitCode
from ddp_sgd.run_files import RunFiles
from ddp_sgd.torchrun import (
    Attempt,
    Ending,
    Rendezvous,
    StopSignals,
    Torchrun,
    decide,
    find_workers,
)

PLACE = Rendezvous(nodes="2", address="node1", port="29400", remedy="DO IT.")
LOST = "torchrun lost the machine where all meet"
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)
KILLING = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)


def attempt(returncode=1, **changes):
    return Attempt(returncode=returncode, **changes)


def ends(attempt, **evidence):
    return decide(attempt, PLACE, 7, **evidence)


@pytest.mark.parametrize("number", KILLING)
def test_a_torchrun_that_was_killed_is_started_again(number):
    killed = attempt(-number)
    assert killed.loss == f"torchrun was ended by {number.name}"


@pytest.mark.parametrize("returncode", [0, 1, *(-number for number in ASKING)])
def test_a_torchrun_that_ended_with_the_run_or_was_asked_to_is_not(returncode):
    assert attempt(returncode).loss is None


def test_a_rendezvous_that_is_lost_while_workers_run_is_a_loss_and_before_none():
    error = "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: ..."
    assert attempt(error=error).loss == LOST
    assert attempt(error=error, has_begun=False).loss is None
    assert attempt(-9, ending=Ending.STUCK).loss == LOST


@pytest.mark.parametrize("ending", [e for e in Ending if e is not Ending.STUCK])
def test_a_torchrun_that_the_launcher_ended_was_not_lost(ending):
    assert attempt(-9, ending=ending).loss is None


@pytest.mark.parametrize("code", [0, 64, 65, 69, 70, 75, 76, 77])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_result_of_the_run_is_its_exit_code(code, is_stopped):
    end = ends(attempt(), result_code=code, left_code=1, is_stopped=is_stopped)
    assert end == (code, "", True)


def test_without_a_result_it_is_what_a_rank_left():
    assert ends(attempt(), left_code=77) == (77, "", False)
    assert ends(attempt(0), left_code=0) == (0, "", False)


@pytest.mark.parametrize("returncode", [0, 1, -9, -15, 70])
@pytest.mark.parametrize("left_code", [None, 69, 75])
def test_a_stop_is_75_however_torchrun_ended(returncode, left_code):
    assert ends(attempt(returncode), left_code=left_code, is_stopped=True).code == ExitCode.STOPPED


def test_a_loss_that_no_restart_follows_is_69_and_reported_once():
    line = (
        "torchrun was ended by SIGKILL; its processes save and end by themselves, start it again."
    )
    assert ends(attempt(-9), result_code=75) == (ExitCode.PEER, line, False)
    assert ends(attempt(-9), is_reported=True) == (ExitCode.PEER, "", False)


def test_a_torchrun_that_hangs_gives_what_its_ranks_left():
    stuck = attempt(-9, ending=Ending.STUCK)
    assert ends(stuck, left_code=69).code == ExitCode.PEER
    assert ends(stuck, result_code=76).code == ExitCode.DIVERGED


def test_a_port_that_is_taken():
    end = ends(attempt(error="... EADDRINUSE ..."))
    assert end.code == ExitCode.PEER
    assert end.error.startswith("port 29400 on node1 is held by another program; set MASTER_PORT")


@pytest.mark.parametrize(
    "lonely",
    [
        attempt(-15, ending=Ending.SPARE, has_begun=False),
        attempt(error="RendezvousTimeoutError", has_begun=False),
        attempt(error="RendezvousConnectionError", has_begun=False),
    ],
)
def test_machines_that_do_not_find_each_other(lonely):
    line = "2 machines at node1:29400 did not come together within 7 s; DO IT."
    assert ends(lonely) == (ExitCode.PEER, line, False)


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (attempt(error="exitcode  : 139 (pid: 7)"), 139),
        (attempt(error="exitcode : 0\nexitcode : 3"), 3),
        (attempt(), 1),
        (attempt(2, error="exitcode : 3"), 2),
        (attempt(-15), 143),
    ],
)
def test_where_nothing_was_left_the_code_is_that_of_a_worker_or_of_torchrun(ended, code):
    assert ends(ended) == (code, "", False)


def test_a_second_interrupt_is_130_whatever_was_left():
    interrupted = attempt(-9, ending=Ending.INTERRUPTED)
    assert ends(interrupted, result_code=75, left_code=75, is_stopped=True).code == 130


def test_every_end_has_a_code_and_success_is_never_made_up():
    """Whatever torchrun and the ranks do, 0 is only what a rank or torchrun itself gave."""
    codes = (None, 0, 69, 75)
    texts = ("", "EADDRINUSE", "RendezvousTimeoutError", "exitcode : 0")
    cases = product((0, 1, -9, -15), (None, *Ending), (True, False), texts, codes, codes)
    for returncode, ending, has_begun, error, result_code, left_code in cases:
        ended = attempt(returncode, ending=ending, has_begun=has_begun, error=error)
        for is_stopped in (True, False):
            end = ends(ended, result_code=result_code, left_code=left_code, is_stopped=is_stopped)
            assert 0 <= end.code <= 255
            if end.code == 0:
                assert 0 in (result_code, left_code, returncode)
            if is_stopped and result_code is None:
                assert end.code in (ExitCode.STOPPED, 130)
            assert not end.error or end.code == ExitCode.PEER


def test_two_interrupts_are_urgent_and_no_other_two_signals():
    for first, second in product(ASKING, ASKING):
        stop = StopSignals()
        stop.note(first)
        assert (stop.is_requested, stop.is_urgent) == (True, False)
        stop.note(second)
        assert stop.is_urgent == (first == second == signal.SIGINT)


LISTEN = """if 1:
    import signal
    from ddp_sgd.torchrun import StopSignals
    StopSignals().listen()
    names = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
    print([name for name in names if callable(signal.getsignal(getattr(signal, name)))])"""


@pytest.mark.parametrize(
    ("ignored", "heard"),
    [
        ("", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"]),
        ("trap '' HUP;", ["SIGTERM", "SIGUSR1", "SIGINT"]),
        ("trap '' INT HUP;", ["SIGTERM", "SIGUSR1"]),
        ("trap '' INT HUP TERM USR1;", ["SIGTERM", "SIGUSR1"]),
    ],
)
def test_signals_that_ask_to_stop_are_heard_though_they_were_ignored(ignored, heard):
    script = f'{ignored} exec "$0" -c "$1"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, LISTEN],
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    )
    assert done.stdout == f"{heard}\n"


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs /proc or ps")
def test_workers_are_children_that_live():
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *command], stdout=subprocess.PIPE)
    try:
        child = int(parent.stdout.readline())
        assert find_workers(parent.pid) == [child]
        os.kill(child, signal.SIGKILL)
        assert parent.stdout.readline() == b"ended\n"
        assert find_workers(parent.pid) == []
    finally:
        parent.kill()
        parent.wait(WAIT_S)
        parent.stdout.close()
    assert not find_workers(parent.pid)


PARENT = """if 1:
    import os, subprocess, sys, time
    child = subprocess.Popen(sys.argv[1:])
    print(child.pid, flush=True)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) # it stays, as a zombie
    print("ended", flush=True)
    time.sleep(600)"""


def test_a_flag_that_torchrun_refuses_is_its_own_error(tmp_path, capfd):
    files = RunFiles(tmp_path / "run")
    torchrun = Torchrun(files, Rendezvous(), 7, has_restarts=False)
    ended = torchrun.run(["--max-restarts=often", "-m", "x"], os.environ, StopSignals())
    assert (ended.returncode, ended.ending, ended.has_begun) == (2, None, False)
    assert files.entered.exists()
    assert "invalid int value: 'often'" in capfd.readouterr().err
