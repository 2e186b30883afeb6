import json
import os
import subprocess
import sys

import pytest
from limits import WAIT_S

from ddp_sgd.checkpointing.store import Header, Manifest, SkippedSteps
from ddp_sgd.errors import OutputError
from ddp_sgd.run_files import RunFiles

STOPPED = {"status": "stopped", "exit_code": 75, "samples": 64}
FAILED = {"status": "failed", "exit_code": 69, "samples": 64}
S = 1_000_000_000


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "digits"
    path.mkdir(parents=True)
    return path


def write(path, content, *, at):
    """Write a file as if it were so many seconds old or young."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(path, ns=(at * S, at * S))


def begin_workers(files, number, *, at):
    path = files.logs / "id" / f"attempt_{number}"
    (path / "0").mkdir(parents=True)
    os.utime(path, ns=(at * S, at * S))


def test_logs_begin_beside_the_run_folder_and_move_in(folder):
    files = RunFiles(folder)
    begin_workers(files, 0, at=1)
    (files.logs / "id" / "attempt_0" / "0" / "stdout.log").write_text("x")
    assert files.logs.parent == folder.parent
    assert files.logs.name.startswith("digits.logs.")
    files.move_into_run_folder()
    assert files.logs == folder / "logs"
    assert (folder / "logs" / "id" / "attempt_0" / "0" / "stdout.log").read_text() == "x"
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_logs_that_cannot_move_stay_where_they_are(folder):
    files = RunFiles(folder)
    begin_workers(files, 0, at=1)
    (folder / "logs").write_text("a file")
    before = files.logs
    files.move_into_run_folder()
    assert files.logs == before
    assert len(files.attempts()) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OutputError, match="digits cannot be written; set output_dir to a folder"):
        RunFiles(tmp_path / "runs" / "digits")


def test_a_result_of_an_earlier_launch_is_not_taken(folder):
    write(folder / "result.json", STOPPED, at=5)
    files = RunFiles(folder)
    assert files.result() is None
    write(folder / "result.json", FAILED, at=5)
    assert files.result() == FAILED
    files.forget_results()
    assert files.result() is None


@pytest.mark.parametrize("content", ["", "{", "[]", "75"])
def test_a_result_that_is_none_is_left_out(content, folder):
    files = RunFiles(folder)
    write(folder / "result.json", content, at=5)
    assert files.result() is None


@pytest.mark.parametrize("seen", ["result.json", "exit_code"])
@pytest.mark.parametrize(("second", "is_restarted"), [(None, False), (5, False), (6, True)])
def test_workers_that_ended_on_request_and_were_started_again(seen, second, is_restarted, folder):
    """The next attempt removes result.json, but not what was left for the launcher."""
    files = RunFiles(folder)
    begin_workers(files, 0, at=1)
    if seen == "exit_code":
        write(files.exit_code, "75\n", at=5)
    else:
        write(folder / "result.json", STOPPED, at=5)
    if second:
        begin_workers(files, 1, at=second)
    assert files.has_stopped_and_restarted() is is_restarted


def test_a_stop_that_was_seen_is_kept_though_the_file_goes(folder):
    files = RunFiles(folder)
    write(folder / "result.json", STOPPED, at=5)
    assert not files.has_stopped_and_restarted()
    (folder / "result.json").unlink()
    assert files.result() is None


@pytest.mark.parametrize("gives_up", [False, True])
@pytest.mark.parametrize("restarted_at", [4, 6])
def test_a_run_that_failed_too_often_and_was_started_again(gives_up, restarted_at, folder):
    files = RunFiles(folder)
    row = {"step": 3, "exit_code": 65} | ({"gives_up": True} if gives_up else {})
    write(folder / "failures.jsonl", json.dumps(row) + "\n", at=5)
    begin_workers(files, 0, at=restarted_at)
    assert files.has_given_up_and_restarted() is (gives_up and restarted_at > 5)


def test_failures_of_an_earlier_launch_do_not_count(folder):
    write(folder / "failures.jsonl", '{"gives_up": true}\n', at=5)
    files = RunFiles(folder)
    begin_workers(files, 0, at=6)
    assert not files.has_given_up_and_restarted()


@pytest.mark.parametrize(
    ("code", "restarted_at", "has_failed"),
    [("69\n", 4, True), ("69\n", 6, False), ("0\n", 4, False), ("", 4, False)],
)
def test_workers_that_failed_and_were_not_started_again(code, restarted_at, has_failed, folder):
    files = RunFiles(folder)
    begin_workers(files, 0, at=restarted_at)
    write(files.exit_code, code, at=5)
    assert files.has_failed_without_restart() is has_failed
    files.begin_attempt()
    assert not files.has_failed_without_restart()


def test_a_code_that_workers_of_a_killed_torchrun_leave_late_does_not_count(folder):
    files = RunFiles(folder)
    begin_workers(files, 0, at=1)
    late = files.exit_code
    files.begin_attempt()
    write(late, "75\n", at=5)
    begin_workers(files, 1, at=6)
    assert files.left_code() is None
    assert not files.has_stopped_and_restarted()


def test_an_error_that_a_rank_printed_is_found(folder):
    files = RunFiles(folder)
    begin_workers(files, 0, at=1)
    log = files.logs / "id" / "attempt_0" / "0" / "stderr.log"
    log.write_bytes(b"\xff a warning\n")
    assert not files.has_reported()
    log.write_bytes(b"\xff a warning\nddp_sgd: error: x is y; z.\n")
    assert files.has_reported()


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
    assert files.restore_stop_result()
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
    assert files.restore_stop_result()
    assert [read_result(files)[key] for key in ("step", "epoch", "samples")] == [0, 0.0, 0]


@pytest.mark.parametrize(("samples", "is_kept"), [(128, True), (96, False)])
def test_a_result_that_was_seen_comes_back_unless_the_run_went_on(samples, is_kept, files):
    seen = {"status": "stopped", "exit_code": 75, "samples": samples, "eval/loss": 1.5}
    path = files.folder / "result.json"
    path.write_text(json.dumps(seen))
    files.result()
    path.unlink()
    assert files.restore_stop_result()
    assert (read_result(files) == seen) is is_kept
    assert read_result(files)["samples"] == 128


def test_a_run_that_did_not_begin_gets_no_result(files):
    (files.folder / "metrics.jsonl").unlink()
    assert not files.restore_stop_result()
    assert not RunFiles(files.folder).restore_stop_result()
    assert not (files.folder / "result.json").exists()


def test_rows_of_an_earlier_launch_are_no_beginning(files):
    later = RunFiles(files.folder)
    assert not later.restore_stop_result()
    os.utime(files.folder / "metrics.jsonl", ns=(1, 1))
    assert later.restore_stop_result()


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
        assert not files.restore_stop_result()
        assert not (files.folder / "result.json").exists()
    finally:
        other.communicate(timeout=WAIT_S)
