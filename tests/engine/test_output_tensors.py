"""Outputs of any form; with real models in tests/models."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ddp_sgd.engine.output_tensors import list_tensors, map_tensors

Point = namedtuple("Point", "x y")
ONE, TWO = torch.ones(2), torch.full((2,), 2.0)


@dataclass
class Plain:
    logits: Any
    hidden: Any = None


@dataclass(frozen=True, slots=True)
class Slotted:
    logits: Any
    hidden: Any = None


class Output(OrderedDict):
    def __getattr__(self, name):
        return self[name]


class Several(list):
    pass


class Locked:
    def __init__(self, tensor):
        self.tensor = tensor

    def __copy__(self):
        raise TypeError("no copies")


FORMS = {
    "tensor": ONE,
    "list": [ONE, "text", None],
    "subclass of list": Several([ONE, TWO]),
    "named tuple": Point(ONE, [TWO]),
    "mapping": {"a": ONE, "b": {"c": TWO}},
    "subclass of a mapping": Output(logits=ONE, hidden=(TWO, TWO)),
    "dataclass": Plain(ONE, [TWO]),
    "dataclass with slots": Slotted(ONE, Plain(TWO)),
    "namespace": SimpleNamespace(logits=ONE, more=SimpleNamespace(hidden=TWO)),
    "no tensors": ["text", 3, None],
}


@pytest.mark.parametrize("name", FORMS)
def test_every_tensor_is_replaced_in_a_copy(name):
    outputs = FORMS[name]
    before = [tensor.clone() for tensor in list_tensors(outputs)]
    changed = map_tensors(lambda tensor: tensor + 1, outputs)
    assert type(changed) is type(outputs)
    after = list_tensors(changed)
    assert [t.tolist() for t in after] == [(t + 1).tolist() for t in before]
    assert [t.tolist() for t in list_tensors(outputs)] == [t.tolist() for t in before]


def test_how_many_there_are():
    counts = {name: len(list_tensors(outputs)) for name, outputs in FORMS.items()}
    assert list(counts.values()) == [1, 1, 2, 2, 2, 3, 2, 2, 2, 0]


def test_attributes_that_refer_back_end():
    loop = SimpleNamespace(tensor=ONE)
    loop.owner = loop
    assert all(torch.equal(tensor, ONE) for tensor in list_tensors(loop))


def test_what_cannot_be_copied_stays():
    locked = Locked(ONE)
    assert map_tensors(lambda tensor: tensor + 1, locked) is locked
    module = nn.Linear(1, 1)
    assert map_tensors(lambda tensor: tensor + 1, [module])[0] is module
