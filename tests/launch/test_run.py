import json
import os
import signal
import sys
import threading
import time

import commands
import pytest
from launching import children, environment, is_torchrun, kill
from limits import WAIT_S

from ddp_sgd.errors import ExitCode
from ddp_sgd.launch import LaunchOptions, launch, torchrun_environment, torchrun_flags
from ddp_sgd.torchrun import Rendezvous, StopSignals, find_workers


@pytest.fixture
def _forked(monkeypatch):
    """torchrun, which is started in this process, and its ranks are forks."""
    monkeypatch.setattr("subprocess.Popen", commands.Popen)
    others = commands.without_servers(find_workers)
    monkeypatch.setattr("ddp_sgd.torchrun.find_workers", others)


CONF = "read_timeout=4,last_call_timeout=7,keep_alive_interval=2,keep_alive_max_attempt=5"


def machines(nodes="2", **changes):
    return Rendezvous(nodes=nodes, address="here", port="29400", **changes)


def test_flags_for_one_machine(tmp_path):
    assert torchrun_flags(Rendezvous(), 3, "x", tmp_path, 7) == [
        "--standalone",
        "--nproc-per-node=3",
        f"--rdzv-conf=join_timeout=7,{CONF}",
        f"--log-dir={tmp_path}",
        "--tee=3",
    ]


@pytest.mark.parametrize(
    ("is_host", "more"), [(None, ""), (True, ",is_host=1"), (False, ",is_host=0")]
)
def test_flags_for_several_machines(is_host, more, tmp_path):
    assert torchrun_flags(machines(nodes="1:2", is_host=is_host), 2, "x", tmp_path, 7) == [
        "--nnodes=1:2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=here:29400",
        "--rdzv-id=x",
        "--nproc-per-node=2",
        f"--rdzv-conf=join_timeout=7,{CONF}{more}",
        f"--log-dir={tmp_path}",
        "--tee=3",
    ]


def test_an_own_id_counts_more_than_the_name(tmp_path):
    assert "--rdzv-id=mine" in torchrun_flags(machines(run_id="mine"), 2, "x", tmp_path, 7)


def test_torchrun_knows_the_flags(tmp_path):
    """Each is one of the installed release, whose parser is asked."""
    flags = torchrun_flags(machines(), 2, "x", tmp_path, 7)
    flags += torchrun_flags(Rendezvous(), 2, "x", tmp_path, 7)
    program = "import sys; from torch.distributed.run import parse_args; parse_args(sys.argv[1:])"
    command = [sys.executable, "-c", program, *flags, "--max-restarts=0", "-m", "x"]
    commands.run(command, check=True, timeout=WAIT_S)


@pytest.mark.parametrize(("nproc", "cpus", "threads"), [(2, 64, "32"), (3, 4, "1"), (8, 4, "1")])
def test_cpus_are_shared_fairly(nproc, cpus, threads):
    ours = torchrun_environment({"OMP_NUM_THREADS": ""}, nproc, cpus)
    assert ours["OMP_NUM_THREADS"] == threads


def test_what_the_user_has_set_stays():
    theirs = {"OMP_NUM_THREADS": "5", "PET_SIGNALS_TO_HANDLE": "SIGTERM", "X": "y"}
    ours = torchrun_environment(theirs, 2, 64)
    assert theirs.items() <= ours.items()
    assert ours["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def run_options(folder, *more, nproc=1, restarts=0):
    train = (f"--output_dir={folder}/runs", "--log.every_steps=1", *more)
    return LaunchOptions(nproc=nproc, max_restarts=restarts, rendezvous=Rendezvous(), train=train)


def while_it_runs(act):
    """Do something in a thread, which the launcher in this one does not wait for."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def wait_for_rows(folder):
    path = folder / "runs" / "digits" / "metrics.jsonl"
    deadline = time.monotonic() + WAIT_S
    while not (path.exists() and '"event": "train"' in path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("_forked")
def test_a_run_to_its_end(tmp_path, capfd):
    options = run_options(tmp_path, "--epochs=1", nproc=2)
    assert launch(options, environment(), StopSignals()) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits"]
    assert len(list((tmp_path / "runs" / "digits" / "logs").glob("*/attempt_0/*/stdout.log"))) == 2
    assert "finished: 23 steps" in capfd.readouterr().out


def test_a_stop_before_torchrun_starts_leaves_nothing(tmp_path):
    stop = StopSignals()
    stop.note(signal.SIGUSR1)
    assert launch(run_options(tmp_path), environment(), stop) == ExitCode.STOPPED
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.usefixtures("_forked")
def test_a_stop_is_passed_on_once(tmp_path, capfd):
    stop = StopSignals()

    def press_twice():
        wait_for_rows(tmp_path)
        stop.note(signal.SIGTERM)
        stop.note(signal.SIGUSR1)

    thread = while_it_runs(press_twice)
    assert launch(run_options(tmp_path, "--epochs=100000"), environment(), stop) == 75
    thread.join(WAIT_S)
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("stopped", 75)


def kill_torchrun():
    (agent,) = [pid for pid in children(os.getpid()) if is_torchrun(pid)]
    kill(agent)


@pytest.mark.usefixtures("_forked")
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_torchrun_that_is_killed_is_started_again(tmp_path, capfd):
    hurry = tmp_path / "hurry"
    slow = f"--model={{class_path: user_code.Slow, init_args: {{pause_s: 0.1, until: {hurry}}}}}"

    def shoot():
        wait_for_rows(tmp_path)
        kill_torchrun()
        hurry.touch()

    thread = while_it_runs(shoot)
    options = run_options(tmp_path, slow, "--epochs=40", restarts=1)
    assert launch(options, environment(), StopSignals()) == 0
    thread.join(WAIT_S)
    said = "ddp_sgd: torchrun was ended by SIGKILL; it is started again (1 of 1)\n"
    assert said in capfd.readouterr().err
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert (result["status"], result["step"]) == ("finished", 40 * 45)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(("is_stopped", "restarts", "code"), [(True, 3, 75), (False, 0, 69)])
def test_a_torchrun_that_is_killed_is_not_started_again(
    is_stopped, restarts, code, tmp_path, capfd
):
    """After a stop, and where no restart is left; its workers save and end."""
    stop = StopSignals()

    def shoot():
        wait_for_rows(tmp_path)
        if is_stopped:
            stop.note(signal.SIGTERM)
        kill_torchrun()

    thread = while_it_runs(shoot)
    options = run_options(tmp_path, "--epochs=100000", restarts=restarts)
    assert launch(options, environment(), stop) == code
    thread.join(WAIT_S)
    said = capfd.readouterr().err
    assert "started again" not in said
    assert ("torchrun was ended by SIGKILL; its processes save" in said) is not is_stopped
    path = tmp_path / "runs" / "digits" / "result.json"
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert json.loads(path.read_text())["exit_code"] == 75
