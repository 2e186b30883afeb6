import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from limits import WAIT_S

from ddp_sgd.config import RunConfig, dump_yaml
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ExitCode, OutputError, RefusedError
from ddp_sgd.plan import make_plan
from ddp_sgd.report import folder_lock, run_folder
from ddp_sgd.report.folder_lock import LOCK_NAME, OWNER_NAME, FolderLock
from ddp_sgd.report.run_folder import RunFolder, claim_run_folder


def describe(folder, name="x", **changes):
    return RunConfig(output_dir=str(folder), name=name, **changes)


def content(folder):
    """Names in a folder, but for that of the lock file."""
    return {path.name for path in folder.iterdir()} - {LOCK_NAME}


def open_anew(folder, name="x"):
    """Begin a run, whatever is there; the path of its folder."""
    made = RunFolder(describe(folder, name, resume="never"))
    made.release()
    return made.path


def test_an_old_run_is_moved_aside_and_nothing_is_overwritten(tmp_path):
    for number in range(4):
        folder = open_anew(tmp_path / "runs")
        assert content(folder) == set()
        (folder / "number").write_text(str(number))
    kept = {path.name: (path / "number").read_text() for path in (tmp_path / "runs").iterdir()}
    assert kept == {"x.1": "0", "x.2": "1", "x.3": "2", "x": "3"}


def test_a_file_or_a_dangling_link_in_the_way_is_moved_aside(tmp_path):
    (tmp_path / "x").write_text("precious")
    open_anew(tmp_path)
    assert (tmp_path / "x.1").read_text() == "precious"
    (tmp_path / "y").symlink_to(tmp_path / "nowhere")
    assert open_anew(tmp_path, "y").is_dir()
    assert not (tmp_path / "nowhere").exists()


def test_a_link_to_an_old_run_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "x").symlink_to(elsewhere)
    (open_anew(tmp_path) / "new").touch()
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("output_dir", ["/proc/nowhere", "{tmp}/file"])
def test_what_cannot_be_written_is_named(output_dir, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OutputError, match=r"/x cannot be written: .*; set output_dir to a folder"
    ) as caught:
        RunFolder(describe(output_dir.format(tmp=tmp_path)))
    assert caught.value.exit_code == ExitCode.OUTPUT


PLAN = make_plan(RunConfig(), samples=10, world_size=1)


def test_plan_and_result_are_strict_json(tmp_path):
    made = RunFolder(describe(tmp_path))
    folder = made.path
    made.begin(PLAN)
    made.check()
    made.finish({"status": "finished", "eval/loss": None})
    assert (folder / "config.yaml").read_text() == dump_yaml(describe(tmp_path))
    assert json.loads((folder / "plan.json").read_text()) == asdict(PLAN)
    assert json.loads((folder / "result.json").read_text()) == {
        "status": "finished",
        "eval/loss": None,
    }
    assert content(folder) == {"config.yaml", "plan.json", "result.json"}
    with pytest.raises(ValueError, match="Out of range"):
        made.finish({"eval/loss": float("nan")})


def test_a_result_is_none_any_more_when_the_run_goes_on(tmp_path):
    RunFolder(describe(tmp_path)).finish({"status": "stopped"})
    made = RunFolder(describe(tmp_path))
    made.begin(PLAN)
    assert not (tmp_path / "x" / "result.json").exists()
    made.release()


