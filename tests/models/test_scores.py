"""Evaluation of models and losses that are not alike for every chunk: losses over the samples of
all ranks, scores that are no numbers, labels out of range.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from models import networks, samples
from models.networks import CLASSES
from models.training import Case, train
from ranks import run_ranks
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional

from ddp_sgd.distributed.error_propagation import LocalErrorPropagation
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.errors import UserError


def contrastive(outputs, targets):
    """Match each output with its target among those of all ranks."""
    if dist.is_initialized():
        outputs, targets = (torch.cat(all_gather(each)) for each in (outputs, targets))
    scores = functional.normalize(outputs) @ functional.normalize(targets).T
    return functional.cross_entropy(scores, torch.arange(len(scores)))


PAIRS = samples.made_by(lambda draw, n: (draw.numbers(6), draw.numbers(CLASSES)), 8)
# In chunks of 4: one rank has two chunks, and the other one.
UNEVEN = samples.made_by(lambda draw, n: (draw.numbers(6), draw.numbers(CLASSES)), 12)
CONTRASTIVE = Case(model=networks.mlp, data=PAIRS, held_out=UNEVEN, loss=lambda: contrastive)


def train_contrastive(runtime, folder):
    """Train; then let one rank ask to stop, while the others do not."""
    whole = train(CONTRASTIVE, runtime, folder / "whole")
    stop = StopRequest()
    if runtime.rank == 1:
        stop.ask("the test")
    every = {"eval": {"every_epochs": 1}}
    stopped = train(CONTRASTIVE, runtime, folder / "parts", stop=stop, **every)
    resumed = train(CONTRASTIVE, runtime, folder / "parts", **every)
    return [(each.status, each.digest, each.scores) for each in (whole, stopped, resumed)]


def test_a_loss_over_all_ranks_with_an_uneven_number_of_chunks(tmp_path):
    first, second = run_ranks(2, train_contrastive, tmp_path)
    assert first == second
    whole, stopped, resumed = first
    assert [each[0] for each in first] == ["finished", "stopped", "finished"]
    assert resumed == whole
    assert stopped[1] != whole[1]
    assert whole[2]["eval/count"] == 12


class NotNumbers(nn.Module):
    """Gives scores that are no numbers for some samples, in evaluation."""

    def __init__(self):
        super().__init__()
        self.layers = networks.mlp()

    def forward(self, inputs):
        scores = self.layers(inputs)
        broken = torch.zeros(len(inputs), 1).masked_fill_(inputs[:, :1] > 0, torch.nan)
        return scores if self.training else scores + broken


def test_scores_that_are_no_numbers_give_no_accuracy(tmp_path):
    case = Case(model=NotNumbers, data=samples.rows())
    scores = train(case, Runtime(), tmp_path).scores
    assert scores.keys() == {"eval/loss", "eval/count"}
    assert scores["eval/loss"] != scores["eval/loss"]


def test_a_loss_of_pairs_has_no_accuracy(tmp_path):
    case = Case(model=networks.mlp, data=samples.rows(8), loss=networks.OfTriplets)
    assert train(case, Runtime(), tmp_path).scores.keys() == {"eval/loss", "eval/count"}


class Late(samples.Listed):
    """Labels of which one is out of range, where no check before the run meets it."""

    def __init__(self):
        draw = samples.Draw()
        labels = [0, 1, 2, 9 if CLASSES else 0, 0, 1, 2, 3]
        super().__init__((draw.numbers(6), label) for label in labels)


WEIGHTS = torch.ones(CLASSES, dtype=torch.float64)
LOSSES = {
    "cross entropy": nn.CrossEntropyLoss,
    "class weights": lambda: nn.CrossEntropyLoss(WEIGHTS),
    "margin": nn.MultiMarginLoss,
    "a function": lambda: networks.focal,
    "negative log-likelihood": nn.NLLLoss,
}


def exit_code(case, runtime, folder):
    try:
        train(
            case,
            replace(runtime, error_propagation=LocalErrorPropagation()),
            folder,
            data={"batch_size": 2},
        )
    except UserError as error:
        return int(error.exit_code), str(error)
    return 0, "trained"


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_labels_out_of_range(loss, held_out, tmp_path):
    case = Case(
        model=networks.mlp,
        data=samples.rows() if held_out else Late,
        held_out=Late if held_out else samples.rows(),
        loss=LOSSES[loss],
    )
    code, message = exit_code(case, Runtime(), tmp_path)
    assert code == 65, message
    assert "label" in message
