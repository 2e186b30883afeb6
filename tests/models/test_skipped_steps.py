"""A step whose gradient is not finite leaves nothing behind: weights, momentum, buffers and
scores are those of a loop that leaves it out, and keeps number, seed and rate of the later ones.
"""

from functools import cache

import pytest
import torch
from models import networks, samples
from models.training import (
    Case,
    Outcome,
    describe,
    distance,
    micro_batches,
    outcome_of,
    reference,
    score_of,
    train,
    train_all,
)
from ranks import run_ranks
from torch import nn

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.optim.schedule import build_schedule
from ddp_sgd.plan import make_plan

TOLERANCE = 1e-12  # as in test_exact_models.py
BROKEN, EPOCHS = 5, 2
RUN = {
    "epochs": EPOCHS,
    "data": {"batch_size": 4},
    "schedule": {"name": "linear"},
    "eval": {"every_epochs": EPOCHS},
}


def with_one_broken(whole):
    """Samples of which one is not a number; three steps of 8, on two ranks, or six of 4."""

    def build():
        data = whole()
        inputs, target = data.samples[BROKEN]
        data.samples[BROKEN] = (torch.full_like(inputs, torch.nan), target)
        return data

    return build


ROWS = samples.rows(24)


def case(model, whole=ROWS, **options):
    return Case(model=model, data=with_one_broken(whole), held_out=whole, changes=RUN, **options)


def normalized():
    return networks.convnet(nn.BatchNorm2d(4), nn.Dropout(0.2))


CASES = {
    "BatchNorm and dropout": case(normalized, samples.images(24)),
    "codebook in place": case(lambda: networks.Codebook("in place")),
    "codebook assigned": case(lambda: networks.Codebook("assigned")),
    "codebook given data": case(lambda: networks.Codebook("data")),
    "buffer that begins as None": case(networks.Centered),
    "spectral_norm": case(networks.spectral),
    "noise of numpy": case(lambda: networks.Drawing("numpy")),
    "odd buffers": case(networks.OddBuffers),
    "quantized": case(networks.quantized, samples.rows(24, torch.float32), dtype=None),
}
SCORED_BY_CHUNKS = {"quantized"}
"""Observers run in evaluation as well, and see a chunk."""


@cache
def expected_of(name, world_size):
    """Leave out the steps with the broken sample."""
    chosen = CASES[name]
    config = describe(chosen, "folder", world_size)
    plan = make_plan(config, samples=24, world_size=world_size)
    schedule = build_schedule(config.schedule, plan)
    steps = micro_batches(chosen, config, world_size)
    broken = {
        number
        for number, ranks in enumerate(steps)
        if any(BROKEN in indices for rank in ranks for indices in rank)
    }
    assert len(broken) == EPOCHS
    assert max(broken) < len(steps) - 1  # there are later ones
    model = reference(
        chosen, steps, rate=lambda step: plan.peak_lr * schedule(step), skipped=broken
    )
    return outcome_of(model), score_of(chosen, model)


def compare(name, outcome, world_size):
    expected, score = expected_of(name, world_size)
    tolerance = TOLERANCE if CASES[name].dtype else 1e-5  # as in test_batch_models.py
    assert distance(outcome.parameters, expected.parameters) <= tolerance
    assert distance(outcome.buffers, expected.buffers) <= tolerance
    if name not in SCORED_BY_CHUNKS:
        assert outcome.scores["eval/loss"] == pytest.approx(score, rel=tolerance)
    assert outcome.scores["eval/count"] == 24


def work(runtime, folder):
    stop = StopRequest()
    stop.ask("the test")
    return {
        "flat": train_all(runtime, folder / "flat", CASES),
        "ddp": train_all(runtime, folder / "ddp", CASES, parallel={"replica": "ddp"}),
        "stopped": train_all(runtime, folder / "parts", CASES, stop=stop),
        "resumed": train_all(runtime, folder / "parts", CASES),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name, tmp_path):
    compare(name, train(CASES[name], Runtime(), tmp_path), 1)


@pytest.mark.parametrize("way", ["flat", "ddp", "resumed"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name, way, two_ranks):
    first, second = (Outcome.unpack(rank[way][name]) for rank in two_ranks)
    assert (first.digest, first.scores) == (second.digest, second.scores)
    compare(name, first, 2)


@pytest.mark.parametrize("name", CASES)
def test_stop_and_resume_give_the_same_bits(name, two_ranks):
    whole, resumed = (Outcome.unpack(two_ranks[0][way][name]) for way in ("flat", "resumed"))
    assert resumed.digest == whole.digest
