"""Ranks that bring different things are told apart before the first step, and none hangs."""

import json
import random
import re
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from gathered import gather
from ranks import run_ranks
from torch import nn

import ddp_sgd.engine.fit as whole_run
import ddp_sgd.engine.rank_consistency as agreement
from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.rank_consistency import require_consistency
from ddp_sgd.errors import DataError
from ddp_sgd.models import MLP

QUIET = {"wandb": {"mode": "disabled"}, "epochs": 1}
NOTHING = {"model": None, "loss": None, "train_set": None, "eval_set": None}


MOODS = count(1)


def mood():
    """A number that differs by two or more from one reading to the next, and between ranks."""
    return 3 * next(MOODS) + float(np.random.default_rng().random())


class Samples:
    """Sixteen samples of four numbers; what ``change`` says is different on the last rank."""

    def __init__(self, change="", rank=0, last=0):
        self.change = change if rank == last else ""

    def __len__(self):
        return 17 if self.change == "length" else 16

    def __getitem__(self, index):
        inputs = torch.full((4,), float(index + 1))
        inputs[0] = -1.0
        target = index % 2
        match self.change:
            case "shape":
                return inputs[:3], target
            case "dtype":
                return inputs.double(), target
            case "target" if index == 8:
                return inputs, target + 1
            case "input" if index == 15:
                return inputs * 1.5, target
            case "rounding":
                return inputs * (1 + 1e-4), target
            case "unreadable" if index == 8:
                raise OSError("the disk is gone")
            case "mood":
                return inputs + mood(), target
        return inputs, target


class Nested(Samples):
    """Samples of containers in containers, and of things that are no tensors."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        views = {"views": [inputs, {"mask": inputs > 0}], "name": f"sample {index}", "none": 3}
        return views, (target, [torch.tensor([1, 2, 3]), torch.zeros(0)])


class Augmented(Samples):
    """Draws numbers that follow from the seed and the index."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + random.random() + torch.rand(4), target


class Moody(Samples):
    """Gives something else whenever it is read, on every rank."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + mood(), target


class Mappings(Samples):
    """Samples that form a batch by a collate function only."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return {"inputs": inputs, "target": target, "name": None}


def as_pair(samples):
    targets = torch.tensor([each["target"] for each in samples])
    return torch.stack([each["inputs"] for each in samples]), targets


def check(runtime, changes=None, own=None, dataset=None, model=None, collate=None):
    """Look at agreement with something different on the last rank."""
    last = runtime.world_size - 1
    here = runtime.rank == last
    config = RunConfig(**QUIET | (changes if changes and here else {}))
    if own and here:
        agreement.read_versions = lambda: own
    given = dict(NOTHING)
    if dataset:
        kind, change = dataset
        given |= {"train_set": kind(change, runtime.rank, last), "model": MLP(4, [], 2)}
    if model:
        given["model"] = MODELS[model](here)
    components = gather(config, **given)
    components = replace(components, reading=components.reading._replace(collate=collate))
    require_consistency(config.model_dump(mode="json"), components, runtime)
    return "agreed"


def frozen(here):
    model = MLP(64, [], 10)
    next(model.parameters()).requires_grad_(not here)
    return model


def ordered(here):
    layers = {"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}
    model = nn.Module()
    for name in sorted(layers, reverse=here):
        model.add_module(name, layers[name])
    return model


def with_buffer(here):
    model = MLP(64, [], 10)
    if here:
        model.register_buffer("mean", torch.zeros(3))
    return model


MODELS = {
    "wider": lambda here: MLP(64, [32 if here else 16], 10),
    "deeper": lambda here: MLP(64, [16, 16] if here else [16], 10),
    "frozen": frozen,
    "half": lambda here: MLP(64, [], 10).half() if here else MLP(64, [], 10),
    "buffer": with_buffer,
    "ordered": ordered,
    "lazy": lambda here: nn.LazyLinear(10),
}

VERSIONS = {"python": "3.11.7", "torch": "2.14.1", "ddp_sgd": "0.1.0"}

DIFFERENCES = [
    ("ConfigError", {"own": VERSIONS | {"torch": "1.0"}}, "the version of torch is .* and 1.0 on"),
    ("ConfigError", {"own": VERSIONS | {"python": "2.7.18"}}, "the version of python is .* 2.7 on"),
    (
        "ConfigError",
        {"changes": {"optim": {"lr": 0.2}}},
        r"optim.lr is 0.05 on ranks? [0-9-]+ \(\S+\) and 0.2 on rank \d \(\S+\); start every rank",
    ),
    (
        "ConfigError",
        {"changes": {"seed": 1, "optim": {"lr": 0.2}, "runtime": {"hang_s": None}}},
        "optim.lr is .*, and runtime.hang_s is 300.0 on .* and null on .*, and seed is 0 on .*;",
    ),
    (
        "ConfigError",
        {"changes": {"model": {"class_path": "ddp_sgd.models.ConvNet"}}},
        'model.class_path is "ddp_sgd.models.MLP" on .* and "ddp_sgd.models.ConvNet" on ',
    ),
    (
        "ConfigError",
        {"model": "wider"},
        r"the model's parameter \S+ is float32 of shape \(16, 64\) on .* and float32 of shape "
        r"\(32, 64\) on rank \d .*; build the same model on every rank",
    ),
    ("ConfigError", {"model": "deeper"}, r"the model's parameter \S+ is .* and "),
    ("ConfigError", {"model": "frozen"}, r"on .* and float32 of shape \(10, 64\), frozen on rank"),
    ("ConfigError", {"model": "half"}, "float32 of shape .* and float16 of shape"),
    ("ConfigError", {"model": "buffer"}, "buffer mean is missing on .* and float32 of shape"),
    ("ConfigError", {"model": "ordered"}, "the model's order of parts is not the same; build"),
    (
        "DataError",
        {"dataset": (Samples, "length")},
        r"the length of data.train is 16 on .* and 17 on rank \d .*; give every rank the same data",
    ),
    (
        "DataError",
        {"dataset": (Samples, "shape")},
        r"the shape of data.train\[0\] is float32 of shape \(1, 4\), int64 of shape \(1,\) on ",
    ),
    ("DataError", {"dataset": (Samples, "dtype")}, r"data.train\[0\] is float32 .* and float64"),
    (
        "DataError",
        {"dataset": (Samples, "target")},
        r"the target of data.train\[8\] is 0 on .* and 1 on rank",
    ),
    (
        "DataError",
        {"dataset": (Samples, "input")},
        r"the input of data.train\[15\] is a mean of 11.75 \(.*\) on .* and a mean of 17.625",
    ),
    (
        "DataError",
        {"dataset": (Mappings, "target"), "collate": as_pair},
        r"the target of data.train\[8\] is 0 on .* and 1 on rank",
    ),
    (
        "DataError",
        {"dataset": (Nested, "input")},
        r"the input, part 0, of data.train\[15\] is a mean of 11.75",
    ),
]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("error", "difference", "message"), DIFFERENCES)
def test_a_difference_is_reported_by_one_rank(ranks, error, difference, message):
    results = run_ranks(ranks, apply, difference, raises=True)
    told = [result for result in results if result.error == error]
    assert len(told) == 1, results
    assert sorted(result.error for result in results) == sorted(
        [error, *["RemoteError"] * (ranks - 1)]
    )
    last_line = told[0].text.strip().splitlines()[-1]
    assert re.search(message, last_line), last_line


