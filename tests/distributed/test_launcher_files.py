import json
import sys

import commands
import pytest
from launching import environment
from limits import WAIT_S

from ddp_sgd.distributed.process_exit import leave_for_launcher
from ddp_sgd.errors import ExitCode


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Ask for both files, as launchers do; their paths."""
    code, error = tmp_path / "exit_code", tmp_path / "error.json"
    monkeypatch.setenv("LAUNCH_EXIT_CODE_FILE", str(code))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return code, error


def test_error_is_in_the_format_of_torch(files):
    leave_for_launcher(ExitCode.DATA, "x is y; z.", traceback="Traceback\n")
    code, error = files
    assert code.read_text() == "65\n"
    message = json.loads(error.read_text())["message"]
    assert (message["message"], message["errorCode"]) == ("x is y; z.", 65)
    assert message["extraInfo"]["py_callstack"] == "Traceback\nx is y; z."
    assert message["extraInfo"]["timestamp"].isdigit()
    assert sorted(path.name for path in error.parent.iterdir()) == ["error.json", "exit_code"]


def test_first_error_of_a_process_is_kept(files):
    leave_for_launcher(ExitCode.DATA, "first")
    leave_for_launcher(ExitCode.PEER, "second")
    assert json.loads(files[1].read_text())["message"]["message"] == "first"


def test_rank_that_failed_first_is_earlier_within_a_second(files, monkeypatch):
    times = {}
    monkeypatch.setattr("time.time", lambda: 1.8e9)
    for is_first in (False, True):
        leave_for_launcher(ExitCode.DATA, "x", is_first=is_first)
        report = json.loads(files[1].read_text())
        times[is_first] = int(report["message"]["extraInfo"]["timestamp"])
        files[1].unlink()
    assert times[True] < times[False]


def test_success_is_no_error(files):
    leave_for_launcher(ExitCode.DONE, "")
    assert files[0].read_text() == "0\n"
    assert not files[1].exists()


@pytest.mark.parametrize(
    ("rank", "local_rank", "writes"), [(0, 0, True), (1, 1, False), (4, 0, True), (5, 1, False)]
)
def test_code_is_left_by_one_rank_of_a_host(rank, local_rank, writes, files, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    leave_for_launcher(ExitCode.PEER, "x")
    assert files[0].exists() == writes
    assert files[1].exists()


def test_files_that_cannot_be_written_are_dropped(tmp_path, monkeypatch):
    for name in ("LAUNCH_EXIT_CODE_FILE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "missing" / "file"))
    leave_for_launcher(ExitCode.PEER, "x")
    assert not list(tmp_path.iterdir())


def under_torchrun(folder, *options):
    """Return what torchrun says below its headline, of a run of two ranks that fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = commands.run(
        [sys.executable, *torchrun, f"--log-dir={folder}", "-m", "ddp_sgd.train", *options],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 1
    _, _, report = done.stderr.rpartition("Root Cause (first observed failure):")
    return done.stderr, report


@pytest.mark.parametrize("rank", [0, 1])
def test_report_of_torchrun_names_the_cause_last(rank, tmp_path):
    said, report = under_torchrun(
        tmp_path,
        f"--data.train={{class_path: user_code.FailsOnRank, init_args: {{rank: {rank}}}}}",
        "--model.init_args.inputs=4",
        "--data.eval=null",
    )
    (line,) = [text for text in said.splitlines() if text.startswith("ddp_sgd: error: ")]
    assert line.startswith("ddp_sgd: error: data.train[")
    assert f"traceback : {line.removeprefix('ddp_sgd: error: ')}" in report
    assert "exitcode  : 65 " in report
    assert "<N/A>" not in report


def test_report_of_torchrun_names_a_wrong_configuration(tmp_path):
    said, report = under_torchrun(tmp_path, "--epochs=0")
    assert said.count("ddp_sgd: error: epochs is 0; ") == 1
    assert "traceback : epochs is 0; " in report
