import json
import os
import signal
import subprocess
import sys
import threading
import time

import commands
import pytest
from launching import children, environment, is_torchrun, kill
from limits import WAIT_S

from ddp_sgd.checkpointing.manifest import Header, Manifest, SkippedSteps
from ddp_sgd.errors import ExitCode
from ddp_sgd.launch.options import LaunchOptions, Nodes
from ddp_sgd.launch.run import launch, restore_stop_result, torchrun_environment, torchrun_flags
from ddp_sgd.launch.run_files import RunFiles
from ddp_sgd.launch.torchrun import StopSignals, find_workers


@pytest.fixture
def _forked(monkeypatch):
    """torchrun, which is started in this process, and its ranks are forks."""
    monkeypatch.setattr("subprocess.Popen", commands.Popen)
    others = commands.without_servers(find_workers)
    monkeypatch.setattr("ddp_sgd.launch.torchrun.find_workers", others)


CONF = "read_timeout=4,last_call_timeout=7,keep_alive_interval=2,keep_alive_max_attempt=5"


def nodes(**changes):
    fields = {"count": "2", "address": "here", "port": "29400", "run_id": "", "remedy": ""}
    return Nodes(**{**fields, "is_host": None, **changes})


def options(place=None, nproc=2):
    return LaunchOptions(nproc=nproc, max_restarts=0, nodes=place, train=())


def test_flags_for_one_machine(tmp_path):
    assert torchrun_flags(options(nproc=3), "x", tmp_path, 7) == [
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
    assert torchrun_flags(options(nodes(count="1:2", is_host=is_host)), "x", tmp_path, 7) == [
        "--nnodes=1:2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=here:29400",
        "--nproc-per-node=2",
        f"--rdzv-conf=join_timeout=7,{CONF}{more}",
        f"--log-dir={tmp_path}",
        "--tee=3",
        "--rdzv-id=x",
    ]


def test_an_own_id_counts_more_than_the_name(tmp_path):
    assert "--rdzv-id=mine" in torchrun_flags(options(nodes(run_id="mine")), "x", tmp_path, 7)


def test_torchrun_knows_the_flags(tmp_path):
    """Each is one of the installed release, whose parser is asked."""
    flags = torchrun_flags(options(nodes()), "x", tmp_path, 7) + torchrun_flags(
        options(), "x", tmp_path, 7
    )
    program = "import sys; from torch.distributed.run import parse_args; parse_args(sys.argv[1:])"
    command = [sys.executable, "-c", program, *flags, "--max-restarts=0", "-m", "x"]
    commands.run(command, check=True, timeout=WAIT_S)


@pytest.mark.parametrize(("nproc", "cpus", "threads"), [(2, 64, "32"), (3, 4, "1"), (8, 4, "1")])
def test_cpus_are_shared_fairly(nproc, cpus, threads, tmp_path):
    ours = torchrun_environment({"OMP_NUM_THREADS": ""}, nproc, cpus, tmp_path)
    assert ours["OMP_NUM_THREADS"] == threads


def test_what_the_user_has_set_stays(tmp_path):
    theirs = {"OMP_NUM_THREADS": "5", "PET_SIGNALS_TO_HANDLE": "SIGTERM", "X": "y"}
    ours = torchrun_environment(theirs, 2, 64, tmp_path / "exit_code")
    assert theirs.items() <= ours.items()
    assert ours["LAUNCH_EXIT_CODE_FILE"] == str(tmp_path / "exit_code")
    assert ours["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def run_options(folder, *more, nproc=1, restarts=0):
    train = (f"--output_dir={folder}/runs", "--log.every_steps=1", *more)
    return LaunchOptions(nproc=nproc, max_restarts=restarts, nodes=None, train=train)


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


@pytest.mark.usefixtures("_forked")
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_torchrun_that_is_killed_is_started_again(tmp_path, capfd):
    hurry = tmp_path / "hurry"
    slow = f"--model={{class_path: user_code.Slow, init_args: {{pause_s: 0.1, until: {hurry}}}}}"

    def shoot():
        wait_for_rows(tmp_path)
        (agent,) = [pid for pid in children(os.getpid()) if is_torchrun(pid)]
        kill(agent)
        hurry.touch()

    thread = while_it_runs(shoot)
    options = run_options(tmp_path, slow, "--epochs=40", restarts=1)
    assert launch(options, environment(), StopSignals()) == 0
    thread.join(WAIT_S)
    said = "ddp_sgd: torchrun was ended by SIGKILL; it is started again (1 of 1)\n"
    assert said in capfd.readouterr().err
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert (result["status"], result["step"]) == ("finished", 40 * 45)


@pytest.fixture
def files(tmp_path):
    """A run that has begun since the launch, and was saved at sample 128, in epoch 1."""
    folder = tmp_path / "runs" / "digits"
    (folder / "checkpoints").mkdir(parents=True)
    files = RunFiles(folder)
    write_rows(
        folder, {"event": "start", "step": 0, "world_size": 2}, {"event": "train", "step": 5}
    )
    header = Header(
        step=4, epoch=1, position=28, samples=128, scored_at=-1, scores={}, skipped=SkippedSteps(),
        world_size=2, run_id="a", loss="", plan={"samples_per_epoch": 100}, config={}, versions={},
    )  # fmt: skip
    file = folder / "checkpoints" / "step-00000004.pt"
    manifest = Manifest(file=file.name, size_bytes=4, sha256="0" * 64, time=1.0, header=header)
    file.write_bytes(b"none")
    file.with_suffix(".json").write_text(manifest.to_text())
    return files


def write_rows(folder, *rows):
    full = [{"samples": row["step"] * 32, "epoch": row["step"] * 0.32} | row for row in rows]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in full))


