"""The sanity check: what does not fit is named before step 1, and nothing is left behind."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from limits import WAIT_S
from ranks import rank_environment, run_ranks
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits, InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.components import read_batch
from ddp_sgd.engine.labels import listed_targets
from ddp_sgd.engine.sanity_check import check_evaluation, check_training
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.host import free_port
from ddp_sgd.models import MLP, ConvNet
from ddp_sgd.plan import make_plan

CE = nn.CrossEntropyLoss()


def batch_of(dataset, where="data.train", batch_size=32):
    return read_batch(dataset, where, batch_size=batch_size, collate=None)


def function(outputs, targets):
    return functional.cross_entropy(outputs, targets)


def train_check(model, loss, dataset, runtime=None, **data):
    runtime = runtime or Runtime()
    plan = make_plan(RunConfig(data=data), samples=len(dataset), world_size=runtime.world_size)
    return check_training(model, loss, dataset, batch_of(dataset), plan, runtime)


def eval_check(model, loss, dataset):
    batch = batch_of(dataset, "data.eval")
    return check_evaluation(model, loss, dataset, batch, Runtime()).objective


class Tracked(nn.Module):
    """Whatever a forward pass may change: buffers, weights, attributes, generators."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.norm = nn.BatchNorm1d(10)
        self.table = nn.Embedding(4, 10, max_norm=0.1)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(10))
        self.register_buffer("late", torch.empty(0))
        self.seen = 0
        self.history = []

    def forward(self, x):
        self.count += len(x)
        self.seen += 1
        self.history.append(len(x))
        x = self.layer(x) + self.table.weight[0] * 0 + self.table(torch.tensor([1]))
        self.mean = 0.9 * self.mean + x.mean(0).detach()
        self.late.resize_(3).fill_(1.0)
        x = x + random.random() + np.random.rand() + torch.rand(())
        return self.norm(x)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def generators():
    numpy = np.random.get_state()
    return (torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2])


@pytest.mark.parametrize("check", [train_check, eval_check])
def test_nothing_is_left_behind(check):
    model = Tracked()
    dataset = Digits()
    batch_of(dataset)
    before, generators_before = state_of(model), generators()
    tensors = [*model.parameters(), *model.buffers()]
    kept = torch.ones_like(model.layer.weight)
    model.layer.weight.grad = kept
    check(model, CE, dataset)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    now = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert (model.seen, model.history, model.training) == (0, [], True)
    assert model.layer.weight.grad is kept
    assert generators() == generators_before


def test_what_steps_depend_on_is_found():
    model = Tracked()
    facts = train_check(model, CE, Digits())
    for name in ("count", "mean", "late"):
        assert (model, name) in facts.buffers
    assert (model.norm, "running_mean") in facts.buffers
    assert not facts.buffers.synced  # there is one rank
    assert facts.objective.counts_samples
    facts.randomness.seed(3)
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
    facts.randomness.seed(3)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == drawn


def test_generators_that_are_not_used_are_not_seeded():
    facts = train_check(MLP(64, [], 10), CE, Digits())
    before = generators()[1:]
    facts.randomness.seed(3)
    assert generators()[1:] == before


X = torch.zeros(6, 3)


def labelled(*labels):
    return InMemory(X, torch.tensor(labels))


ZEROS = labelled(0, 0, 0, 0, 0, 0)


class OnlyInTraining(nn.Linear):
    """Another output in training, as with auxiliary classifiers, or none at all."""

    def __init__(self, kind):
        super().__init__(3, 2)
        self.kind = kind

    def forward(self, x):
        scores = super().forward(x)
        if self.training and self.kind == "fails":
            raise RuntimeError("no luck")
        return (scores, scores) if self.training else scores


