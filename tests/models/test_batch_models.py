"""Models that look at a whole micro-batch, or draw numbers: they depend on the split by nature.

Given the same micro-batches and seeds, each takes the step of plain torch; buffers are those of
rank 0; and a run that stops and goes on gives the same bits.
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

ROWS, IMAGES = samples.rows(samples.EVEN), samples.images(samples.EVEN)
TOLERANCE = 1e-12  # as in test_exact_models.py


def norm(**options):
    return lambda: networks.convnet(nn.BatchNorm2d(4, **options))


CASES = {
    "BatchNorm": Case(model=norm(), data=IMAGES),
    "BatchNorm, all steps alike": Case(model=norm(momentum=None), data=IMAGES),
    "BatchNorm without statistics": Case(model=norm(track_running_stats=False), data=IMAGES),
    "InstanceNorm": Case(
        model=lambda: networks.convnet(nn.InstanceNorm2d(4, track_running_stats=True)), data=IMAGES
    ),
    "scripted BatchNorm": Case(model=lambda: networks.scripted(nn.BatchNorm1d(8)), data=ROWS),
    "shared statistics": Case(model=networks.sharing_buffers, data=ROWS),
    "statistics that training reads": Case(model=networks.Renormalized, data=ROWS),
    "spectral_norm": Case(model=networks.spectral, data=ROWS),
    "parametrized spectral_norm": Case(model=networks.spectral_parametrized, data=ROWS),
    "codebook in place": Case(model=lambda: networks.Codebook("in place"), data=ROWS),
    "codebook assigned": Case(model=lambda: networks.Codebook("assigned"), data=ROWS),
    "codebook given data": Case(model=lambda: networks.Codebook("data"), data=ROWS),
    "codebook that is not saved": Case(
        model=lambda: networks.Codebook("assigned", is_saved=False), data=ROWS
    ),
    "buffer that begins as None": Case(model=networks.Centered, data=ROWS),
    "buffer that is not saved, from None": Case(
        model=lambda: networks.Centered(is_saved=False), data=ROWS
    ),
    "buffer that a pass registers": Case(
        model=lambda: networks.Centered(registers=False, is_saved=False), data=ROWS
    ),
    "cache of any length": Case(
        model=networks.Rotary, data=samples.growing, collate=samples.AsList
    ),
    "quantized": Case(model=networks.quantized, data=samples.rows(8, torch.float32), dtype=None),
    "dropout": Case(model=lambda: networks.mlp(nn.Tanh(), nn.Dropout(0.3)), data=ROWS),
    "noise of torch": Case(model=lambda: networks.Drawing("torch"), data=ROWS),
    "noise of numpy": Case(model=lambda: networks.Drawing("numpy"), data=ROWS),
    "noise of random": Case(model=lambda: networks.Drawing("random"), data=ROWS),
    "stochastic depth": Case(model=networks.StochasticDepth, data=ROWS),
    "variational": Case(
        model=networks.Hierarchical, data=samples.copies, loss=lambda: networks.evidence
    ),
    "odd buffers": Case(model=networks.OddBuffers, data=ROWS),
    "triplets": Case(model=networks.mlp, data=ROWS, loss=networks.OfTriplets),
}
SCORED_BY_CHUNKS = {"variational", "triplets", "BatchNorm without statistics", "quantized"}
"""Their score depends on the chunks, or on numbers drawn in evaluation."""


@cache
def expected_of(name, world_size):
    case = CASES[name]
    steps = micro_batches(case, describe(case, "folder", world_size), world_size)
    model = reference(case, steps)
    return outcome_of(model), score_of(case, model)


def compare(name, outcome, world_size):
    case = CASES[name]
    expected, score = expected_of(name, world_size)
    # The quantized model computes in float32, with ranges that are taken to 8 bits.
    tolerance = TOLERANCE if case.dtype else 1e-5
    assert distance(outcome.parameters, expected.parameters) <= tolerance
    assert distance(outcome.parameters, outcome_of(case.build_model()).parameters) > 1e-4
    assert distance(outcome.buffers, expected.buffers) <= tolerance
    assert outcome.scores["eval/count"] == len(case.data())
    if name not in SCORED_BY_CHUNKS:
        assert outcome.scores["eval/loss"] == pytest.approx(score, rel=tolerance)


def work(runtime, folder):
    """Train each case at once, in two lives, and with DistributedDataParallel."""
    stop = StopRequest()
    stop.ask("the test")
    parts = folder / "parts"
    return {
        "flat": train_all(runtime, folder / "flat", CASES),
        "ddp": train_all(runtime, folder / "ddp", CASES, parallel={"replica": "ddp"}),
        "stopped": train_all(runtime, parts, CASES, stop=stop),
        "resumed": train_all(runtime, parts, CASES),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, work, tmp_path_factory.mktemp("ranks"))


def of_ranks(two_ranks, way, name):
    first, second = (Outcome.unpack(rank[way][name]) for rank in two_ranks)
    assert first.digest == second.digest
    assert first.scores == second.scores
    return first


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name, tmp_path, capsys):
    compare(name, train(CASES[name], Runtime(), tmp_path), 1)
    assert ("trained as a mean" in capsys.readouterr().out) == (name == "triplets")


@pytest.mark.parametrize("way", ["flat", "ddp"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name, way, two_ranks):
    compare(name, of_ranks(two_ranks, way, name), 2)


@pytest.mark.parametrize("name", CASES)
def test_stop_and_resume_give_the_same_bits(name, two_ranks):
    whole = of_ranks(two_ranks, "flat", name)
    stopped, resumed = (of_ranks(two_ranks, way, name) for way in ("stopped", "resumed"))
    assert (stopped.status, resumed.status) == ("stopped", "finished")
    assert stopped.digest != whole.digest
    assert resumed.digest == whole.digest
    assert resumed.scores == whole.scores
    assert distance(resumed.buffers, whole.buffers) == 0.0
