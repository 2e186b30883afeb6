"""Lazy models, narrow number types, models of torchvision, and data in HDF5 files."""

from dataclasses import replace
from functools import partial

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
    whole_batches,
)
from ranks import run_ranks

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.seeds import seed_for

SMALL_IMAGES = samples.images(samples.EVEN, dtype=torch.float32)
LAZY = {
    "lazy": Case(model=networks.lazy_convnet, data=SMALL_IMAGES, dtype=None),
    "lazy BatchNorm": Case(model=networks.lazy_normalized, data=SMALL_IMAGES, dtype=None),
}
# A float32 sum of k terms in another order differs by about sqrt(k) units of 6e-8, with k below
# 1e3; three steps through a momentum of 0.9 multiply that by less than 10.
FLOAT32 = 2e-5


def materialized(case):
    """Give lazy modules the weights that follow from the seed of a run."""
    model = case.model().eval()
    torch.manual_seed(seed_for("weights", 0))
    with torch.no_grad():
        model(case.batch([0])[0])
    return model.train()


def live_lazily(runtime, folder):
    stop = StopRequest()
    stop.ask("the test")
    whole = train_all(runtime, folder / "whole", LAZY)
    stopped = train_all(runtime, folder / "parts", LAZY, stop=stop)
    resumed = train_all(runtime, folder / "parts", LAZY)
    return {"whole": whole, "stopped": stopped, "resumed": resumed}


@pytest.fixture(scope="module")
def lazy_ranks(tmp_path_factory):
    return run_ranks(2, live_lazily, tmp_path_factory.mktemp("lazy"))


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("world_size", [1, 2])
def test_lazy_models_get_the_weights_of_the_seed(name, world_size, lazy_ranks, tmp_path):
    case = LAZY[name]
    if world_size == 1:
        outcome = train(case, Runtime(), tmp_path)
    else:
        outcome, other = (Outcome.unpack(rank["whole"][name]) for rank in lazy_ranks)
        assert outcome.digest == other.digest
    steps = micro_batches(case, describe(case, tmp_path, world_size), world_size)
    known = replace(case, model=partial(materialized, case))
    model = reference(known, steps)
    assert distance(outcome.parameters, outcome_of(model).parameters) <= FLOAT32
    assert distance(outcome.buffers, outcome_of(model).buffers) <= FLOAT32
    assert outcome.scores["eval/loss"] == pytest.approx(score_of(case, model), rel=FLOAT32)


@pytest.mark.parametrize("name", LAZY)
def test_lazy_models_stop_and_resume(name, lazy_ranks):
    whole, stopped, resumed = (
        Outcome.unpack(lazy_ranks[0][way][name]) for way in ("whole", "stopped", "resumed")
    )
    assert (stopped.status, resumed.status) == ("stopped", "finished")
    assert resumed.digest == whole.digest != stopped.digest
    assert resumed.scores == whole.scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers(dtype, tmp_path):
    """The same micro-batches in the same order give the same bits, but for the step itself.

    The fused kernel rounds the sum of decay, momentum and step once, torch.optim's loop after each
    operation: three steps of three roundings differ by less than 16 units of the type.
    """
    case = Case(model=networks.mlp, data=samples.rows(8, dtype), dtype=dtype)
    outcome = train(case, Runtime(), tmp_path, accumulate=2)
    steps = micro_batches(case, describe(case, tmp_path, 1, accumulate=2), 1)
    expected = outcome_of(reference(case, steps))
    assert distance(outcome.parameters, expected.parameters) <= 16 * torch.finfo(dtype).eps
    assert distance(outcome.parameters, outcome_of(case.build_model()).parameters) > 1e-3


def test_googlenet_with_a_loss_of_all_its_outputs(tmp_path):
    case = Case(
        model=networks.googlenet,
        data=samples.images(4, 32, torch.float32, channels=3),
        loss=lambda: networks.with_auxiliary,
        dtype=None,
        changes={"epochs": 1},
    )
    outcome = train(case, Runtime(), tmp_path)
    steps = micro_batches(case, describe(case, tmp_path, 1), 1)
    model = reference(case, steps)
    expected = outcome_of(model)
    assert outcome.parameters.keys() == expected.parameters.keys()
    assert distance(outcome.parameters, expected.parameters) <= FLOAT32
    assert distance(outcome.buffers, expected.buffers) <= FLOAT32
    assert outcome.scores["eval/loss"] == pytest.approx(score_of(case, model), rel=1e-4)
    assert "eval/accuracy" in outcome.scores


def stored(folder):
    path = folder / "samples.h5"
    return Case(model=networks.mlp, data=partial(samples.Stored, path))


def train_stored(runtime, folder):
    case = stored(folder)
    return {
        workers: train(
            case, runtime, folder / str(workers), accumulate=2, data={"workers": workers}
        ).pack()
        for workers in (0, 1)
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_samples_in_an_hdf5_file(world_size, tmp_path):
    samples.store(tmp_path / "samples.h5")
    case = stored(tmp_path)
    model = reference(case, whole_batches(case))
    for rank in run_ranks(world_size, train_stored, tmp_path):
        for packed in rank.values():
            outcome = Outcome.unpack(packed)
            assert distance(outcome.parameters, outcome_of(model).parameters) <= 1e-12
            assert outcome.scores["eval/loss"] == pytest.approx(score_of(case, model), rel=1e-12)
            assert outcome.scores["eval/count"] == samples.SAMPLES
