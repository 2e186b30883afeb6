"""Models whose step does not depend on the split: each takes the step of plain torch, on the whole
batch in one process, on one rank and on two.
"""

from functools import cache, partial

import pytest
import torch
from models import networks, samples
from models.networks import CLASSES, WIDTH
from models.training import (
    Case,
    Outcome,
    distance,
    outcome_of,
    reference,
    score_of,
    train,
    train_all,
    whole_batches,
)
from ranks import run_ranks
from torch import nn
from torch.nn import functional

from ddp_sgd.distributed.runtime import Runtime

ROWS, IMAGES = samples.rows(), samples.images()
# A float64 sum of k terms in another order differs by about sqrt(k) units of 1.1e-16; here k is
# below 1e4, and three steps through a momentum of 0.9 multiply that by less than 10.
TOLERANCE = 1e-12


def ctc(outputs, targets):
    symbols, lengths = targets
    frames = torch.full((len(lengths),), len(outputs))
    return functional.ctc_loss(outputs, symbols, frames, lengths)


def gaussian(outputs, targets):
    mean, spread = outputs.chunk(2, dim=1)
    return functional.gaussian_nll_loss(mean, targets, functional.softplus(spread) + 0.1)


def positionally(model, inputs):
    return model(*inputs)


def by_keyword(model, inputs):
    return model(**inputs)


CLASS_WEIGHTS = torch.tensor([0.1, 1.0, 3.0, 0.5], dtype=torch.float64)
UNET = {"model": networks.UNet, "data": samples.masks}
UNKNOWN = partial(functional.cross_entropy, ignore_index=255)

CASES = {
    # Memory layout and storage of parameters
    "channels_last": Case(model=networks.channels_last, data=IMAGES),
    "LSTM that flattens": Case(model=networks.Recurrent, data=samples.sequences()),
    "GRU": Case(model=lambda: networks.Recurrent(nn.GRU), data=samples.sequences()),
    "packed sequences": Case(
        model=networks.OfSentences, data=samples.sentences, collate=samples.Pack
    ),
    "moving storage": Case(model=networks.Moving, data=ROWS),
    "odd parameters": Case(model=networks.OddParameters, data=ROWS),
    "complex weights": Case(model=networks.Complex, data=ROWS, dtype=None),
    "attention": Case(model=networks.Attention, data=samples.sequences()),
    # Parametrizations, and parts that are shared, frozen, compiled, lazy
    "weight_norm": Case(model=networks.weight_normalized, data=ROWS),
    "parametrized weight_norm": Case(model=networks.weight_parametrized, data=ROWS),
    "orthogonal": Case(model=networks.orthogonal, data=ROWS),
    "parametrized": Case(model=networks.parametrized, data=ROWS),
    "tied weights": Case(model=networks.Tied, data=samples.texts),
    "frozen backbone": Case(model=networks.frozen_backbone, data=ROWS),
    "low rank": Case(model=networks.LowRank, data=ROWS),
    "frozen BatchNorm": Case(model=networks.Frozen, data=IMAGES),
    "frozen parts": Case(model=networks.frozen_by_parts, data=IMAGES),
    "compiled": Case(model=networks.compiled, data=ROWS),
    "scripted": Case(model=networks.scripted, data=ROWS),
    "checkpointed": Case(model=lambda: networks.Checkpointed(use_reentrant=False), data=ROWS),
    "reentrant": Case(model=lambda: networks.Checkpointed(use_reentrant=True), data=ROWS),
    "straight-through": Case(model=networks.Binary, data=ROWS),
    "derivative in the model": Case(
        model=networks.Energy, data=samples.numbers(), loss=lambda: networks.of_energy
    ),
    # Losses
    "focal, a subclass": Case(model=networks.mlp, data=ROWS, loss=networks.FocalCrossEntropy),
    "focal, a module": Case(model=networks.mlp, data=ROWS, loss=networks.FocalModule),
    "focal, a function": Case(model=networks.mlp, data=ROWS, loss=lambda: networks.focal),
    "class weights": Case(
        model=networks.mlp, data=ROWS, loss=lambda: nn.CrossEntropyLoss(CLASS_WEIGHTS)
    ),
    "label smoothing": Case(
        model=networks.mlp, data=ROWS, loss=lambda: nn.CrossEntropyLoss(label_smoothing=0.1)
    ),
    "probabilities": Case(model=networks.mlp, data=samples.shares),
    "U-Net, a module": Case(**UNET, loss=lambda: nn.CrossEntropyLoss(ignore_index=255)),
    "U-Net, a function": Case(**UNET, loss=lambda: UNKNOWN),
    "U-Net, class weights": Case(
        **UNET, loss=lambda: nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=255)
    ),
    "U-Net, Dice": Case(model=networks.UNet, data=samples.full_masks, loss=networks.Dice),
    "several labels": Case(
        model=networks.mlp,
        data=samples.tags,
        loss=lambda: nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS),
    ),
    "multi-label margin": Case(
        model=networks.mlp, data=samples.tags, loss=nn.MultiLabelSoftMarginLoss
    ),
    "multi-class margin": Case(model=networks.mlp, data=ROWS, loss=nn.MultiMarginLoss),
    "CTC": Case(
        model=networks.Frames, data=samples.spoken, loss=lambda: ctc, collate=samples.Flatten
    ),
    "Huber": Case(model=networks.mlp, data=samples.numbers(CLASSES), loss=nn.HuberLoss),
    "Gaussian": Case(model=networks.mlp, data=samples.numbers(CLASSES // 2), loss=lambda: gaussian),
    "KL divergence": Case(
        model=lambda: networks.mlp(nn.Tanh()).append(nn.LogSoftmax(dim=1)),
        data=samples.shares,
        loss=lambda: nn.KLDivLoss(reduction="batchmean"),
    ),
    # Inputs and outputs
    "ArcFace in the model": Case(model=networks.ArcFace, data=samples.labelled_pairs),
    "Hugging Face": Case(
        model=networks.Encoder, data=samples.tokens, loss=lambda: networks.of_logits
    ),
    "Hugging Face, own loss": Case(
        model=networks.Encoder,
        data=lambda: samples.tokens(with_labels=True),
        loss=lambda: networks.own_loss,
    ),
    "dataclass": Case(
        model=lambda: networks.Encoder(networks.Scores),
        data=samples.tokens,
        loss=lambda: networks.of_logits,
    ),
    "two outputs": Case(
        model=networks.TwoOutputs, data=ROWS, loss=lambda: networks.with_small_features
    ),
    "auxiliary output": Case(
        model=networks.Inception, data=ROWS, loss=lambda: networks.with_auxiliary
    ),
    "list of samples": Case(model=networks.OfLists, data=samples.sentences, collate=samples.AsList),
    "two inputs": Case(model=networks.Siamese, data=samples.pairs, loss=nn.MSELoss),
    "a mapping": Case(model=networks.OfMapping, data=samples.mappings),
    "keywords": Case(model=networks.OfKeywords, data=samples.mappings),
    "autoencoder": Case(
        model=lambda: nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)),
        data=samples.copies,
        loss=nn.MSELoss,
    ),
}
LAYOUTS = list(CASES)[:8]
"""Those of the first section: other ways of reduction keep gradients in other memory."""
CALLS = dict.fromkeys(("ArcFace in the model", "two inputs"), positionally) | dict.fromkeys(
    ("Hugging Face", "Hugging Face, own loss", "dataclass", "keywords"), by_keyword
)


