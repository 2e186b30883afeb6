"""A loss split into micro-batches adds up to the loss of the whole."""

import pytest
import torch
from torch import nn

from ddp_sgd.errors import ConfigError
from ddp_sgd.losses import Objective

torch.manual_seed(0)
SCORES = torch.randn(10, 4, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 2, 2, 2])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)

CASES = {
    "mean over samples": (nn.CrossEntropyLoss(), SCORES, LABELS, True),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), SCORES, LABELS, True),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), SCORES, LABELS, False),
    "smoothing and weights": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        SCORES,
        LABELS,
        False,
    ),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=2), SCORES, LABELS, False),
    "log likelihood": (nn.NLLLoss(weight=WEIGHT), SCORES.log_softmax(1), LABELS, False),
    "probabilities": (nn.CrossEntropyLoss(weight=WEIGHT), SCORES, SCORES.softmax(1), True),
    "unlabelled samples": (
        nn.CrossEntropyLoss(),
        SCORES,
        torch.where(LABELS == 1, -100, LABELS),
        False,
    ),
    "one target a pixel": (
        nn.CrossEntropyLoss(),
        SCORES.reshape(5, 4, 2),
        torch.where(LABELS == 3, -100, LABELS).reshape(5, 2),
        False,
    ),
    "regression": (nn.MSELoss(), SCORES, SCORES.flip(0), True),
    "a function": (nn.functional.l1_loss, SCORES, SCORES.flip(0), True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pieces", [(5, 5), (1, 9), (1, 1, 8), (10,)])
def test_pieces_add_up_to_the_whole(name, pieces):
    loss, outputs, targets, counts_samples = CASES[name]
    objective = Objective(loss, targets)
    assert objective.counts_samples == counts_samples
    scale = len(targets) // 5  # the pixel case has five samples
    sizes = [max(1, size * scale // 2) for size in pieces]
    sizes[-1] = len(targets) - sum(sizes[:-1])
    total = units = 0.0
    for out, target in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        total += objective(out, target) * objective.weight(len(target))
        units += len(target) if counts_samples else objective.units(target, len(target))
    assert float(total / units) == pytest.approx(float(loss(outputs, targets)), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_stand_in_counts_for_nothing(name):
    loss, outputs, targets, counts_samples = CASES[name]
    outputs = outputs[:1].clone().requires_grad_()
    objective = Objective(loss, targets)
    total = objective(outputs, targets[:1]) * objective.weight(0)
    total.backward()
    assert total.item() == 0
    assert outputs.grad.abs().max() == 0
    if not counts_samples:
        assert objective.units(targets[:1], 0) == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("samples", [0, 5])
def test_units_are_the_same_on_a_device(name, samples):
    loss, _, targets, counts_samples = CASES[name]
    if not counts_samples:
        objective = Objective(loss, targets)
        units = objective.units_on_device(targets, samples)
        assert (units.dtype, units.shape) == (torch.float64, ())
        assert units.item() == pytest.approx(objective.units(targets, samples), rel=1e-15)


def test_labels_without_a_class_weight_are_left_to_the_loss_on_a_device():
    objective = Objective(nn.CrossEntropyLoss(weight=WEIGHT), LABELS)
    labels = torch.tensor([0, 77, -3, -100])
    expected = float(WEIGHT[0] + WEIGHT[-1] + WEIGHT[0])
    assert objective.units_on_device(labels, 4).item() == pytest.approx(expected, rel=1e-6)


def test_a_piece_with_ignored_targets_only_has_no_nan():
    objective = Objective(nn.CrossEntropyLoss(ignore_index=2), LABELS)
    outputs = SCORES[6:].clone().requires_grad_()
    (objective(outputs, LABELS[6:]) * objective.weight(4)).backward()
    assert outputs.grad.abs().max() == 0
    assert objective.units(LABELS[6:], 4) == 0


def test_the_user_s_loss_is_left_as_it_is():
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    Objective(loss, LABELS)
    assert loss.reduction == "mean"


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_are_refused(reduction):
    with pytest.raises(
        ConfigError, match=f"loss.init_args.reduction is {reduction}; leave it at mean"
    ):
        Objective(nn.MSELoss(reduction=reduction), LABELS)


def test_targets_that_were_not_seen_may_be_ignored_ones():
    assert Objective(nn.CrossEntropyLoss(), LABELS[:2], complete=True).counts_samples
    assert not Objective(nn.CrossEntropyLoss(), LABELS[:2], complete=False).counts_samples
    assert Objective(nn.MSELoss(), SCORES[:2], complete=False).counts_samples