@pytest.mark.parametrize(
    ("model", "loss", "dataset", "message"),
    [
        (
            MLP(4, [], 2),
            CE,
            ZEROS,
            r"model is MLP, which fails on inputs of float32 of shape \(6, 3\) in training mode",
        ),
        (
            MLP(3, [], 2),
            CE,
            InMemory(X.byte(), torch.zeros(6).long()),
            r"inputs of uint8 of shape \(6, 3\) in training mode, .*; make numbers of bytes by "
            r"\{class_path: ddp_sgd.data.augment.Normalize, .*\} in data.train_transforms, or",
        ),
        (
            MLP(3, [], 2),
            CE,
            InMemory(X, torch.zeros(6)),
            r"float32 of shape \(6, 2\) in training mode, which does not fit targets of float32 of",
        ),
        (MLP(3, [], 2), nn.functional.mse_loss, ZEROS, "does not fit targets of int64"),
        (MLP(3, [], 1), nn.MSELoss(), InMemory(X, torch.zeros(6)), "Using a target size"),
        (
            MLP(3, [], 2),
            lambda out, y: out.sum(1),
            ZEROS,
            r"loss is .*lambda>, which gives float32 of shape \(6,\); let it give the mean",
        ),
        (MLP(3, [], 2), lambda out, y: "x", ZEROS, "gives a str"),
        (
            MLP(3, [], 2),
            lambda out, y: {"loss": CE(out, y), "aux": 1},
            ZEROS,
            r"which gives a int for aux; let it give a tensor without dimensions on cpu",
        ),
        (
            OnlyInTraining("tuple"),
            CE,
            ZEROS,
            r"gives a tuple of \(float32 of shape \(6, 2\), float32 of .*\)\) in training mode",
        ),
        (OnlyInTraining("fails"), CE, ZEROS, "in training mode, RuntimeError: no luck; make"),
        (MLP(3, [], 2), lambda out, y: CE(out.detach(), y), ZEROS, "does not depend on a param"),
        (
            MLP(3, [], 2),
            lambda out, y: functional.cross_entropy(out, y, reduction="sum"),
            labelled(0, 1, 0, 1, 0, 1),
            "which gives the sum over the samples of a batch; let it give their mean",
        ),
    ],
)
def test_what_does_not_fit_is_named(model, loss, dataset, message):
    with pytest.raises(ConfigError, match=message):
        train_check(model, loss, dataset)


def test_an_output_of_training_alone_is_no_fault_in_evaluation():
    assert eval_check(OnlyInTraining("fails"), CE, ZEROS).takes_classes


@pytest.mark.parametrize("check", [train_check, eval_check])
@pytest.mark.parametrize(
    ("loss", "dataset", "message"),
    [
        (CE, labelled(0, 0, 0, 0, 0, 2), "labels from 0 to 2 while the model gives 2 scores; .* 3"),
        (CE, labelled(0, 0, 0, 0, 0, -1), "has labels from -1 to 0"),
        (CE, TensorDataset(X, torch.tensor([3, 0, 0, 0, 0, 0])), "labels from 0 to 3"),
        (functional.cross_entropy, labelled(0, 0, 0, 0, 0, 2), "labels from 0 to 2"),
        (nn.CrossEntropyLoss(weight=torch.ones(2)), labelled(0, 0, 0, 0, 0, 2), "from 0 to 2"),
        (function, labelled(0, 0, 0, 0, 0, 2), "from 0 to 2"),
        (nn.MultiMarginLoss(), labelled(0, 0, 0, 0, 0, 2), "from 0 to 2"),
    ],
)
def test_labels_out_of_range_are_named(check, loss, dataset, message):
    with pytest.raises(DataError, match=message):
        check(MLP(3, [], 2), loss, dataset)


def test_labels_of_pixels_are_checked():
    images, labels = torch.zeros(4, 1, 5, 5), torch.full((4, 5, 5), 3)
    with pytest.raises(DataError, match="labels from 3 to 3 while the model gives 2 scores"):
        train_check(nn.Conv2d(1, 2, 1), CE, InMemory(images, labels))


def test_ignored_labels_may_be_anything():
    loss = nn.CrossEntropyLoss(ignore_index=255)
    labels = torch.tensor([0, 255, 1, 255, 0, 1])
    assert not train_check(MLP(3, [], 2), loss, InMemory(X, labels)).objective.counts_samples
    train_check(MLP(3, [], 2), loss, InMemory(X, torch.full((6,), 255)))


def test_a_single_sample_is_enough():
    train_check(MLP(3, [], 2), CE, InMemory(X[:1], torch.zeros(1).long()))


