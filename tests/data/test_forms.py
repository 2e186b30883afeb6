"""Targets of any form: every held-out sample counts once, and the score is that of the samples."""

from typing import NamedTuple

import pytest
import torch
from ranks import run_ranks
from torch import nn

from ddp_sgd.config import RunConfig, read_command_line
from ddp_sgd.data.loader import EvalLoader
from ddp_sgd.data.sampler import EvalSampler
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.evaluation import evaluate
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import RefusedError
from ddp_sgd.evaluate import look_up, score_again
from ddp_sgd.losses import Objective

CPU = torch.device("cpu")
SAMPLES = 22
"""In chunks of 4, and one of 2: means over powers of two of whole numbers are exact."""


class Indexed:
    """Inputs that a model sums to twice the index; targets as a function makes them of it."""

    def __init__(self, target):
        self._target = target

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.full((2,), float(index)), self._target(index)


class Sum(nn.Module):
    def forward(self, inputs):
        return inputs.sum(dim=1)


class Boxes(NamedTuple):
    corners: torch.Tensor
    image: torch.Tensor


def boxes(index):
    """Boxes of an image: none in some, and more than images in a chunk."""
    return torch.full((index % 4, 4), float(index))


def as_boxes_in_one(samples):
    corners = [target for _, target in samples]
    image = torch.cat([torch.full((len(each),), n) for n, each in enumerate(corners)])
    return torch.stack([row for row, _ in samples]), Boxes(torch.cat(corners), image)


def as_list(samples):
    inputs, targets = zip(*samples, strict=True)
    return torch.stack(inputs), list(targets)


def as_flat(samples):
    inputs, labels = zip(*samples, strict=True)
    lengths = torch.tensor([len(each) for each in labels])
    return torch.stack(inputs), (torch.cat(labels), lengths)


def without_targets(samples):
    return torch.stack([row for row, _ in samples]), None


def squares(numbers_of):
    """The mean of (output - number)^2, the number of a sample being a function of the targets."""

    def loss(outputs, targets):
        return (outputs - torch.as_tensor(numbers_of(targets, len(outputs)))).square().mean()

    return loss


def split_sums(flat, lengths):
    return torch.stack([part.sum() for part in flat.split(lengths.tolist())])


def ctc(outputs, targets):
    """CTC over four frames of three symbols, whose scores follow from the outputs."""
    scores = torch.arange(12.0).reshape(4, 1, 3) * outputs[:, None] / 100
    labels, lengths = targets
    frames = torch.full((len(outputs),), 4)
    return nn.functional.ctc_loss(scores.log_softmax(2), labels, frames, lengths)


def labels(index):
    return torch.ones(1 + index % 2, dtype=torch.long)


# By name: the data set, the collate function, the loss, and the number of a sample.
FORMS = {
    "text": (
        Indexed(lambda i: "a" * i),
        None,
        squares(lambda texts, _: [len(text) for text in texts]),
        lambda i: i,
    ),
    "list of mappings": (
        Indexed(lambda i: {"box": boxes(i), "name": str(i)}),
        as_list,
        squares(lambda each, _: [float(one["box"].sum()) for one in each]),
        lambda i: 4 * i * (i % 4),
    ),
    "boxes in one tensor": (
        Indexed(boxes),
        as_boxes_in_one,
        squares(lambda t, m: torch.zeros(m).index_add(0, t.image, t.corners.sum(dim=1))),
        lambda i: 4 * i * (i % 4),
    ),
    "flat labels": (
        Indexed(lambda i: torch.arange(i % 5)),
        as_flat,
        squares(lambda targets, _: split_sums(*targets)),
        lambda i: sum(range(i % 5)),
    ),
    "mapping, text first": (
        Indexed(lambda i: {"text": "abcdefgh", "number": i}),
        None,
        squares(lambda targets, _: targets["number"]),
        lambda i: i,
    ),
    "tuples in tuples": (
        Indexed(lambda i: (("text", torch.zeros(3)), (i, 2 * i))),
        None,
        squares(lambda targets, _: targets[1][0] + targets[1][1]),
        lambda i: 3 * i,
    ),
    "no targets": (
        Indexed(lambda i: None),
        without_targets,
        squares(lambda targets, m: torch.zeros(m)),
        lambda i: 0,
    ),
}


