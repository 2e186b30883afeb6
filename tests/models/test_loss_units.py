"""Losses with several numbers, and with units of their own: any split takes the step of plain torch
on the whole batch, and logs its numbers.
"""

import json

import pytest
import torch
from graphs import StopAt
from models.networks import CLASSES, WIDTH
from models.training import DECAY, LR, MOMENTUM, STEPS, distance, outcome_of
from ranks import run_ranks
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ddp_sgd import named_losses
from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import evaluation, units
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError

SAMPLES = 23
TOLERANCE = 1e-12
"""As in test_exact_models.py: float64 sums in another order, over three steps."""

UNLABELLED = -1
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(SAMPLES, WIDTH, generator=GENERATOR, dtype=torch.float64)
Y = torch.full((SAMPLES,), UNLABELLED)
Y[[0, 9, 22]] = torch.tensor([0, 1, 3])  # fewer than there are micro-batches
DATA = TensorDataset(X, torch.stack([Y, torch.arange(SAMPLES) % 3], dim=1))


def supervised(outputs, targets):
    """The mean over labelled samples; 0 / 0 where there is none, and so is its gradient."""
    labels = targets[:, 0]
    is_labelled = labels != UNLABELLED
    each = functional.cross_entropy(outputs, labels.clamp(min=0), reduction="none")
    return (each * is_labelled).sum() / is_labelled.sum()


def weighed(outputs, targets):
    return (outputs.square().mean(dim=1) * targets[:, 1]).sum() / targets[:, 1].sum()


def flat(outputs, targets):
    return outputs.logsumexp(dim=1).mean()


def square(outputs, targets):
    return outputs.square().mean()


def labelled(targets):
    return (targets[:, 0] != UNLABELLED).sum()


class Loss:
    """A loss of named numbers.

    Args:
        terms: Functions of (outputs, targets) by name.
    """

    def __init__(self, **terms):
        self.terms = terms

    def __call__(self, outputs, targets):
        return {name: term(outputs, targets) for name, term in self.terms.items()}


class Supervised(Loss):
    """All numbers are means over labelled samples."""

    def units(self, targets):
        return labelled(targets)


class Single(Supervised):
    """One number, with units that are a number."""

    def __call__(self, outputs, targets):
        return supervised(outputs, targets)

    def units(self, targets):
        return int(labelled(targets))


UNITS = {
    supervised: labelled,
    weighed: lambda targets: targets[:, 1].sum(),
    flat: len,
    square: len,
}


class ByName(Loss):
    """Each number is a mean over units of its own."""

    def units(self, targets):
        return {name: UNITS[term](targets) for name, term in self.terms.items()}


LOSSES = {
    "a loss and others": Loss(loss=flat, size=square),
    "a sum": Loss(size=square, height=flat),
    "one number, units": Single(),
    "a loss and others, units": Supervised(loss=supervised, also=supervised),
    "a sum, units": Supervised(one=supervised, two=supervised),
    "units by name": ByName(loss=flat, weighed=weighed, labelled=supervised),
    "a sum, units by name": ByName(weighed=weighed, labelled=supervised, height=flat),
}


def build():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def trained_of(returned):
    if isinstance(returned, torch.Tensor):
        return returned
    return returned.get("loss", sum(returned.values()))


def expected(loss):
    """Take the steps by plain torch on all samples; gives the model, and the numbers of a row."""
    model = build()
    options = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    rows = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        returned = loss(model(X), DATA.tensors[1])
        trained_of(returned).backward()
        optimizer.step()
        rows.append(numbers_of(returned))
    with torch.no_grad():
        return outcome_of(model).parameters, rows, numbers_of(loss(model(X), DATA.tensors[1]))


def numbers_of(returned):
    named = returned if isinstance(returned, dict) else {}
    numbers = {**named, "loss": trained_of(returned)}
    return {name: value.item() for name, value in numbers.items()}