def test_a_folder_that_went_away(tmp_path):
    folder = RunFolder(describe(tmp_path))
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(OutputError, match=r"result.json cannot be written: No such file"):
        folder.finish({})
    assert not Path(tmp_path / "x").exists()


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_the_folder_of_a_run_that_is_going_on_is_left_alone(resume, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE_S", 0.1)
    first = RunFolder(describe(tmp_path))
    with pytest.raises(RefusedError, match=f"x is in use by process {os.getpid()} on ") as caught:
        RunFolder(describe(tmp_path, resume=resume))
    assert caught.value.exit_code == ExitCode.REFUSED
    first.finish({})
    open_anew(tmp_path)
    assert (tmp_path / "x.1" / "result.json").exists()


HOLD = (
    "import os, sys; from ddp_sgd.config import RunConfig; "
    "from ddp_sgd.report.run_folder import RunFolder; "
    "held = RunFolder(RunConfig(output_dir=sys.argv[1], name='x')); "
)


def test_a_run_that_was_killed_gives_its_folder_free(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE_S", 0.1)
    code = HOLD + "os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    RunFolder(describe(tmp_path)).release()


def test_a_loader_process_that_outlives_its_rank_does_not_hold_the_folder(tmp_path, monkeypatch):
    """A forked process inherits descriptors, and with them the lock."""
    monkeypatch.setattr(folder_lock, "_PATIENCE_S", 0.1)
    code = HOLD + (
        "read, write = os.pipe(); child = os.fork(); "
        "child or (os.write(write, b'.'), sys.stdin.read(), os._exit(0)); "
        "os.read(read, 1); print(child, flush=True); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as rank:
        child = int(rank.stdout.readline())
        rank.wait(WAIT_S)
        os.kill(child, 0)  # it lives
        RunFolder(describe(tmp_path)).release()
        rank.stdin.close()


def test_a_folder_is_given_free_whatever_happens(tmp_path):
    with pytest.raises(KeyError), claim_run_folder(describe(tmp_path), Runtime()):
        raise KeyError
    with claim_run_folder(describe(tmp_path), Runtime()) as folder:
        assert folder.path == tmp_path / "x"
    with claim_run_folder(describe(tmp_path), Runtime(rank=1, world_size=2)) as folder:
        assert folder is None


PLACES = ["x", "x/metrics.jsonl"] + [
    f"x/{folder}{name}"
    for folder in ("checkpoints", "logs", "wandb", "tensorboard")
    for name in ("", "/last")
]


@pytest.mark.parametrize("place", PLACES)
def test_a_link_that_leads_out_is_not_followed(place, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = tmp_path / "runs" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(RefusedError, match="is a link that leads out of the run folder") as caught:
        RunFolder(describe(tmp_path / "runs"))
    assert caught.value.exit_code == ExitCode.REFUSED
    assert list(elsewhere.iterdir()) == []


def test_links_inside_the_folder_are_no_harm(tmp_path):
    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    (tmp_path / "x" / "checkpoints" / "last").symlink_to("step-00000001.pt")
    (tmp_path / "link").symlink_to(tmp_path)
    RunFolder(describe(tmp_path / "link")).release()  # the way to the folder may be one


def test_a_link_for_a_lock_file_is_moved_aside_with_its_folder_by_nobody(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "x" / LOCK_NAME).symlink_to(tmp_path / "precious")
    for resume in ("auto", "never"):
        with pytest.raises(RefusedError, match=f"x/{LOCK_NAME} is a link; remove it, or choose"):
            RunFolder(describe(tmp_path, resume=resume))
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_that_is_refused_is_given_free(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "metrics.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(RefusedError):
        RunFolder(describe(tmp_path))
    assert not (tmp_path / "x" / OWNER_NAME).exists()
    (tmp_path / "x" / "metrics.jsonl").unlink()
    RunFolder(describe(tmp_path)).release()


def test_a_folder_that_another_run_took_over_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "RENEW_S", 0.1)
    folder = RunFolder(describe(tmp_path))
    owner = tmp_path / "x" / OWNER_NAME
    owner.write_text(owner.read_text().replace('"pid": ', '"pid": 1'))
    deadline = time.monotonic() + 60
    with pytest.raises(
        RefusedError, match="took it over when this process did not renew"
    ) as caught:
        while time.monotonic() < deadline:
            folder.check()
    assert caught.value.exit_code == ExitCode.REFUSED
    with pytest.raises(RefusedError, match="took it over"):
        folder.finish({"status": "failed", "step": 0, "exit_code": 77, "error": ""})
    assert content(tmp_path / "x") == {OWNER_NAME}
    owner.unlink()
    RunFolder(describe(tmp_path)).release()  # it was given free all the same


def test_a_run_that_is_moved_aside_has_no_owner_any_more(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").touch()
    made = RunFolder(describe(tmp_path, resume="never"))
    assert content(tmp_path / "x.1") == {"kept"}
    assert content(made.path) == {OWNER_NAME}
    made.release()


def test_two_that_begin_at_once_have_a_folder_each_in_turn(tmp_path):
    """Each moves the other's folder aside, but never one that is in use, and loses nothing."""
    code = (
        "import sys; from ddp_sgd.config import RunConfig; "
        "from ddp_sgd.report.run_folder import RunFolder\n"
        "for number in range(20):\n"
        "    held = RunFolder(RunConfig(output_dir=sys.argv[1], name='x', resume='never'))\n"
        "    (held.path / 'mine').write_text(f'{sys.argv[2]}.{number}')\n"
        "    held.release()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [process.wait(WAIT_S) for process in both] == [0, 0]
    kept = {(path / "mine").read_text() for path in tmp_path.iterdir()}
    assert kept == {f"{name}.{number}" for name in "ab" for number in range(20)}


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_folder_that_another_start_moves_aside_meanwhile_is_made_again(
    tmp_path, monkeypatch, resume
):
    """Between the look at the folder and its lock, as between its making and its lock."""
    (tmp_path / "x").mkdir()
    moments = iter([True, True])

    def lock(folder):
        if next(moments, False):
            folder.rename(folder.with_name(f"moved.{len(list(tmp_path.iterdir()))}"))
        return FolderLock(folder)

    monkeypatch.setattr(run_folder, "FolderLock", lock)
    made = RunFolder(describe(tmp_path, resume=resume))
    assert content(made.path) == {OWNER_NAME}
    made.release()
    assert next(moments, None) is None


def test_only_never_moves_a_run_aside(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").touch()
    RunFolder(describe(tmp_path)).release()
    assert (tmp_path / "x" / "kept").exists()
    open_anew(tmp_path)
    assert (tmp_path / "x.1" / "kept").exists()
