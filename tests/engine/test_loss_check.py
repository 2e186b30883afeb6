"""What a loss is, found out by experiment."""

import math
from functools import partial

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional

from ddp_sgd.engine.labels import is_classification
from ddp_sgd.engine.loss_check import examine_loss, find_form, judge_loss, require_same_form
from ddp_sgd.errors import ConfigError
from ddp_sgd.named_losses import ONE_NUMBER, LossForm

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(8, 10, generator=GENERATOR)
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
WEIGHT = torch.randn(10, 10, generator=GENERATOR)


def one_by_one(targets):
    return [targets[number : number + 1] for number in range(len(targets))]


def focal(outputs, targets):
    loss = functional.cross_entropy(outputs, targets, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return focal(outputs, targets)


def arc(embeddings, targets):
    """Labels are classes, but not of what the model gives."""
    weight = functional.normalize(WEIGHT).to(embeddings.dtype)
    cosine = functional.normalize(embeddings) @ weight.T
    return functional.cross_entropy(8 * cosine, targets)


def triplet(embeddings, targets):
    distance = torch.cdist(embeddings, embeddings)
    same = targets[:, None] == targets[None]
    hinge = (distance[:, :, None] - distance[:, None] + 1).relu()
    counted = same[:, :, None] & ~same[:, None] & ~torch.eye(len(targets), dtype=bool)[:, :, None]
    return (hinge * counted).sum() / counted.sum().clamp(min=1)


def one_hot(outputs, targets):
    return ((outputs - functional.one_hot(targets, 10)) ** 2).mean()


def of_probabilities(outputs, targets):
    return functional.nll_loss(outputs.log(), targets)


def picky(outputs, targets):
    known = SCORES.to(outputs.dtype)
    if not all(torch.isclose(known, row, rtol=0.01).all(dim=1).any() for row in outputs):
        raise ValueError("these are not the outputs of a model")
    return functional.cross_entropy(outputs, targets)


def regularized(outputs, targets):
    return functional.cross_entropy(outputs, targets) + WEIGHT.square().mean()


class Centering(nn.Module):
    """A loss with a state, as in self-supervised learning."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(10))

    def forward(self, outputs, targets):
        self.center = 0.5 * self.center + outputs.mean(0)
        return (outputs - self.center).square().mean()


def fails(outputs, targets):
    raise KeyError("x")


CASES = {
    "cross entropy": (functional.cross_entropy, "mean", True),
    "label smoothing": (partial(functional.cross_entropy, label_smoothing=0.1), "mean", True),
    "margins": (nn.MultiMarginLoss(), "mean", True),
    "focal, function": (focal, "mean", True),
    "focal, class": (Focal(), "mean", True),
    "squares": (one_hot, "mean", True),
    "probabilities": (of_probabilities, "mean", True),
    "outputs that cannot be drawn": (picky, "mean", True),
    "regularized": (regularized, "mean", True),
    "embeddings": (arc, "mean", False),
    "zero": (lambda outputs, targets: (0 * outputs).sum(), "mean", False),
    "sum": (partial(functional.cross_entropy, reduction="sum"), "sum", True),
    "sum of squares": (lambda o, t: (o - functional.one_hot(t, 10)).square().sum(), "sum", True),
    "sum over a constant": (lambda o, t: functional.cross_entropy(o, t, reduction="sum") / 4, "sum",
                            True),
    "class weights": (partial(functional.cross_entropy, weight=torch.arange(10.0)), "other", True),
    "triplets": (triplet, "other", False),
    "a state": (Centering(), "other", False),
    "noise": (lambda o, t: functional.cross_entropy(o, t) * torch.rand(()), "other", None),
    "not a number": (lambda o, t: functional.cross_entropy(o, t) * math.nan, "other", False),
    "a list": (lambda o, t: [o], "other", False),
    "an error": (fails, "other", False),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_losses_of_classes(name, dtype):
    loss, reduction, takes_classes = CASES[name]
    torch.manual_seed(0)
    if isinstance(loss, partial) and "weight" in loss.keywords:
        loss = partial(functional.cross_entropy, weight=loss.keywords["weight"].to(dtype))
    found = examine_loss(loss, SCORES.to(dtype), LABELS, one_by_one(LABELS))
    assert found.reduction == reduction
    assert takes_classes in (None, found.takes_classes)


def test_multi_label_targets_are_no_classes():
    scores, targets = torch.rand(8, 3, generator=GENERATOR), torch.ones(8, 3)
    for loss in (functional.binary_cross_entropy, nn.BCEWithLogitsLoss()):
        assert examine_loss(loss, scores, targets, one_by_one(targets)) == ("mean", False)


def test_the_samples_of_a_loss_over_time_are_in_the_second_dimension():
    log_probabilities = torch.randn(5, 8, 4, generator=GENERATOR).log_softmax(2)
    labels = torch.randint(1, 4, (16,), generator=GENERATOR)
    lengths = torch.full((8,), 5), torch.full((8,), 2)
    alone = [(labels[2 * i : 2 * i + 2], lengths[0][:1], lengths[1][:1]) for i in range(8)]

    def ctc(outputs, targets):
        return functional.ctc_loss(outputs, *targets)

    assert examine_loss(ctc, log_probabilities, (labels, *lengths), alone) == ("mean", False)


def test_containers_are_cut_part_by_part():
    outputs = {"scores": SCORES, "aux": [SCORES, torch.tensor(2.0)], "name": "x"}

    def both(outputs, targets):
        first = functional.cross_entropy(outputs["scores"], targets)
        return first + outputs["aux"][1] * functional.cross_entropy(outputs["aux"][0], targets)

    assert examine_loss(both, outputs, LABELS, one_by_one(LABELS)) == ("mean", False)


def test_ignored_targets_make_a_weighted_mean():
    labels = LABELS.clone()
    labels[::2] = -100
    found = examine_loss(functional.cross_entropy, SCORES, labels, one_by_one(labels))
    assert found == ("other", True)


def test_one_sample_cannot_tell():
    found = examine_loss(partial(functional.cross_entropy, reduction="sum"), SCORES[:1], LABELS[:1],
                         [LABELS[:1]])  # fmt: skip
    assert found.reduction == "mean"


@pytest.mark.parametrize(
    ("outputs", "targets", "right"),
    [
        (SCORES, LABELS, True),
        (SCORES, LABELS.float(), False),
        (SCORES, LABELS[:3], False),
        (SCORES[:, :1], LABELS, False),
        (SCORES[0], LABELS, False),
        ([SCORES], LABELS, False),
        (SCORES, [LABELS], False),
    ],
)
def test_classification_is_a_matter_of_shapes(outputs, targets, right):
    assert is_classification(outputs, targets) is right


class OfEven:
    """The mean over even labels, and what else it gives."""

    def __init__(self, units):
        self.counts = units

    def units(self, targets):
        return self.counts((targets % 2 == 0).sum().item())

    def __call__(self, outputs, targets):
        is_even = targets % 2 == 0
        each = functional.cross_entropy(outputs, targets, reduction="none")
        return (each * is_even).sum() / is_even.sum()


class ByName(OfEven):
    def __call__(self, outputs, targets):
        return {"even": super().__call__(outputs, targets), "all": focal(outputs, targets)}

    def units(self, targets):
        return {"even": super().units(targets), "all": len(targets)}


@pytest.mark.parametrize(
    ("loss", "notes"),
    [
        (OfEven(lambda even: even), ()),
        (OfEven(lambda even: 3.0 * even), ()),
        (OfEven(lambda even: even + 1), ("the loss of a batch is not the mean",)),
        (ByName(lambda even: even), ("the loss is the sum of all, even",)),
        (ByName(lambda even: 1), ("the loss is the sum of all, even", "the loss of a batch")),
        (triplet, ("the loss of a batch is not the mean",)),
    ],
)
def test_units_that_a_loss_gives_are_tried_out(loss, notes):
    form = find_form(loss, loss(SCORES, LABELS), LABELS, torch.device("cpu"))
    _, found = judge_loss(loss, form, SCORES, LABELS, one_by_one(LABELS))
    assert len(found) == len(notes)
    assert all(map(str.startswith, found, notes))


def test_targets_are_classes_if_they_are_for_any_number():
    teacher = SCORES.flip(1).softmax(dim=1)

    def distill(outputs, targets):
        soft = -(teacher[: len(outputs)] * outputs.log_softmax(dim=1)).sum(dim=1).mean()
        return {"hard": functional.cross_entropy(outputs, targets), "soft": 9.0 * soft}

    form = find_form(distill, distill(SCORES, LABELS), LABELS, torch.device("cpu"))
    assert judge_loss(distill, form, SCORES, LABELS, one_by_one(LABELS))[0]
    assert not judge_loss(triplet, ONE_NUMBER, SCORES, LABELS, one_by_one(LABELS))[0]


def test_the_note_on_a_loss_that_depends_on_the_split_names_the_fix():
    (note,) = judge_loss(triplet, ONE_NUMBER, SCORES, LABELS, one_by_one(LABELS))[1]
    assert "by a method units(targets) of the loss" in note


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (lambda even: 0, "loss.units gives 0 for a batch of the first samples"),
        (lambda even: -even, "loss.units gives -3; let it give a finite number"),
        (lambda even: 1 / 0, "loss.units fails on targets of int64 of shape .*ZeroDivisionError"),
        (lambda even: {"even": 1}, "while loss gives one number"),
    ],
)
def test_units_that_cannot_be_used_are_found_before_the_run(units, message):
    loss = OfEven(units)
    with pytest.raises(ConfigError, match=message):
        find_form(loss, loss(SCORES, LABELS), LABELS, torch.device("cpu"))


def names_by_rank(runtime, differ):
    form = LossForm((f"a{runtime.rank if differ else 0}",), is_mapping=True)
    require_same_form(form, runtime)
    return form.names


def test_names_that_differ_between_ranks_are_refused():
    assert run_ranks(2, names_by_rank, False) == [("a0",)] * 2
    errors = run_ranks(2, names_by_rank, True, raises=True)
    found = [rank for rank, error in enumerate(errors) if error.error == "ConfigError"]
    for rank in found:
        line = f"loss gives a{rank} on rank {rank} and a{1 - rank} on rank {1 - rank}; let it give"
        assert line in errors[rank].text
    assert found
