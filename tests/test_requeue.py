import json
import subprocess
import sys

import pytest

from ddp_sgd.checkpointing.store import Header, Manifest, SkippedSteps
from ddp_sgd.errors import ExitCode
from ddp_sgd.requeue import JobAttempt, main, why_not

STOPPED = JobAttempt(exit_code=75, began_at=64, saved_at=128, requeues=0, job_state="RUNNING")


STOPPED_RESULT = {"status": "stopped", "exit_code": 75, "job": "17.1"}


def attempt(**changes):
    fields = {name: getattr(STOPPED, name) for name in STOPPED.__slots__}
    return JobAttempt(**fields | changes)


@pytest.mark.parametrize("code", [ExitCode.STOPPED, ExitCode.PEER, None])
def test_stopped_or_lost_job_goes_on(code):
    assert why_not(attempt(exit_code=code), max_requeues=1) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(
            ({"exit_code": code}, "what failed would fail again")
            for code in (64, 65, 70, 73, 76, 77, 1, 137)
        ),
        ({"job_state": "COMPLETING"}, "SLURM itself ends or requeues it (the job is COMPLETING)"),
        ({"job_state": ""}, "SLURM itself ends or requeues it (the job is gone)"),
        ({"began_at": None}, "the run did not begin"),
        ({"saved_at": 64}, "no step was saved since it began"),
        ({"saved_at": 0}, "no step was saved since it began"),
        ({"requeues": 3}, "it was requeued 3 times and MAX_REQUEUES is 3"),
    ],
)
def test_what_keeps_a_job_from_going_on(changes, reason):
    assert why_not(attempt(**changes), max_requeues=3) == reason


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder = tmp_path / "runs" / "digits"
    (folder / "checkpoints").mkdir(parents=True)
    write_journal(folder, begin=64, job="17.1")
    save(folder, samples=128)
    (folder / "result.json").write_text(json.dumps(STOPPED_RESULT))
    return folder


def write_journal(folder, *, begin, job):
    place = {"step": 2, "epoch": 0.1}
    rows = [
        {"event": "start", **place, "samples": 0, "world_size": 4, "job": "17.0"},
        {"event": "resume", **place, "samples": begin, "world_size": 2, "job": job},
        {"event": "train", "step": 5, "epoch": 0.2, "samples": 160},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def save(folder, *, samples):
    """Leave a checkpoint that this command looks at, but does not load."""
    header = Header(
        step=4, epoch=0, position=samples, samples=samples, scored_at=-1, scores={},
        skipped=SkippedSteps(), world_size=2, run_id="a", loss="", plan={}, config={}, versions={},
    )  # fmt: skip
    file = folder / "checkpoints" / "step-00000004.pt"
    manifest = Manifest(file=file.name, size_bytes=4, sha256="0" * 64, time=1.0, header=header)
    file.write_bytes(b"none")
    file.with_suffix(".json").write_text(manifest.to_text())


def decide(*options):
    return main([*options, "--answer=answer"])


def test_stopped_job_is_requeued_now(run, tmp_path, capsys):
    assert decide("--exit_code=75") == ExitCode.STOPPED
    assert capsys.readouterr().out == "ddp_sgd: stopped: requeued\n"
    assert (tmp_path / "answer").read_text() == "now\n"
    result = json.loads((run / "result.json").read_text())
    decision = {"requeued": True, "requeue_reason": "stopped: requeued"}
    assert result == STOPPED_RESULT | decision


def test_result_counts_more_than_what_other_ranks_ended_with(run, tmp_path, capsys):
    failed = {"status": "failed", "exit_code": 70, "job": "17.1"}
    (run / "result.json").write_text(json.dumps(failed))
    assert decide("--exit_code=69") == ExitCode.INTERNAL
    assert "exit code 70: not requeued, since what failed would" in capsys.readouterr().out


def test_job_that_lost_a_machine_is_requeued_once_slurm_may_know(run, tmp_path, capsys):
    (run / "result.json").unlink()
    assert decide("--exit_code=69") == ExitCode.PEER
    assert capsys.readouterr().out == "ddp_sgd: exit code 69: requeued\n"
    assert (tmp_path / "answer").read_text() == "later\n"


def test_rank_0_that_died_without_a_word_gets_a_result(run, tmp_path, capsys):
    (run / "result.json").unlink()
    assert decide("--launcher_code=137") == ExitCode.PEER
    said = "no rank left an exit code, srun ended with code 137: requeued"
    assert capsys.readouterr().out == f"ddp_sgd: {said}\n"
    result = json.loads((run / "result.json").read_text())
    assert result.pop("error").startswith("rank 0 ended without a result; look for its last lines")
    assert result == {
        "status": "failed",
        "exit_code": 69,
        "step": 5,
        "epoch": 0.2,
        "samples": 160,
        "world_size": 2,
        "job": "17.1",
        "requeued": True,
        "requeue_reason": said,
    }


def test_result_of_another_life_is_left_alone(run, tmp_path, capsys):
    """The run could not begin: whatever lies in its folder is older."""
    write_journal(run, begin=64, job="17.0")
    before = (run / "result.json").read_text().replace("17.1", "17.0")
    (run / "result.json").write_text(before)
    assert decide("--exit_code=69") == ExitCode.PEER
    assert "not requeued, since the run did not begin" in capsys.readouterr().out
    assert (run / "result.json").read_text() == before
    assert not (tmp_path / "answer").exists()


def test_run_that_never_was(run, tmp_path, capsys, monkeypatch):
    assert decide("--exit_code=69", "--name=other") == ExitCode.PEER
    assert "not requeued, since the run did not begin" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "other").exists()


def test_finished_run_needs_no_word(run, tmp_path, capsys):
    (run / "result.json").write_text(json.dumps(STOPPED_RESULT | {"exit_code": 0}))
    assert decide() == ExitCode.DONE
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "answer").exists()


def test_outside_of_slurm_nothing_is_requeued(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    assert decide("--exit_code=75") == ExitCode.STOPPED
    assert "not requeued, since the run did not begin" in capsys.readouterr().out


def test_what_cannot_be_written_is_told(run, capsys):
    (run / ".result.json.new").mkdir()
    assert decide("--exit_code=75") == ExitCode.OUTPUT
    assert (
        "result.json cannot be written: Is a directory; set output_dir" in capsys.readouterr().err
    )


def test_torch_is_not_imported(run):
    code = "import sys, ddp_sgd.requeue; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
