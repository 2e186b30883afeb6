import pytest
import torch
from ddp_sgd.engine.trial import (
    check_dataset,
    describe,
    listed_targets,
    try_out,
)
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from ddp_sgd.data import Digits, InMemory
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.models import MLP, ConvNet

CPU = torch.device("cpu")
CE = nn.CrossEntropyLoss()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(1, 2)])


@pytest.mark.parametrize("dataset", [Stream(), 7, iter([1])])
def test_only_map_style_data_sets(dataset):
    with pytest.raises(
        ConfigError, match=r"data.train is a .*; name a map-style data set \(streaming"
    ):
        check_dataset(dataset, "data.train")


def test_no_empty_data_set():
    with pytest.raises(DataError, match=r"data.eval is empty; name a data set"):
        check_dataset(InMemory([], []), "data.eval")


def test_a_run_that_fits_leaves_no_trace():
    model = ConvNet(batch_norm=True).train()
    before = [p.clone() for p in (*model.parameters(), *model.buffers())]
    objective = try_out(model, CE, Digits(shape="image"), "data.train", CPU)
    assert objective.counts_samples
    assert model.training
    after = (*model.parameters(), *model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters())


X = torch.zeros(6, 3)


def labelled(*labels):
    return InMemory(X, torch.tensor(labels))


ZEROS = labelled(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("model", "loss", "dataset", "message"),
    [
        (
            MLP(4, [], 2),
            CE,
            ZEROS,
            r"model is MLP, which fails on inputs of float32 of shape \(2, 3\)",
        ),
        (
            MLP(3, [], 2),
            CE,
            InMemory(X, torch.zeros(6)),
            r"float32 of shape \(2, 2\), which does not fit targets of float32 of shape \(2,\)",
        ),
        (MLP(3, [], 2), nn.functional.mse_loss, ZEROS, "does not fit targets of int64"),
        (MLP(3, [], 1), nn.MSELoss(), InMemory(X, torch.zeros(6)), "Using a target size"),
        (
            MLP(3, [], 2),
            lambda out, y: out.sum(1),
            ZEROS,
            r"loss is function, which gives float32 of shape \(2,\); let it give the mean",
        ),
        (MLP(3, [], 2), lambda out, y: "x", ZEROS, "gives a str"),
    ],
)
def test_what_does_not_fit_is_named(model, loss, dataset, message):
    with pytest.raises(ConfigError, match=message):
        try_out(model, loss, dataset, "data.train", CPU)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            labelled(0, 0, 0, 0, 0, 2),
            "labels from 0 to 2 while the model gives 2 scores; .* 3 classes",
        ),
        (labelled(0, 0, 0, 0, 0, -1), "data.train has labels from -1 to 0"),
        (TensorDataset(X, torch.tensor([3, 0, 0, 0, 0, 0])), "labels from 0 to 3"),
    ],
)
def test_labels_out_of_range_are_named(dataset, message):
    with pytest.raises(DataError, match=message):
        try_out(MLP(3, [], 2), CE, dataset, "data.train", CPU)


def test_ignored_labels_may_be_anything():
    loss = nn.CrossEntropyLoss(ignore_index=255)
    labels = torch.tensor([0, 255, 1, 255, 0, 1])
    assert not try_out(MLP(3, [], 2), loss, InMemory(X, labels), "data.train", CPU).counts_samples
    all_ignored = InMemory(X, torch.full((6,), 255))
    try_out(MLP(3, [], 2), loss, all_ignored, "data.train", CPU)


def test_a_single_sample_is_enough():
    try_out(MLP(3, [], 2), CE, InMemory(X[:1], torch.zeros(1).long()), "data.train", CPU)


def test_describe():
    assert describe(torch.zeros(2, 3)) == "float32 of shape (2, 3)"
    assert describe([1]) == "a list"


def test_the_mode_of_every_module_stays_as_it_is():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout())
    model[2].eval()
    try_out(model, CE, Digits(), "data.train", CPU)
    assert [module.training for module in model] == [True, True, False]


@pytest.mark.parametrize("ignored", [False, True])
def test_ignored_labels_are_looked_for_where_labels_are_listed(ignored):
    labels = [0, 1, 0, 1, 0, -100 if ignored else 1]
    objective = try_out(MLP(3, [], 2), CE, labelled(*labels), "data.train", CPU)
    assert objective.counts_samples is not ignored


def test_where_labels_are_not_listed_some_may_be_ignored():
    class Unlisted(InMemory):
        targets = property(lambda self: None, lambda self, value: setattr(self, "hidden", value))

        def __len__(self):
            return 6

        def __getitems__(self, indices):
            return self.inputs[indices], self.hidden[indices]

    dataset = Unlisted.__new__(Unlisted)
    dataset.inputs, dataset.hidden = X, torch.zeros(6).long()
    assert not try_out(MLP(3, [], 2), CE, dataset, "data.train", CPU).counts_samples


@pytest.mark.parametrize("listed", [None, ["a", "b"], [0.5, 1.5], [[0, 1], [1, 0]]])
def test_lists_of_something_else_are_left_alone(listed):
    class Named:
        targets = listed

        def __len__(self):
            return 2

    assert listed_targets(Named(), torch.tensor([0, 1])) is None
