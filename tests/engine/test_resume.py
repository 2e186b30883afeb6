"""What a run goes on from; that going on changes nothing is shown in tests/distributed/."""

import errno
import json
import os
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import torch
from limits import WAIT_S

from ddp_sgd import files
from ddp_sgd.checkpointing.serialization import find_checkpoint
from ddp_sgd.config import RunConfig
from ddp_sgd.data import InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.resume import find_resume_point
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.errors import DataError, ExitCode, OutputError, RefusedError
from ddp_sgd.models import MLP
from ddp_sgd.report.journal import read_journal
from ddp_sgd.report.run_folder import claim_run_folder


def describe(folder, **changes):
    basis = {"name": "x", "epochs": 2, "wandb": {"mode": "disabled"}, "log": {"every_steps": 1}}
    return RunConfig(output_dir=str(folder), **basis | changes)


def data(samples=64, width=4):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, width, generator=generator)
    return InMemory(inputs, torch.randint(0, 2, (samples,), generator=generator))


def run(folder, *, stop=False, model=None, train_set=None, **changes):
    """Two steps per epoch, four in all; stopped after the first."""
    wish = StopRequest()
    if stop:
        wish.ask("the test")
    torch.manual_seed(0)
    return fit(
        describe(folder, **changes),
        Runtime(),
        model=model or MLP(4, [5], 2),
        train_set=train_set or data(),
        stop=wish,
    )


def look(folder, **changes):
    config = describe(folder, **changes)
    with claim_run_folder(config, Runtime()) as claimed:
        return find_resume_point(config, claimed, Runtime())


def events(folder, name="x"):
    return [
        (row["event"], row["step"])
        for row in read_journal(folder / name / "metrics.jsonl")
        if row["event"] != "train"
    ]


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_command_for_the_first_start_and_for_every_other(tmp_path):
    whole = run(tmp_path / "whole")
    assert run(tmp_path, stop=True).exit_code == ExitCode.STOPPED
    finished = run(tmp_path)
    assert finished.weights_digest == whole.weights_digest
    assert events(tmp_path) == [
        ("start", 0), ("stop", 1), ("checkpoint", 1), ("end", 1),
        ("resume", 1), ("checkpoint", 2), ("checkpoint", 4), ("end", 4),
    ]  # fmt: skip
    before = content(tmp_path)
    assert run(tmp_path) == finished
    assert content(tmp_path) == before


def test_the_identity_of_a_run_stays(tmp_path):
    run(tmp_path, stop=True)
    first = look(tmp_path).run_id
    run(tmp_path)
    assert look(tmp_path, epochs=3).run_id == first
    assert read_journal(tmp_path / "x" / "metrics.jsonl")[0]["run_id"] == first


def test_more_epochs_are_trained(tmp_path):
    run(tmp_path)
    longer = run(tmp_path, epochs=3)
    assert (longer.status, longer.step) == ("finished", 6)
    assert [step for event, step in events(tmp_path) if event == "end"] == [4, 6]


def test_another_configuration_is_refused_and_nothing_is_touched(tmp_path):
    run(tmp_path, stop=True)
    before = content(tmp_path)
    with pytest.raises(RefusedError, match=r"optim.lr was 0.05, is 0.1; restore that") as caught:
        run(tmp_path, optim={"lr": 0.1})
    assert caught.value.exit_code == ExitCode.REFUSED
    with pytest.raises(RefusedError, match="epochs was 2, is 1"):
        run(tmp_path, epochs=1)
    assert content(tmp_path) == before
    assert run(tmp_path, optim={"lr": 0.1}, resume="never").step == 4
    assert content(tmp_path / "x.1") == {
        path.relative_to("x"): text for path, text in before.items()
    }


def test_a_damaged_description_does_not_hide_that_the_run_is_another(tmp_path):
    run(tmp_path, stop=True)
    (tmp_path / "x" / "config.yaml").unlink()
    with pytest.raises(RefusedError, match="optim.lr was 0.05, is 0.1"):
        run(tmp_path, optim={"lr": 0.1})
    assert run(tmp_path).step == 4


def test_a_run_that_saved_nothing_begins_again_in_its_folder(tmp_path):
    run(tmp_path, stop=True)
    first = look(tmp_path).run_id
    shutil.rmtree(tmp_path / "x" / "checkpoints")
    (tmp_path / "x" / "result.json").unlink()
    resume_point = look(tmp_path)
    assert (resume_point.run_id, resume_point.has_rows, resume_point.header) == (first, True, None)
    assert run(tmp_path).step == 4
    assert events(tmp_path)[:2] == [("start", 0), ("resume", 0)]


