"""Other data on a resume are noticed; on several ranks in tests/distributed/test_resume.py."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from saving import header

from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
from ddp_sgd.config import RunConfig
from ddp_sgd.data import InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import rank_consistency
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.rank_consistency import Mark, mark_samples
from ddp_sgd.engine.resume import MARKS as KEY
from ddp_sgd.engine.resume import ResumePoint, refuse_other_data
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.errors import ExitCode, RefusedError
from ddp_sgd.models import MLP

HEADER = header(3)
RESUME_POINT = ResumePoint(run_id=HEADER.run_id, header=HEADER)
SHAPE, INPUT = "the shape of data.train[0]", "the input of data.train[0]"
MARKS = {SHAPE: Mark("float32 of shape (1, 4)"), INPUT: Mark("a mean of 1", 1.0, 1.0)}
HELD_OUT = {"the input of data.eval[0]": Mark("a mean of 5", 5.0, 5.0)}
OTHER = MARKS | {INPUT: Mark("a mean of 2", 2.0, 2.0)}


def saved(marks):
    """What a checkpoint with these marks holds."""
    return {"model": {}, KEY: {name: tuple(mark) for name, mark in marks.items()}}


def refuse(before, now, again=None, resume_point=RESUME_POINT):
    refuse_other_data(resume_point, saved(before), now, lambda: now if again is None else again)


def test_the_same_data_go_on():
    refuse(MARKS, MARKS)
    refuse(MARKS, MARKS | HELD_OUT)
    refuse(MARKS, MARKS | {INPUT: Mark("a mean of 1.001", 1.001, 1.0)})  # another decoder


def test_another_sample_is_named():
    with pytest.raises(RefusedError) as caught:
        refuse(MARKS, OTHER)
    assert caught.value.exit_code == ExitCode.REFUSED == 77
    assert str(caught.value) == (
        "data.train is not what the checkpoint of step 3 was trained on: the input of "
        "data.train[0] was a mean of 1, is a mean of 2; restore the data, choose another name, or "
        "set resume=never to begin at step 0."
    )


def test_what_reads_differently_each_time_is_no_other_data():
    refuse(MARKS, OTHER, again=MARKS)
    refuse(MARKS, OTHER, again={})  # it could not be read the second time


def test_data_are_read_again_only_where_they_differ():
    refuse_other_data(RESUME_POINT, saved(MARKS), MARKS, lambda: pytest.fail("read again"))


def test_what_cannot_be_compared_is_accepted():
    refuse({}, OTHER)  # a checkpoint of an earlier release
    refuse(MARKS, {})  # samples that cannot be read: the step says so
    refuse(MARKS, OTHER, resume_point=ResumePoint(run_id="another", header=HEADER))  # resume=PATH
    refuse(MARKS, OTHER, resume_point=ResumePoint(run_id="another"))


def describe(folder, **changes):
    basis = {"name": "x", "epochs": 2, "wandb": {"mode": "disabled"}, "data": {"batch_size": 8}}
    return RunConfig(output_dir=str(folder), **basis | changes)


def data(scale=1.0, shift=0):
    generator = torch.Generator().manual_seed(1)
    inputs = scale * torch.randn(33, 4, generator=generator)
    return InMemory(inputs, (torch.arange(33) + shift) % 2)


def run(folder, train_set, *, stop=False, model=None, **changes):
    """Five steps per epoch; stopped after the first."""
    request = StopRequest()
    if stop:
        request.ask("the test")
    torch.manual_seed(0)
    return fit(
        describe(folder, **changes),
        Runtime(),
        model=model or MLP(4, [5], 2),
        train_set=train_set,
        stop=request,
    )


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (data(scale=2.0), "the input of data.train[0] was a mean of"),
        (data(shift=1), "the target of data.train[0] was 0, is 1"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_data_of_the_same_length_are_told_apart(finished, other, told, tmp_path):
    run(tmp_path, data(), stop=not finished)
    before = content(tmp_path / "x" / "checkpoints")
    with pytest.raises(RefusedError) as caught:
        run(tmp_path, other)
    assert told in str(caught.value)
    assert content(tmp_path / "x" / "checkpoints") == before
    assert run(tmp_path, data()).status == "finished"


def test_a_run_that_begins_with_a_checkpoint_may_have_other_data(tmp_path):
    """Also when it starts again, before it has saved something of its own and after."""
    run(tmp_path, data(), stop=True)
    path = str(tmp_path / "x")
    other = data(scale=2.0)
    with pytest.raises(Exception, match="fails on inputs"):
        broken = InMemory(torch.zeros(33, 5), torch.zeros(33).long())
        run(tmp_path, broken, name="y", resume=path)
    assert run(tmp_path, other, name="y", resume=path, stop=True).step == 2
    with pytest.raises(RefusedError, match="the input of data.train"):
        run(tmp_path, data(), name="y", resume=path)
    assert run(tmp_path, other, name="y", resume=path).step == 10


def test_a_checkpoint_without_marks_is_accepted(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rank_consistency, "mark_samples", lambda *args: {})
        run(tmp_path, data(), stop=True)
    assert KEY not in read_tensors(find_checkpoint(tmp_path / "x")[0])
    assert run(tmp_path, data(scale=2.0)).status == "finished"


class Drawing(MLP):
    """Draws numbers from every global generator in a step."""

    def __init__(self):
        super().__init__(4, [5], 2)

    def forward(self, inputs):
        noise = torch.rand(1) + random.random() + np.random.random()
        return super().forward(inputs * (1 + 0.1 * noise.float()))


class Augmented:
    """Read sample by sample, each with random numbers."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = torch.as_tensor(inputs), torch.as_tensor(targets)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.inputs[index] + random.random() + torch.rand(4), self.targets[index]


@pytest.mark.parametrize("kind", [InMemory, Augmented])
def test_reading_the_marks_changes_nothing_that_a_run_draws(kind, tmp_path, monkeypatch):
    def digest(name):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(1)
        train_set = kind(data().inputs, data().targets)
        return run(tmp_path, train_set, name=name, model=Drawing()).weights_digest

    marked = digest("marked")
    monkeypatch.setattr(rank_consistency, "mark_samples", lambda *args: {})
    assert digest("plain") == marked


def test_marks_survive_a_checkpoint(tmp_path):
    run(tmp_path, data(), stop=True)
    found = read_tensors(find_checkpoint(tmp_path / "x")[0])[KEY]
    marks = mark_samples(data(), "data.train", 0)
    assert {name: Mark(*values) for name, values in found.items()} == marks
    assert {type(values) for values in found.values()} == {tuple}  # a reader takes no class of ours
    assert {name[-3:] for name in found} == {"[0]", "16]", "32]"}
    header = replace(HEADER, run_id="x")
    refuse_other_data(ResumePoint(run_id="x", header=header), {KEY: found}, marks, dict)