def describe(folder, world_size, accumulate, **changes):
    basis = {
        "output_dir": str(folder),
        "name": "run",
        "epochs": STEPS,
        "data": {
            "batch_size": -(-SAMPLES // (world_size * accumulate)),
            "accumulate": accumulate,
        },
        "optim": {
            "lr": LR, "scaling": "none", "momentum": MOMENTUM, "weight_decay": DECAY,
            "decay_norm_and_bias": True,
        },
        "schedule": {"name": "constant"},
        "eval": {"every_epochs": STEPS},
        "log": {"every_steps": 1},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    return RunConfig(**basis | changes)


def train(runtime, folder, name, accumulate=1, stop=None, **changes):
    model = build()
    config = describe(folder, runtime.world_size, accumulate, **changes)
    loss = LOSSES[name]
    result = fit(config, runtime, model=model, train_set=DATA, eval_set=DATA, loss=loss, stop=stop)
    return outcome_of(model).parameters, result.scores, result.weights_digest


def train_all(runtime, folder, accumulate, on_device, changes):
    if on_device:  # as on a GPU, where nothing is looked at on the host
        units.counts_on_host = evaluation.counts_on_host = lambda _: False
        named_losses.counts_on_host = lambda _: False
    outcomes = {}
    for number, name in enumerate(LOSSES):
        weights, scores, digest = train(runtime, folder / str(number), name, accumulate, **changes)
        plain = {key: value.tolist() for key, value in weights.items()}
        outcomes[name] = plain, scores, digest
    return outcomes


def rows_of(folder, event="train"):
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == event]


def compare(name, folder, weights, scores):
    parameters, rows, score = expected(LOSSES[name])
    weights = {key: torch.tensor(value, dtype=torch.float64) for key, value in weights.items()}
    assert distance(weights, parameters) <= TOLERANCE
    assert distance(weights, outcome_of(build()).parameters) > 1e-4
    logged = rows_of(folder)
    assert len(logged) == STEPS
    for row, numbers in zip(logged, rows, strict=True):
        for key, value in numbers.items():
            assert row[f"train/{key}"] == pytest.approx(value, rel=1e-10), key
    for key, value in score.items():
        assert scores[f"eval/{key}"] == pytest.approx(value, rel=1e-10), key
    losses = {key for key in scores if key != "eval/count"}
    assert losses == {f"eval/{key}" for key in score}


LOCAL = {"parallel": {"local_sgd": {"start_step": 0, "period": 1}}}
LAYOUTS = {
    "one rank": (1, 4, False, {}),
    "two ranks": (2, 2, False, {}),
    "two ranks, counted on the device": (2, 2, True, {}),
    "two ranks, ddp": (2, 2, False, {"parallel": {"replica": "ddp"}}),
    "two ranks, local SGD": (2, 2, False, LOCAL),  # averaged after every step: as plain SGD
    "three ranks": (3, 1, False, {}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def split(request, tmp_path_factory):
    world_size, *options = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(world_size, train_all, folder, *options)


@pytest.mark.parametrize("name", LOSSES)
def test_any_split_takes_the_step_of_the_whole_batch_and_logs_its_numbers(name, split):
    folder, ranks = split
    weights, scores, digest = ranks[0][name]
    compare(name, folder / str(list(LOSSES).index(name)), weights, scores)
    assert all(rank[name][1:] == (scores, digest) for rank in ranks)


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_that_was_stopped_and_resumed_has_the_digest_of_the_whole(name, tmp_path, capsys):
    *_, digest = train(Runtime(), tmp_path / "whole", name, 2)
    train(Runtime(), tmp_path / "cut", name, 2, stop=StopAt(1))
    assert not rows_of(tmp_path / "cut", "eval")
    *_, resumed = train(Runtime(), tmp_path / "cut", name, 2)
    assert resumed == digest
    assert "depends on how the batch is split" not in capsys.readouterr().out
    whole, cut = rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut")
    kept = [key for key in whole[0] if key.startswith("train/")]
    assert [{k: row[k] for k in kept} for row in cut] == [{k: r[k] for k in kept} for r in whole]


LABELS = torch.where(torch.arange(SAMPLES) % 5 == 0, 1, torch.arange(SAMPLES) % CLASSES)


def train_on_labels(runtime, folder, accumulate, every_steps):
    config = describe(
        folder, runtime.world_size, accumulate,
        log={"every_steps": every_steps, "train_accuracy": True}, checkpoint={"every_epochs": None},
    )  # fmt: skip
    loss = nn.CrossEntropyLoss(ignore_index=1)
    model = build()
    fit(config, runtime, model=model, train_set=TensorDataset(X, LABELS), loss=loss)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 2)])
def test_train_accuracy_is_the_share_of_labelled_samples_that_a_step_began_with(
    world_size, accumulate, tmp_path
):
    run_ranks(world_size, train_on_labels, tmp_path, accumulate, 1)
    model, counted = build(), LABELS != 1
    shares = []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for _ in range(STEPS):
        scores = model(X)
        shares.append((scores.argmax(dim=1) == LABELS)[counted].double().mean().item())
        optimizer.zero_grad()
        functional.cross_entropy(scores, LABELS, ignore_index=1).backward()
        optimizer.step()
    logged = [row["train/accuracy"] for row in rows_of(tmp_path)]
    assert logged == pytest.approx(shares, rel=1e-12)


def test_the_accuracy_of_no_classification_is_refused_before_the_run(tmp_path):
    config = describe(tmp_path, 1, 1, log={"train_accuracy": True})
    data = TensorDataset(X, X[:, :CLASSES])
    with pytest.raises(ConfigError, match=r"log.train_accuracy is true while .* no classification"):
        fit(config, Runtime(), model=build(), train_set=data, loss=nn.MSELoss())
