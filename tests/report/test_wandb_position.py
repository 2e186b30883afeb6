import os
import subprocess
import sys

import commands
import pytest
from limits import WAIT_S
from wandb_stub import isolate_wandb

from ddp_sgd.errors import OutputError, RefusedError
from ddp_sgd.report import wandb_follower as module
from ddp_sgd.report.journal import place_of
from ddp_sgd.report.wandb_follower import NOWHERE, read_back
from ddp_sgd.report.wandb_logger import kept_id

LOCK = "import sys; from pathlib import Path; from ddp_sgd.report.wandb_follower import "
LOCK += "lock_out_others; lock_out_others(Path(sys.argv[1])); "
LOG = """
import sys, wandb
settings = wandb.Settings(silent=True, console="off", mode=sys.argv[2])
run = wandb.init(dir=sys.argv[1], id="a", settings=settings)
for place in sys.argv[3:]:
    run.log({"x": 1}, step=int(place))
print(run.dir)
run.finish()
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    isolate_wandb(monkeypatch, tmp_path / "home")


def log(folder, *logged):
    """Make an offline run of wandb's with rows at some places; returns wandb's file."""
    command = [sys.executable, "-c", LOG, str(folder), "offline", *map(str, logged)]
    done = commands.run(command, check=True, capture_output=True, text=True, timeout=WAIT_S)
    return folder.__class__(done.stdout.strip()).parent / "run-a.wandb"


def new_file(folder):
    return folder / "wandb" / "offline-run-30000101_000000-a" / "run-a.wandb"


def test_rows_are_numbered_in_the_order_in_which_they_come():
    rows = [("train", 64), ("eval", 64), ("train", 96)]
    assert [place_of({"event": e, "samples": n}) for e, n in rows] == [128, 129, 192]
    assert place_of({"event": "train"}) == 0
    assert place_of({"event": "checkpoint", "samples": 64}) is None


def test_nothing_is_known_of_a_run_without_files(tmp_path):
    assert read_back(new_file(tmp_path), tmp_path / "last_row") == (NOWHERE, False)


def test_the_newest_file_with_rows_counts_by_name_or_by_time(tmp_path):
    first = log(tmp_path, 1, 5)
    assert read_back(new_file(tmp_path), tmp_path / "last_row") == (5, False)
    second = log(tmp_path, 6, 9)
    log(tmp_path)  # an attempt without a row
    os.utime(first)  # as after a copy
    assert read_back(new_file(tmp_path), tmp_path / "last_row") == (9, False)
    moved = second.parent.with_name("offline-run-19700101_000000-a")  # as after a change of clocks
    second.parent.rename(moved)
    os.utime(moved / "run-a.wandb")
    assert read_back(new_file(tmp_path), tmp_path / "last_row") == (9, False)
    first.parent.rename(first.parent.with_name("run-29990101_000000-a"))
    os.utime(moved / "run-a.wandb")
    assert read_back(new_file(tmp_path), tmp_path / "last_row") == (9, False)


def test_an_online_attempt_is_told_from_its_file(tmp_path):
    file = log(tmp_path, 3)
    file.parent.rename(file.parent.with_name("run-29990101_000000-a"))
    assert read_back(new_file(tmp_path), tmp_path / "last_row") == (3, True)


def test_a_torn_end_is_no_row(tmp_path):
    file = log(tmp_path, *range(1, 300))
    content = file.read_bytes()
    for size in (0, 3, len(content) // 2, len(content) // 2 + 11):
        file.write_bytes(content[:size])
        place, _ = read_back(new_file(tmp_path), tmp_path / "last_row")
        assert NOWHERE <= place < 299
        assert (place > 100) == (size > 10)


def test_the_mark_leads_to_another_folder_or_stands_for_a_lost_file(tmp_path):
    mark = tmp_path / "last_row"
    (tmp_path / "elsewhere").mkdir()
    file = log(tmp_path / "elsewhere", 7)
    mark.write_text(f"11 {file}\n")
    assert read_back(new_file(tmp_path), mark) == (7, False), "the file knows better"
    file.unlink()
    assert read_back(new_file(tmp_path), mark) == (11, False)


@pytest.mark.parametrize("text", ["", "12", "x y", "\xff\xfe"])
def test_a_mark_that_says_nothing_is_left_out(text, tmp_path):
    (tmp_path / "last_row").write_text(text, encoding="latin1")
    assert read_back(new_file(tmp_path), tmp_path / "last_row")[0] == NOWHERE


def test_the_mark_of_an_earlier_version_is_understood(tmp_path):
    mark = tmp_path / "last_row"
    mark.write_text("00000000000000000640 0                     0.75 1a2b3c4d\n")
    assert read_back(new_file(tmp_path), mark)[0] == 640


def test_a_file_that_wandb_cannot_read_ends_in_one_line(tmp_path, monkeypatch):
    file = log(tmp_path, 3)
    monkeypatch.setattr("wandb.util.get_core_path", lambda: "false")
    with pytest.raises(OutputError, match="is not readable by wandb; move it out") as caught:
        read_back(new_file(tmp_path), tmp_path / "last_row")
    assert str(file) in str(caught.value)


def test_the_id_that_was_kept(tmp_path):
    assert kept_id(tmp_path) is None
    (tmp_path / "wandb").mkdir()
    for content, expected in ((b"", None), (b"\xff\xfe", None), (b"their-id\n", "their-id")):
        (tmp_path / "wandb" / "run_id").write_bytes(content)
        assert kept_id(tmp_path) == expected


def locked(path, then):
    command = [sys.executable, "-c", f"{LOCK}{then}", str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_the_lock_is_held_until_the_process_and_its_child_have_ended(tmp_path, monkeypatch):
    path = tmp_path / "wandb" / ".lock"
    child = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    with locked(path, child) as process:
        pid = int(process.stdout.readline())
        assert process.wait(WAIT_S) == 0
    kept = os.dup(0)
    monkeypatch.setattr(module, "_LOCK_TIMEOUT_S", 0.1)
    try:
        with pytest.raises(RefusedError, match="is in use by another process that sends this run"):
            module.lock_out_others(path)
        os.kill(pid, 9)
        monkeypatch.setattr(module, "_LOCK_TIMEOUT_S", WAIT_S)
        module.lock_out_others(path)
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_a_lock_file_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="is a link; remove it"):
        module.lock_out_others(tmp_path / ".lock")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not writable"):
        module.lock_out_others(tmp_path / "file" / ".lock")