@pytest.mark.parametrize("ignored", [False, True])
def test_ignored_labels_are_looked_for_where_labels_are_listed(ignored):
    labels = [0, 1, 0, 1, 0, -100 if ignored else 1]
    objective = train_check(MLP(3, [], 2), CE, labelled(*labels)).objective
    assert objective.counts_samples is not ignored


class Even(InMemory):
    """Gives other targets than it lists."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs, target % 2


class Transformed(InMemory):
    target_transform = staticmethod(lambda target: target)


@pytest.mark.parametrize(
    ("dataset", "counts"),
    [
        (Even(X, torch.tensor([0, 1, 2, 3, 4, 5])), False),
        (Transformed(X, torch.tensor([0, 1, 0, 1, 0, 1])), False),
        (InMemory(X, torch.tensor([0, 1, 0, 1, 0, 1])), True),
        (TensorDataset(X, torch.tensor([0, 1, 0, 1, 0, 1])), True),
    ],
)
def test_a_list_of_targets_counts_where_it_is_what_samples_give(dataset, counts):
    batch = batch_of(dataset)
    assert (listed_targets(dataset, batch.targets, batch.indices) is not None) is counts
    objective = train_check(MLP(3, [], 2), CE, dataset).objective
    assert objective.counts_samples is counts  # else an ignored target may still come


def pairs(outputs, targets):
    """A loss of pairs within the batch."""
    same = targets[:, None] == targets[None]
    distance = torch.cdist(outputs, outputs)
    return torch.where(same, distance, (1 - distance).relu()).mean()


@pytest.mark.parametrize(
    ("loss", "notes", "classes"),
    [
        (CE, 0, True),
        (functional.cross_entropy, 0, True),
        (nn.MultiMarginLoss(), 0, True),
        (function, 0, True),
        (pairs, 1, False),
    ],
)
def test_one_note_where_a_step_depends_on_the_split(loss, notes, classes):
    facts = train_check(MLP(64, [], 10), loss, Digits())
    assert len(facts.notes) == notes
    assert facts.objective.takes_classes is classes
    assert all("depends on how the batch is split" in note for note in facts.notes)


class Renormalizing(nn.BatchNorm1d):
    """Reads its running statistics in training, as batch renormalization does."""

    def forward(self, x):
        factor = 1 + self.running_mean
        return super().forward(x) * factor


def which_are_synced(runtime):
    def net(norm):
        return nn.Sequential(nn.Linear(64, 10), norm)

    norms = {
        "torch's": nn.BatchNorm1d(10),
        "renorm": Renormalizing(10),
        "frozen": nn.BatchNorm1d(10),
    }
    norms["frozen"].eval()
    return {
        name: train_check(net(norm), CE, Digits(), runtime).buffers.synced
        for name, norm in norms.items()
    }


def test_statistics_are_synced_where_training_reads_them():
    for synced in run_ranks(2, which_are_synced):
        assert synced == {"torch's": False, "renorm": True, "frozen": False}


def test_images_need_no_more_than_this():
    facts = train_check(ConvNet(batch_norm=True), CE, Digits(shape="image"))
    assert facts.notes == ()


CHECK = """
import sys
sys.path[:0] = sys.argv[1:]
from ddp_sgd.data import Digits
from ddp_sgd.distributed.runtime import start_runtime
from ddp_sgd.engine.sanity_check import check_evaluation
from ddp_sgd.models import ConvNet
from engine.test_sanity_check import CE, batch_of, train_check
model, dataset = ConvNet(batch_norm=True), Digits(shape="image")
with start_runtime(device="cpu") as runtime:
    train_check(model, CE, dataset, runtime)
    check_evaluation(model, CE, dataset, batch_of(dataset), runtime)
sys.exit(" ".join(name for name in ("torch._dynamo", "sympy") if name in sys.modules) or 0)
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_compiler_of_torch_is_not_imported(world_size):
    """It takes two seconds, longer than all else at the start of a run."""
    command, port = [sys.executable, "-c", CHECK, *sys.path], free_port()
    started = []
    for rank in range(world_size):  # not forks of a server, which has imported it
        ranks = rank_environment(rank, world_size, port) if world_size > 1 else {}
        environment = dict(os.environ, **ranks)
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    assert [process.communicate(timeout=WAIT_S)[1] for process in started] == [b""] * world_size
    assert {process.returncode for process in started} == {0}
