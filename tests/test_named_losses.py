"""Forms of a loss, and its units."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from ddp_sgd import named_losses as module
from ddp_sgd.errors import ConfigError
from ddp_sgd.named_losses import ONE_NUMBER, LossForm, form_of, read_units, units_of, wide_float

CPU = torch.device("cpu")
A, B = torch.tensor(1.5), torch.tensor(2.0)
SUM = LossForm(("a", "b"), is_mapping=True, adds_up=True)
BESIDE = LossForm(("a",), is_mapping=True)
BY_NAME = LossForm(("a", "b"), is_mapping=True, adds_up=True, units_by_name=True)


@pytest.mark.parametrize(
    ("returned", "form", "values", "trained"),
    [
        (A, ONE_NUMBER, {"loss": 1.5}, ("loss",)),
        ({"loss": A}, LossForm(is_mapping=True), {"loss": 1.5}, ("loss",)),
        ({"loss": A, "a": B}, BESIDE, {"loss": 1.5, "a": 2.0}, ("loss",)),
        ({"b": A, "a": B}, SUM, {"loss": 3.5, "a": 2.0, "b": 1.5}, ("loss",)),
    ],
)
def test_the_loss_is_trained_or_else_the_sum(returned, form, values, trained):
    assert form_of(returned, "f", CPU) == form
    assert form.values(returned) == values
    assert form.trained == trained


def test_means_over_different_units_are_trained_one_by_one():
    assert BY_NAME.trained == ("a", "b")
    assert BY_NAME.values({"a": A, "b": B})["loss"] == 3.5


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(2), r"f gives float32 of shape \(2,\); let it give the mean"),
        ({}, "f gives a dict; let it give the mean"),
        ("x", "f gives a str"),
        ({"a": 1.0}, "f gives a float for a; let it give a tensor without dimensions on cpu"),
        ({"a": torch.ones(1)}, "for a; let it give a tensor without dimensions"),
        ({1: A}, "a number of the name 1; begin names with a letter"),
        ({"a b": A}, "a number of the name 'a b'; begin names with a letter"),
        ({"set/a": A}, "a number of the name 'set/a'; begin names with a letter"),
        ({"a": torch.ones((), device="meta")}, "on meta for a; let it give .* on cpu"),
        *(
            ({name: A}, f"a number of the name {name}, which is taken; choose another one")
            for name in (
                "loss_rank0",
                "lr",
                "grad_norm",
                "accuracy",
                "count",
                "skipped_steps",
                "step",
            )
        ),
    ],
)
def test_what_is_no_loss_is_named(returned, message):
    with pytest.raises(ConfigError, match=message):
        form_of(returned, "f", CPU)


@pytest.mark.parametrize(
    ("form", "returned", "message"),
    [
        (ONE_NUMBER, {"a": A}, "loss gives the names a while it gave a tensor before the run"),
        (BESIDE, A, r"gives float32 of shape \(\) while it gave the names a, loss"),
        (BESIDE, {"loss": A}, "gives the names loss while it gave the names a, loss"),
        (SUM, {"a": A, "b": A, "loss": A}, "gives the names a, b, loss while it gave the names"),
    ],
)
def test_other_names_at_a_later_call_are_an_error(form, returned, message):
    with pytest.raises(ConfigError, match=message):
        form.values(returned)


def test_units_are_a_method_that_a_loss_may_have():
    class WithMethod:
        def units(self, targets):
            return len(targets)

    assert units_of(WithMethod())([1, 2]) == 2
    assert units_of(nn.MSELoss()) is None
    assert units_of(partial(max)) is None
    assert units_of(type("Wide", (), {"units": 64})()) is None
    network = nn.Module()
    network.units = nn.Linear(1, 1)
    assert units_of(network) is None


@pytest.mark.parametrize("number", [3, 3.0, torch.tensor(3), torch.tensor(3.0).half()])
def test_units_are_one_number_for_all_names(number):
    for form, names in ((ONE_NUMBER, {"loss"}), (BESIDE, {"loss", "a"}), (SUM, {"loss", "a", "b"})):
        units = read_units(number, form, CPU)
        assert units.keys() == names
        assert all((each.dtype, each.item()) == (torch.float64, 3.0) for each in units.values())


def test_units_are_one_number_for_each_name():
    units = read_units({"b": True, "a": torch.tensor(0)}, BY_NAME, CPU)
    assert {name: each.item() for name, each in units.items()} == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize(
    ("returned", "form", "message"),
    [
        (-1, ONE_NUMBER, "loss.units gives -1; let it give a finite number that is at least 0"),
        (math.nan, ONE_NUMBER, "loss.units gives nan"),
        (math.inf, ONE_NUMBER, "loss.units gives inf"),
        (torch.ones(2), ONE_NUMBER, r"gives float32 of shape \(2,\); let it give a number"),
        ("x", ONE_NUMBER, "gives a str; let it give a number"),
        ({"a": -1, "b": 1}, BY_NAME, "gives -1 for a"),
        ({"a": 1}, BY_NAME, "gives the names a, while loss gives the names a, b; let it give"),
        ({"a": 1, "b": 1, "loss": 1}, BY_NAME, "gives the names a, b, loss, while loss gives"),
        ({"a": 1, "b": 1}, SUM, "the same at every call"),
        (1, BY_NAME, "gives a int, while loss gives the names a, b"),
        ({"loss": 1}, ONE_NUMBER, "gives the names loss, while loss gives one number"),
    ],
)
def test_units_that_cannot_be_used_are_named(returned, form, message):
    with pytest.raises(ConfigError, match=message):
        read_units(returned, form, CPU)


@pytest.mark.parametrize(("number", "expected"), [(-1, math.nan), (math.inf, math.nan), (2, 2.0)])
def test_on_a_device_units_that_cannot_be_used_are_no_number(number, expected, monkeypatch):
    monkeypatch.setattr(module, "counts_on_host", lambda _: False)
    units = read_units(torch.tensor(number), ONE_NUMBER, CPU)
    assert units["loss"].item() == pytest.approx(expected, nan_ok=True)


def test_wide_float():
    assert wide_float(torch.device("cpu")) is torch.float64
    assert wide_float(torch.device("mps")) is torch.float32