def read_result(files):
    return json.loads((files.folder / "result.json").read_text())


def test_a_run_without_a_result_stands_at_its_newest_checkpoint(files):
    assert restore_stop_result(files)
    result = read_result(files)
    assert result.pop("error").startswith("the run was stopped while it was starting again")
    assert result == {
        "status": "stopped",
        "exit_code": 75,
        "step": 4,
        "epoch": 1.28,
        "samples": 128,
        "world_size": 2,
    }
    assert sorted(path.name for path in files.folder.iterdir() if path.name != ".lock") == [
        "checkpoints",
        "metrics.jsonl",
        "result.json",
    ]


def test_a_run_without_a_checkpoint_begins_again(files):
    for path in (files.folder / "checkpoints").iterdir():
        path.unlink()
    assert restore_stop_result(files)
    assert [read_result(files)[key] for key in ("step", "epoch", "samples")] == [0, 0.0, 0]


@pytest.mark.parametrize(("samples", "is_kept"), [(128, True), (96, False)])
def test_a_result_that_was_seen_comes_back_unless_the_run_went_on(samples, is_kept, files):
    seen = {"status": "stopped", "exit_code": 75, "samples": samples, "eval/loss": 1.5}
    path = files.folder / "result.json"
    path.write_text(json.dumps(seen))
    files.result()
    path.unlink()
    assert restore_stop_result(files)
    assert (read_result(files) == seen) is is_kept
    assert read_result(files)["samples"] == 128


def test_a_run_that_did_not_begin_gets_no_result(files):
    (files.folder / "metrics.jsonl").unlink()
    assert not restore_stop_result(files)
    assert not restore_stop_result(RunFiles(files.folder))
    assert not (files.folder / "result.json").exists()


def test_rows_of_an_earlier_launch_are_no_beginning(files):
    later = RunFiles(files.folder)
    assert not restore_stop_result(later)
    os.utime(files.folder / "metrics.jsonl", ns=(1, 1))
    assert restore_stop_result(later)


HOLD = """if 1:
    import sys
    from pathlib import Path
    from ddp_sgd.report.folder_lock import FolderLock
    lock = FolderLock(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()"""


def test_a_folder_that_another_run_has_is_left_alone(files):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(files.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"held\n"
        assert not restore_stop_result(files)
        assert not (files.folder / "result.json").exists()
    finally:
        other.communicate(timeout=WAIT_S)