@cache
def expected_of(name):
    case, call = CASES[name], CALLS.get(name)
    model = reference(case, whole_batches(case), call=call)
    return outcome_of(model), score_of(case, model, call=call)


def compare(name, outcome, *, tolerance=TOLERANCE):
    expected, score = expected_of(name)
    assert distance(outcome.parameters, expected.parameters) <= tolerance
    assert distance(outcome.parameters, outcome_of(CASES[name].build_model()).parameters) > 1e-4
    assert distance(outcome.buffers, expected.buffers) <= tolerance
    assert outcome.scores["eval/loss"] == pytest.approx(score, rel=tolerance)
    assert outcome.scores["eval/count"] == len(CASES[name].data())


def train_them(runtime, folder):
    layouts = {name: CASES[name] for name in LAYOUTS}
    ddp = {"parallel": {"replica": "ddp"}}
    return {
        "flat": train_all(runtime, folder / "flat", CASES, accumulate=2),
        "ddp": train_all(runtime, folder / "ddp", layouts, accumulate=2, **ddp),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, train_them, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name, tmp_path, capsys):
    compare(name, train(CASES[name], Runtime(), tmp_path, accumulate=3))
    assert "trained as a mean" not in capsys.readouterr().out


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_rank_whose_gradients_stay_where_they_are(name, tmp_path):
    compare(name, train(CASES[name], Runtime(), tmp_path, parallel={"replica": "ddp"}))


@pytest.mark.parametrize("wrapper", ["flat", "ddp"])
def test_memory_layouts_that_change_from_step_to_step(wrapper, tmp_path):
    case = Case(model=lambda: networks.Moving(turns=True), data=ROWS)
    outcome = train(case, Runtime(), tmp_path, parallel={"replica": wrapper})
    expected = outcome_of(reference(CASES["moving storage"], whole_batches(case)))
    assert distance(outcome.parameters, expected.parameters) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "way"), [(name, "flat") for name in CASES] + [(name, "ddp") for name in LAYOUTS]
)
def test_two_ranks(name, way, two_ranks):
    first, second = (Outcome.unpack(rank[way][name]) for rank in two_ranks)
    compare(name, first)
    assert first.digest == second.digest
    assert first.scores == second.scores
