"""Runs whose length is in steps, and curves, on real ranks: exact, every sample once, resumable."""

import json

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import TensorDataset
from user_code import decay_by_halves

from ddp_sgd.checkpointing.store import CheckpointFolder
from ddp_sgd.config import RunConfig
from ddp_sgd.data.sampler import TrainSampler
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.step import Stepper
from ddp_sgd.errors import ConfigError, RefusedError
from ddp_sgd.report.journal import read_journal

SAMPLES = 100  # 7 steps per epoch of 16 samples, the last of 4
X = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1))
Y = torch.arange(SAMPLES) % 4
CURVE = {"class_path": "user_code.decay_by_halves", "call": False}
EVERYTHING = {
    "schedule": {
        "by": "epoch",
        "warmup": "shift",
        "warmup_steps": 8,
        "warmup_start": 0.1,
        "momentum_start": 0.5,
        "curve": CURVE,
    },
    "eval": {"every_steps": 4},
}


class Looks:
    """A stop request in the step with this number of this attempt, where each step looks once."""

    def __init__(self, steps):
        self.steps = steps

    @property
    def reason(self):
        return "enough" if self.steps <= 0 else None


def train(runtime, folder, stop_after=None, *, batch=8, accumulate=1, workers=0, **changes):
    """One attempt of a run; gives how it ended, and the indices that this rank trained."""
    torch.manual_seed(0)
    dropout = changes.pop("dropout", 0.3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
    basis = {
        "name": "x",
        "output_dir": str(folder),
        "wandb": {"mode": "disabled"},
        "log": {"every_steps": 1},
        "data": {"batch_size": batch, "accumulate": accumulate, "workers": workers},
        "optim": {"reference_batch": 16},
    }
    config = RunConfig.model_validate({"steps": 17} | basis | changes)
    data, held_out = TensorDataset(X, Y), TensorDataset(X[:20], Y[:20])
    trained, step, stop = [], Stepper.step, Looks(stop_after or 10**9)

    def listed(stepper, batches, lr):
        trained.extend((batches.step, each.indices[: each.samples].tolist(), float(lr))
                       for each in batches.micro_batches)  # fmt: skip
        stop.steps -= 1
        return step(stepper, batches, lr)

    Stepper.step = listed
    try:
        result = fit(config, runtime, model=model, train_set=data, eval_set=held_out, stop=stop)
    finally:
        Stepper.step = step
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    return result.as_row(), trained, weights


def order(epoch):
    sampler = TrainSampler(SAMPLES, global_batch=16, batch_size=16, rank=0, world_size=1)
    sampler.set_epoch(epoch)
    return sampler.permutation().tolist()


def by_step(ranks):
    steps = {}
    for _, trained, _ in ranks:
        for step, indices, _ in trained:
            steps.setdefault(step, []).extend(indices)
    return [sorted(steps[step]) for step in sorted(steps)]


LAYOUTS = [(1, {"accumulate": 2}), (2, {}), (2, {"batch": 4, "accumulate": 2, "workers": 2})]


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_the_last_epoch_ends_with_the_run_and_its_samples_are_the_first_of_the_order(
    world_size, layout, tmp_path
):
    ranks = run_ranks(world_size, _train, tmp_path, None, layout)
    cuts = [(epoch, at) for epoch in range(3) for at in range(0, SAMPLES, 16)][:17]
    assert by_step(ranks) == [sorted(order(epoch)[at : at + 16]) for epoch, at in cuts]
    result = ranks[0][0]
    assert (result["status"], result["step"], result["samples"]) == ("finished", 17, 248)
    assert result["epoch"] == 2 + 48 / 100
    assert result["eval/count"] == 20
    plan = json.loads((tmp_path / "x" / "plan.json").read_text())
    assert (plan["total_steps"], plan["total_samples"], plan["epochs"]) == (17, 248, 3)
    rows = read_journal(tmp_path / "x" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "eval"] == [7, 14, 17]
    assert [row["step"] for row in rows if row["event"] == "checkpoint"] == [7, 14, 17]


def _train(runtime, folder, stop_after, changes):
    return train(runtime, folder, stop_after, **changes)


@pytest.mark.parametrize("sections", [{}, EVERYTHING, {"schedule": {"name": "linear"}}])
def test_ranks_and_micro_batches_take_the_same_steps(sections, tmp_path):
    """float32: 17 steps add up rounding errors of 2^-24, tenfold through a momentum of 0.9."""
    ends = []
    for number, (world_size, layout) in enumerate(LAYOUTS):
        changes = {"dropout": 0.0, **layout, **sections}
        ends.append(run_ranks(world_size, _train, tmp_path / str(number), None, changes)[0])
    rates = [{step: rate for step, _, rate in end[1]} for end in ends]
    assert len(rates[0]) == 17
    assert rates[0] == rates[1] == rates[2]
    for _, _, weights in ends:
        assert abs(weights - ends[0][2]).max() < 10 * 17 * 2**-24 * abs(weights).max()


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_stopped_and_resumed_a_run_of_some_steps_ends_with_the_same_bits(
    world_size, layout, tmp_path
):
    """In the ramp, at the edge of an epoch, and in the last one, of which only a part is run."""
    changes = {**layout, **EVERYTHING}
    whole = run_ranks(world_size, _train, tmp_path / "whole", None, changes)[0][0]
    done = 0
    for stop in (3, 7, 15):
        part = run_ranks(world_size, _train, tmp_path / "parts", stop - done, changes)[0][0]
        assert (part["status"], part["step"]) == ("stopped", stop)
        done = stop
    resumed = run_ranks(world_size, _train, tmp_path / "parts", None, changes)[0][0]
    assert resumed["weights_digest"] == whole["weights_digest"]
    kept = [
        [
            (row["event"], row["step"], row.get("train/loss"), row.get("train/lr"))
            for row in read_journal(tmp_path / name / "x" / "metrics.jsonl")
            if row["event"] in ("train", "eval")
        ]
        for name in ("whole", "parts")
    ]
    assert kept[0] == kept[1]
    assert [step for event, step, *_ in kept[0] if event == "eval"] == [4, 8, 12, 16, 17]


def test_rate_and_momentum_of_each_step_are_those_of_the_plan(tmp_path, monkeypatch):
    """Peak 0.1 for 16 samples; epochs begin at 0, 7 and 14; the curve has 9 steps after the 8."""
    momenta, step = [], Stepper.step

    def noted(stepper, batches, lr):
        momenta.append(stepper.momentum)
        return step(stepper, batches, lr)

    monkeypatch.setattr(Stepper, "step", noted)
    changes = {**EVERYTHING, "optim": {"lr": 0.1, "reference_batch": 16}, "batch": 16}
    _, trained, _ = train(Runtime(), tmp_path, **changes)
    for number, (taken, _, rate) in enumerate(trained):
        assert taken == number
        begin = number // 7 * 7
        factor = (0.1 + 0.9 * min(1, begin / 8)) * decay_by_halves(max(0, begin - 8), 7, 9)
        assert rate == pytest.approx(0.1 * factor, rel=1e-12)
        assert momenta[number] == pytest.approx(0.5 + 0.4 * min(1, begin / 8), rel=1e-12)


def test_ranks_of_their_own_average_at_the_end_of_a_run_within_an_epoch(tmp_path):
    """Else their weights would differ, which the end of a run refuses."""
    changes = {"parallel": {"local_sgd": {"start_step": 2, "period": 5}}}
    ends = run_ranks(2, _train, tmp_path, None, changes)
    assert {end[0]["step"] for end in ends} == {17}
    assert (ends[0][2] == ends[1][2]).all()


def go_on(folder, **changes):
    result, trained, _ = train(Runtime(), folder, **{"batch": 16} | changes)
    return result["step"], len(trained)


def test_more_steps_go_on_and_fewer_are_refused(tmp_path):
    assert go_on(tmp_path, steps=10) == (10, 10)
    assert go_on(tmp_path, steps=10) == (10, 0)  # the result is given again
    assert go_on(tmp_path, steps=17) == (17, 7)
    with pytest.raises(RefusedError, match="steps was 17, is 16; restore"):
        go_on(tmp_path, steps=16)


def test_epochs_may_follow_on_steps_and_steps_on_epochs_if_they_are_not_fewer(tmp_path):
    assert go_on(tmp_path, steps=10) == (10, 10)
    with pytest.raises(RefusedError, match="steps was 10, epochs is 1; restore"):
        go_on(tmp_path, steps=None, epochs=1)
    assert go_on(tmp_path, steps=None, epochs=2) == (14, 4)
    with pytest.raises(RefusedError, match="epochs was 2, steps is 13; restore"):
        go_on(tmp_path, steps=13)
    assert go_on(tmp_path, steps=15) == (15, 1)


def test_the_best_of_the_evaluations_by_steps_is_kept(tmp_path):
    train(Runtime(), tmp_path, batch=16, eval={"every_steps": 4}, checkpoint={"keep": 1})
    rows = read_journal(tmp_path / "x" / "metrics.jsonl")
    scores = {row["step"]: row["eval/accuracy"] for row in rows if row["event"] == "eval"}
    assert list(scores) == [4, 8, 12, 16, 17]
    saved = CheckpointFolder(tmp_path / "x" / "checkpoints")
    steps = [entry.header.step for entry in saved.manifests()]
    best = max(scores.values())
    assert {scores[step] for step in steps if step != 17} in ({best}, set())
    assert scores[int((saved.path / "best").resolve().stem.partition("-")[2])] == best


@pytest.mark.parametrize("curve", ["BadCurve", "Counting"])
def test_a_bad_curve_ends_a_run_before_its_first_step(curve, tmp_path):
    bad = {"class_path": f"user_code.{curve}"}
    with pytest.raises(ConfigError, match=r"schedule\.curve is "):
        train(Runtime(), tmp_path, schedule={"curve": bad})
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_another_curve_on_a_resume_is_refused(tmp_path):
    train(Runtime(), tmp_path, 3, schedule={"curve": CURVE})
    other = {"class_path": "user_code.Triangle"}
    with pytest.raises(RefusedError, match=r"schedule\.curve\.class_path was user_code\.decay_by"):
        train(Runtime(), tmp_path, schedule={"curve": other})