def score(runtime, dataset, collate, loss, batch_size=4):
    chunks = EvalSampler(
        SAMPLES, batch_size=batch_size, rank=runtime.rank, world_size=runtime.world_size
    )
    loader = EvalLoader(dataset, chunks, seed=0, workers=0, device=CPU, collate=collate)
    return evaluate(Sum(), Objective(loss, None), loader, runtime)


def score_all(runtime):
    scores = {name: score(runtime, *FORMS[name][:3]) for name in FORMS}
    return scores | {"ctc": score(runtime, Indexed(labels), as_flat, ctc)}


@pytest.fixture(scope="module")
def alone():
    return score_all(Runtime())


@pytest.mark.parametrize("name", FORMS)
def test_a_score_is_the_mean_over_samples(alone, name):
    number = FORMS[name][3]
    total = sum((2 * index - number(index)) ** 2 for index in range(SAMPLES))
    assert alone[name] == {"eval/loss": total / SAMPLES, "eval/count": SAMPLES}


def test_a_ctc_loss_is_that_of_all_samples_at_once(alone):
    inputs, targets = as_flat([Indexed(labels)[index] for index in range(SAMPLES)])
    whole = ctc(Sum()(inputs), targets).item()
    # Sums of 22 numbers of one sign, each rounded by at most 2^-24, in another order.
    assert alone["ctc"]["eval/loss"] == pytest.approx(whole, rel=2 * SAMPLES * 2**-24)
    assert alone["ctc"]["eval/count"] == SAMPLES


def test_ranks_give_the_same_score(alone):
    assert run_ranks(3, score_all) == [alone] * 3


def describe(folder, **changes):
    sentences = {"class_path": "user_code.Sentences"}
    data = {"train": sentences, "eval": sentences, "collate": {"class_path": "user_code.Pad"}}
    basis = {
        "name": "sentences",
        "epochs": 2,
        "model": {
            "class_path": "ddp_sgd.models.MLP",
            "init_args": {"inputs": 3, "hidden": [4], "classes": 2},
        },
        "data": data | {"batch_size": 4, "workers": 1} | changes.pop("data", {}),
        "schedule": {"name": "constant"},
        "optim": {"reference_batch": 4, "scaling": "none"},
        "wandb": {"mode": "disabled"},
    }
    return RunConfig(output_dir=str(folder), **basis | changes)


def train(runtime, folder, changes):
    result = fit(describe(folder, **changes), runtime)
    return result.weights_digest, result.scores


def rescore(runtime, folder):
    saved = look_up(
        folder, read_command_line(["x"], {}, program="", about="", argument="X").over, runtime
    )
    return score_again(saved, runtime)


def test_a_run_with_a_collate_function_goes_on_with_the_same_bits(tmp_path):
    whole = run_ranks(2, train, tmp_path / "whole", {})
    run_ranks(2, train, tmp_path / "parts", {"epochs": 1})
    assert run_ranks(2, train, tmp_path / "parts", {"data": {"workers": 0}}) == whole
    ((scores, digest),) = run_ranks(1, rescore, tmp_path / "whole" / "sentences")
    assert (digest, scores) == whole[0]
    assert scores["eval/count"] == SAMPLES


def test_another_collate_function_is_another_run(tmp_path):
    fit(describe(tmp_path, epochs=1), Runtime())
    other = {"class_path": "user_code.Pad", "init_args": {"share": 0.5}}
    with pytest.raises(RefusedError, match=r"data.collate.init_args.share was None, is 0.5"):
        fit(describe(tmp_path, data={"collate": other}), Runtime())