def apply(runtime, difference):
    return check(runtime, **difference)


AGREEING = [
    {},
    {"changes": {"output_dir": "elsewhere", "wandb": {"mode": "offline", "name": "x"}}},
    {"changes": {"runtime": {"device": "cpu", "backend": "gloo"}, "data": {"workers": 1}}},
    {"own": None, "dataset": (Samples, "rounding")},
    {"dataset": (Samples, "unreadable")},
    {"dataset": (Samples, "mood")},
    {"dataset": (Nested, "")},
    {"dataset": (Augmented, "")},
    {"dataset": (Moody, "")},
    {"model": "lazy"},
]


@pytest.mark.parametrize("same", AGREEING)
def test_what_may_differ_or_is_equal_is_let_through(same):
    assert run_ranks(2, apply, same) == ["agreed"] * 2


def fit_disagreeing(runtime, folder):
    config = RunConfig(**QUIET, output_dir=folder, optim={"lr": 0.1 * (runtime.rank + 1)})
    return fit(config, runtime)


def test_fit_refuses_before_the_first_step(tmp_path):
    results = run_ranks(2, fit_disagreeing, str(tmp_path), raises=True)
    assert sorted(result.error for result in results) == ["ConfigError", "RemoteError"]
    result = json.loads((tmp_path / "digits" / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["step"]) == ("failed", 64, 0)
    assert result["error"].startswith("optim.lr is 0.1 on rank 0 (")


def fit_looking(runtime, folder, *, looks):
    if not looks:
        whole_run.require_consistency = lambda *_: {}
    config = RunConfig(**QUIET, output_dir=f"{folder}/{looks}")
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    torch.manual_seed(0)
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[2].weight)
    return fit(config, runtime, model=model, train_set=Augmented()).weights_digest


@pytest.mark.parametrize("ranks", [2, 3])
def test_looking_changes_nothing(ranks, tmp_path):
    digests = {
        digest
        for looks in (True, False)
        for digest in run_ranks(ranks, partial(fit_looking, looks=looks), str(tmp_path))
    }
    assert len(digests) == 1


def test_alone_nothing_is_read():
    class Unread(Samples):
        def __getitem__(self, index):
            raise AssertionError("nobody should look")

    components = gather(RunConfig(), **NOTHING | {"train_set": Unread(), "model": MLP(4, [], 2)})
    require_consistency(RunConfig().model_dump(mode="json"), components, Runtime())


def fail_while_others_look(runtime):
    if runtime.rank == 1:
        raise DataError("data.train is gone; bring it back.")
    check(runtime)


def test_a_rank_that_fails_before_is_not_waited_for():
    first, second = run_ranks(2, fail_while_others_look, raises=True)
    assert (first.error, second.error) == ("RemoteError", "DataError")


def marks_for_checkpoints(runtime):
    components = gather(RunConfig(**QUIET), **NOTHING)
    return list(
        require_consistency(RunConfig(**QUIET).model_dump(mode="json"), components, runtime)
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_marks_of_the_training_data_alone_are_kept(ranks):
    """Held-out data may change from one attempt to the next."""
    for names in run_ranks(ranks, marks_for_checkpoints):
        assert names
        assert all(" of data.train[" in name for name in names)