def test_a_failed_run_of_another_configuration_that_saved_nothing_is_moved_aside(tmp_path):
    """As after a wrong path to the data, or a wrong shape: fixed, the same name must work."""
    with pytest.raises(Exception, match="fails on inputs"):
        run(tmp_path, train_set=data(width=7))
    assert run(tmp_path, seed=1).step == 4
    assert json.loads((tmp_path / "x.1" / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("harm", ["empty", "flip", "no manifest"])
def test_a_run_walks_back_over_damaged_checkpoints(harm, tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path, checkpoint={"every_steps": 1})
    (tmp_path / "x" / "result.json").unlink()
    for step in (3, 4):
        file = tmp_path / "x" / "checkpoints" / f"step-{step:08d}.pt"
        if harm == "no manifest":
            file.with_suffix(".json").unlink()
        else:
            text = bytearray(file.read_bytes())
            text[500] ^= 4
            file.write_bytes(text if harm == "flip" else b"")
    resume_point = look(tmp_path)
    assert resume_point.header.step == 2
    assert [line.split()[0] for line in resume_point.passed_over] == [
        "step-00000004.pt", "step-00000003.pt",
    ]  # fmt: skip
    assert run(tmp_path).weights_digest == whole.weights_digest
    kept = {path.name for path in (tmp_path / "x" / "checkpoints").iterdir()}
    assert "step-00000003.pt.damaged" in kept


def stale(monkeypatch, *names, times=10**9):
    """Let files of these names fail to open, so many times, as on a disk that went away."""
    opened, left = Path.open, dict.fromkeys(names, times)

    def open_or_fail(path, *args, **options):
        if left.get(path.name, 0) > 0:
            left[path.name] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_or_fail)
    monkeypatch.setattr(files, "sleep", lambda pause: None)


@pytest.mark.parametrize("ending", ["pt", "json"])
@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_checkpoint_that_cannot_be_read_ends_the_start_and_nothing_is_touched(
    ending, resume, tmp_path, monkeypatch
):
    run(tmp_path, stop=True, checkpoint={"every_steps": 1})
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        stale(patch, f"step-00000001.{ending}")
        with pytest.raises(DataError) as caught:
            run(tmp_path, resume=resume)
    assert str(caught.value).startswith(
        f"{tmp_path}/x/checkpoints/step-00000001.{ending} cannot be read: Stale file handle; try "
        "again when its disk answers, or move it and step-00000001."
    )
    assert content(tmp_path) == before
    assert run(tmp_path, resume=resume).step == 4
    assert not list((tmp_path / "x" / "checkpoints").glob("*.damaged*"))


def test_reads_that_fail_for_a_moment_change_nothing(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    run(tmp_path, stop=True)
    stale(monkeypatch, "step-00000001.pt", "step-00000001.json", "config.yaml", times=3)
    assert run(tmp_path).weights_digest == whole.weights_digest
    assert events(tmp_path)[4] == ("resume", 1)
    assert not list((tmp_path / "x" / "checkpoints").glob("*.damaged*"))


def test_a_description_that_cannot_be_read_is_not_missing(tmp_path, monkeypatch):
    """The same command would take the run for a new one, and begin with a copy once more."""
    run(tmp_path)
    path = str(tmp_path / "x" / "checkpoints" / "step-00000002.pt")
    run(tmp_path, name="y", resume=path, stop=True)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        stale(patch, "config.yaml")
        with pytest.raises(DataError, match="config.yaml cannot be read: Stale file handle; try"):
            run(tmp_path, name="y", resume=path)
    assert content(tmp_path) == before


def test_what_is_set_aside_does_not_overwrite_what_was(tmp_path):
    run(tmp_path, stop=True)
    (tmp_path / "x" / "result.json").unlink()
    checkpoints = tmp_path / "x" / "checkpoints"
    for number in range(2):
        (checkpoints / "step-00000001.pt").write_text(f"damage {number}")
        run(tmp_path, stop=True)
        (tmp_path / "x" / "result.json").unlink()
    assert (checkpoints / "step-00000001.pt.damaged").read_text() == "damage 0"
    assert (checkpoints / "step-00000001.pt.damaged.2").read_text() == "damage 1"
    assert (checkpoints / "step-00000001.json.damaged.2").exists()


def test_where_nothing_is_whole_a_run_begins_again_and_says_so(tmp_path, capsys):
    run(tmp_path, stop=True)
    (tmp_path / "x" / "result.json").unlink()
    (tmp_path / "x" / "checkpoints" / "step-00000001.pt").write_bytes(b"")
    with pytest.raises(DataError, match="no checkpoint that is whole; step-00000001.pt has 0 byte"):
        look(tmp_path, resume="must")
    capsys.readouterr()
    assert run(tmp_path).step == 4
    said = capsys.readouterr().out
    assert "passed over: step-00000001.pt has 0 bytes instead of" in said
    assert "beginning again at step 0" in said


def test_a_finished_run_whose_last_checkpoint_is_damaged_makes_it_anew(tmp_path):
    finished = run(tmp_path)
    file = tmp_path / "x" / "checkpoints" / "step-00000004.pt"
    before = file.read_bytes()
    file.write_bytes(before[:-1])
    assert replace(run(tmp_path), shares=finished.shares) == finished
    assert [event for event in events(tmp_path) if event[0] == "resume"] == [("resume", 2)]
    assert file.stat().st_size == len(before)


def test_a_finished_run_is_not_that_of_other_data_or_another_loss(tmp_path):
    run(tmp_path)
    with pytest.raises(RefusedError, match="data.train had 64 samples, has 65"):
        run(tmp_path, train_set=data(65))
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(RefusedError, match="the loss was"):
        fit(describe(tmp_path), Runtime(), train_set=data(), loss=torch.nn.MultiMarginLoss())
    assert fit(describe(tmp_path), Runtime(), train_set=data(), loss=loss).step == 4


def test_a_branch_whose_copy_is_damaged_does_not_begin_at_step_0(tmp_path):
    run(tmp_path)
    path = str(tmp_path / "x" / "checkpoints" / "step-00000002.pt")
    run(tmp_path, name="y", resume=path, stop=True)
    for file in (tmp_path / "y" / "checkpoints").glob("*.pt"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no checkpoint that is whole"):
        run(tmp_path, name="y", resume=path)


def test_a_branch_may_have_another_reference_batch(tmp_path):
    run(tmp_path, stop=True)
    path = str(tmp_path / "x")
    for reference, rate in ((None, 0.05), (64, 0.025)):
        name = f"r{reference}"
        optim = {"reference_batch": reference}
        run(tmp_path, name=name, resume=path, optim=optim, schedule={"name": "constant"})
        rows = read_journal(tmp_path / name / "metrics.jsonl")
        assert [row["train/lr"] for row in rows if row["event"] == "train"][-1] == rate


def test_a_journal_whose_first_line_is_torn_keeps_the_identity(tmp_path):
    run(tmp_path, stop=True)
    first = look(tmp_path).run_id
    journal = tmp_path / "x" / "metrics.jsonl"
    journal.write_text("{torn")
    resume_point = look(tmp_path)
    assert (resume_point.run_id, resume_point.has_rows) == (first, True)
    assert run(tmp_path).step == 4


def test_must_needs_something_to_go_on_from(tmp_path):
    with pytest.raises(DataError, match="holds no checkpoint that is whole; set resume=auto"):
        run(tmp_path, resume="must")
    run(tmp_path, stop=True, name="y")
    assert run(tmp_path, resume="must", name="y").step == 4


def test_a_path_begins_another_run_with_a_copy(tmp_path):
    whole = run(tmp_path)
    before = content(tmp_path / "x")
    path = str(tmp_path / "x" / "checkpoints" / "step-00000002.pt")
    branch = run(tmp_path, name="y", resume=path)
    assert branch.weights_digest == whole.weights_digest
    assert events(tmp_path, "y")[:2] == [("start", 2), ("resume", 2)]
    assert content(tmp_path / "x") == before
    assert look(tmp_path, name="y", resume=path).run_id != look(tmp_path).run_id
    assert run(tmp_path, name="y", resume=path) == branch  # the same command again
    assert not (tmp_path / "y.1").exists()


def test_a_checkpoint_under_any_name_is_found_again(tmp_path):
    whole = run(tmp_path)
    file, manifest = find_checkpoint(tmp_path / "x" / "checkpoints" / "step-00000002.pt")
    shutil.copyfile(file, tmp_path / "mine.pt")
    (tmp_path / "mine.json").write_text(replace(manifest, file="mine.pt").to_text())
    branch = run(tmp_path, name="y", resume=str(tmp_path / "mine.pt"))
    assert branch.weights_digest == whole.weights_digest
    assert events(tmp_path, "y")[:2] == [("start", 2), ("resume", 2)]


def test_a_path_may_change_the_rate_but_not_the_model(tmp_path):
    run(tmp_path, stop=True)
    path = str(tmp_path / "x")
    assert run(tmp_path, name="y", resume=path, optim={"lr": 0.1}).step == 4
    assert run(tmp_path, name="z", resume=path, data={"batch_size": 16}).samples == 128
    for changes, message in (
        ({"model": MLP(4, [6], 2)}, r"1.weight was float32 \(5, 4\), is float32 \(6, 4\)"),
        ({"train_set": data(65)}, "data.train had 64 samples, has 65"),
    ):
        with pytest.raises(RefusedError, match=message):
            run(tmp_path, name="refused", resume=path, **changes)


def test_a_path_into_the_folder_itself_goes_back_there(tmp_path):
    whole = run(tmp_path)
    path = str(tmp_path / "x" / "checkpoints" / "step-00000002.pt")
    again = run(tmp_path, resume=path)
    assert again.weights_digest == whole.weights_digest
    assert events(tmp_path)[:2] == [("start", 2), ("resume", 2)]
    assert (tmp_path / "x.1" / "checkpoints" / "step-00000004.pt").exists()
    assert run(tmp_path, resume=path) == again  # although the path is gone


def test_a_path_that_stopped_goes_on_from_its_own_checkpoints(tmp_path):
    run(tmp_path)
    path = str(tmp_path / "x" / "checkpoints" / "step-00000002.pt")
    run(tmp_path, name="y", resume=path, stop=True)
    assert look(tmp_path, name="y", resume=path).header.step == 3


def test_a_copy_is_on_the_disk_before_anything_builds_on_it(tmp_path, monkeypatch):
    """The real calls, noted by the file or folder that they sync."""
    run(tmp_path, stop=True)
    synced, sync = [], os.fsync

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    look(tmp_path, name="y", resume=str(tmp_path / "x"))
    copies = tmp_path / "y" / "checkpoints"
    inodes = [copies / "step-00000001.pt", copies / "step-00000001.json", copies, copies.parent]
    assert {path.stat().st_ino for path in inodes} <= set(synced)
    assert synced.index(inodes[0].stat().st_ino) < len(synced) - 1
    assert synced[-1] == copies.parent.stat().st_ino


def test_a_copy_that_finds_no_room_leaves_nothing_behind(tmp_path):
    run(tmp_path, stop=True)
    before = content(tmp_path / "x")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # room for the owner note alone
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large; set output_dir"):
            look(tmp_path, name="y", resume=str(tmp_path / "x"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}
    assert [path.name for path in (tmp_path / "y").iterdir()] == [".lock"]
    assert content(tmp_path / "x") == before
    assert look(tmp_path, name="y", resume=str(tmp_path / "x")).header.step == 1


def test_a_start_that_was_killed_as_it_copied_leaves_nothing_for_long(tmp_path):
    run(tmp_path, stop=True)
    code = (
        "import os, sys\n"
        "from ddp_sgd.config import RunConfig\n"
        "from ddp_sgd.distributed.runtime import Runtime\n"
        "from ddp_sgd.engine import resume\n"
        "from ddp_sgd.report.run_folder import claim_run_folder\n"
        "config = RunConfig(output_dir=sys.argv[1], name='y', resume=sys.argv[1] + '/x')\n"
        "resume.sync_file = lambda _: os.kill(os.getpid(), 9)\n"
        "with claim_run_folder(config, Runtime()) as folder:\n"
        "    resume.find_resume_point(config, folder, 0)\n"
    )
    killed = commands.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=WAIT_S)
    assert killed.returncode == -9
    (left,) = tmp_path.glob(".y*")
    assert [path.name for path in left.iterdir()] == ["step-00000001.pt"]
    assert look(tmp_path, name="y", resume=str(tmp_path / "x")).header.step == 1
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


@pytest.mark.parametrize("path", ["gone", "empty", "text"])
def test_a_path_that_leads_nowhere(path, tmp_path):
    run(tmp_path, stop=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("not a checkpoint")
    before = content(tmp_path / "x")
    with pytest.raises(DataError) as caught:
        run(tmp_path, resume=str(tmp_path / path))
    assert caught.value.exit_code == ExitCode.DATA
    assert content(tmp_path / "x") == before


def test_the_model_of_another_run_is_refused_with_a_list(tmp_path):
    run(tmp_path, stop=True)
    with pytest.raises(RefusedError, match="the checkpoint of step 1 is of another run"):
        run(tmp_path, model=MLP(4, [6], 2))
    assert (tmp_path / "x" / "checkpoints" / "step-00000001.pt").exists()
    assert run(tmp_path).step == 4


def test_a_deadline_stops_the_run_in_time(tmp_path):
    resume_point = "2020-01-01T00:00"
    stopped = run(tmp_path, runtime={"deadline": resume_point})
    assert (stopped.exit_code, stopped.step) == (ExitCode.STOPPED, 1)
    (row,) = [r for r in read_journal(tmp_path / "x" / "metrics.jsonl") if r["event"] == "stop"]
    assert row["reason"] == "the deadline is near"
    assert run(tmp_path).step == 4
