"""What cannot be trained exactly is refused before the first step, on every rank, with a remedy."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from models import networks, samples
from models.training import (
    Case,
    describe,
    distance,
    micro_batches,
    outcome_of,
    reference,
    train,
)
from ranks import run_ranks
from torch import nn
from torch.nn import functional

from ddp_sgd.distributed.error_propagation import LocalErrorPropagation
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import UserError
from ddp_sgd.optim.sgd import SGD

ROWS, IMAGES = samples.rows(samples.EVEN), samples.images(samples.EVEN)
MLP = {"model": networks.mlp, "data": ROWS}
ALONE, TOGETHER = "one rank", "two ranks"


def normalized():
    return networks.mlp(nn.BatchNorm1d(8))


# By name: the case, where it is refused, and what the message says.
CASES = {
    "parameters in the loss": (
        Case(**MLP, loss=networks.ArcFaceLoss),
        (ALONE, TOGETHER),
        ("loss is ArcFaceLoss with the parameter centers", "make it a part of the model"),
    ),
    "sum, a module": (
        Case(**MLP, loss=lambda: nn.CrossEntropyLoss(reduction="sum")),
        (ALONE, TOGETHER),
        ("reduction is sum", "leave it at mean"),
    ),
    "sum, a partial": (
        Case(**MLP, loss=lambda: partial(functional.cross_entropy, reduction="sum")),
        (ALONE, TOGETHER),
        ("sum", "mean"),
    ),
    "sum, a function": (
        Case(**MLP, loss=lambda: networks.summed),
        (ALONE, TOGETHER),
        ("loss is summed, which gives the sum over the samples", "let it give their mean"),
    ),
    "sum, of a model output": (
        Case(model=networks.Encoder, data=samples.tokens, loss=lambda: networks.summed_of_logits),
        (ALONE, TOGETHER),
        ("loss is summed_of_logits, which gives the sum", "let it give their mean"),
    ),
    "sum, of a dataclass": (
        Case(
            model=lambda: networks.Encoder(networks.Scores),
            data=samples.tokens,
            loss=lambda: networks.summed_of_logits,
        ),
        (ALONE,),
        ("loss is summed_of_logits, which gives the sum", "let it give their mean"),
    ),
    "a loss of each sample": (
        Case(**MLP, loss=lambda: networks.each_alone),
        (ALONE,),
        ("which gives float64 of shape (8,)", "let it give the mean over samples"),
    ),
    "a loss in a mapping": (
        Case(**MLP, loss=lambda: networks.as_mapping),
        (ALONE, TOGETHER),
        ("loss is as_mapping, which gives float64 of shape", "for each; let it give a tensor"),
    ),
    "a loss without a gradient": (
        Case(**MLP, loss=lambda: networks.detached),
        (ALONE, TOGETHER),
        ("loss is detached, whose value does not depend on a parameter", "detach()"),
    ),
    "class weights that differ": (
        Case(**MLP, loss=networks.PerRank),
        (TOGETHER,),
        ("weight", "the same class weights"),
    ),
    "sparse embedding": (
        Case(model=lambda: networks.OfWords(sparse=True), data=samples.texts),
        (ALONE, TOGETHER),
        ("model.embedding is an Embedding with sparse gradients", "set sparse=False"),
    ),
    "embedding with max_norm": (
        Case(model=lambda: networks.OfWords(max_norm=1.0), data=samples.texts),
        (TOGETHER,),
        ("model.embedding is an Embedding with max_norm=1.0", "set max_norm=None"),
    ),
    "weights that are clipped": (
        Case(model=lambda: networks.Clipped(by_data=False), data=ROWS),
        (TOGETHER,),
        ("model.weight is changed by the forward pass", "or train one rank"),
    ),
    "weights that are given clipped data": (
        Case(model=lambda: networks.Clipped(by_data=True), data=ROWS),
        (TOGETHER,),
        ("model.weight is changed by the forward pass", "or train one rank"),
    ),
    "weights that are replaced": (
        Case(model=networks.Replaced, data=ROWS),
        (ALONE, TOGETHER),
        ("model.weight is made by the forward pass", "make it in __init__"),
    ),
    "a layer that the first pass makes": (
        Case(model=networks.MadeInForward, data=ROWS),
        (ALONE, TOGETHER),
        ("model.last.weight is made by the forward pass", "torch.nn.LazyLinear"),
    ),
    "a saved buffer that a pass registers": (
        Case(model=lambda: networks.Centered(registers=False), data=ROWS),
        (ALONE, TOGETHER),
        ("model.center is registered by the forward pass", "call register_buffer in __init__"),
    ),
    "a sparse buffer that is saved": (
        Case(model=networks.OfGraph, data=ROWS),
        (ALONE,),
        ("the state model.graph has the layout sparse_coo", "pass persistent=False"),
    ),
    "weights with gaps": (
        Case(model=networks.with_gaps, data=ROWS, dtype=None),
        (ALONE,),
        ("model.0.weight is of shape (8, 6) with strides (12, 2)", ".contiguous()"),
    ),
    "DataParallel": (
        Case(model=lambda: nn.DataParallel(networks.mlp()), data=ROWS),
        (ALONE,),
        ("model is wrapped in DataParallel", "give the module itself"),
    ),
    "the device meta": (
        Case(model=lambda: networks.mlp().to("meta"), data=ROWS),
        (ALONE,),
        ("model.0.weight is on the device meta", "build the model on the CPU"),
    ),
    "SyncBatchNorm on a CPU": (
        Case(model=lambda: nn.SyncBatchNorm.convert_sync_batchnorm(normalized()), data=ROWS),
        (TOGETHER,),
        ("SyncBatchNorm", "use BatchNorm, or GPUs"),
    ),
    "GoogLeNet": (
        Case(
            model=networks.googlenet,
            data=samples.images(4, 32, torch.float32, channels=3),
            dtype=None,
        ),
        (ALONE,),
        ("the model gives a GoogLeNetOutputs of (logits: ", "in training mode", "the loss"),
    ),
    "auxiliary outputs": (
        Case(model=networks.Inception, data=ROWS),
        (ALONE, TOGETHER),
        ("the model gives a tuple of (float64 of shape (", "in training mode", "the loss"),
    ),
    "a model that fails in training": (
        Case(model=networks.FailsInTraining, data=ROWS),
        (ALONE, TOGETHER),
        ("model is FailsInTraining, which fails on inputs of float64", "in training mode"),
    ),
    "parameters without a gradient": (
        Case(model=networks.Unused, data=ROWS),
        (TOGETHER,),
        ("left parameters of the model without a gradient", "find_unused_parameters=true"),
    ),
    "weights that are all frozen": (
        Case(
            model=lambda: networks.mlp().requires_grad_(False),
            data=ROWS,
        ),
        (ALONE,),
        ("without a parameter to train", "require gradients"),
    ),
}


def refuse_all(runtime, folder):
    runtime = replace(
        runtime, error_propagation=LocalErrorPropagation()
    )  # each rank keeps its own error
    said = {}
    for number, (name, (case, where, _)) in enumerate(CASES.items()):
        if TOGETHER in where:
            steps = count_steps(case, runtime, folder / str(number))
            said[name] = steps
    return said


def count_steps(case, runtime, folder):
    """Train; give the exit code, the message and the steps taken before."""
    taken, step = [], SGD.step

    def counted(*arguments):
        taken.append(1)
        step(*arguments)

    SGD.step = counted
    try:
        train(case, runtime, folder)
    except UserError as error:
        return int(error.exit_code), str(error), len(taken)
    finally:
        SGD.step = step
    return 0, "trained", len(taken)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, refuse_all, tmp_path_factory.mktemp("ranks"))


def named(where):
    return [name for name, case in CASES.items() if where in case[1]]


def compare(name, found):
    code, message, steps = found
    assert (code, steps) == (64, 0), message
    for words in CASES[name][2]:
        assert words in message
    assert "; " in message


@pytest.mark.parametrize("name", named(ALONE))
def test_one_rank(name, tmp_path):
    compare(name, count_steps(CASES[name][0], Runtime(), tmp_path))


@pytest.mark.parametrize("name", named(TOGETHER))
def test_two_ranks(name, two_ranks):
    for rank in two_ranks:
        compare(name, rank[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] == (TOGETHER,)])
def test_one_rank_trains_what_only_several_cannot(name, tmp_path):
    case = CASES[name][0]
    outcome = train(case, Runtime(), tmp_path)
    model = reference(case, micro_batches(case, describe(case, tmp_path, 1), 1))
    if name.startswith("embedding"):
        model(case.batch(range(samples.SAMPLES))[0])  # evaluation renormalizes once more
    if name.startswith("weights"):
        model(case.batch(range(samples.EVEN))[0])
    assert distance(outcome.parameters, outcome_of(model).parameters) <= 1e-12
