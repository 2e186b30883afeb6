"""Trees of any form; outputs of real models in tests/models."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddp_sgd.tree import (
    bytes_of,
    describe,
    leaves,
    list_tensors,
    map_leaves,
    map_tensors,
    tensors_in,
)

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


TREES = st.recursive(
    st.integers(0, 9) | st.none(),
    lambda trees: (
        st.lists(trees, max_size=3)
        | st.lists(trees, max_size=3).map(tuple)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=2), trees, max_size=3)
        | st.tuples(trees, trees).map(lambda pair: Point(*pair))
    ),
)


@given(TREES)
def test_a_path_leads_to_its_leaf(tree):
    for path, leaf in leaves(tree):
        found = tree
        for key in path:
            found = found[key]
        assert found is leaf


@given(TREES)
def test_paths_differ_and_come_in_the_order_of_the_map(tree):
    found = list(leaves(tree))
    assert len({path for path, _ in found}) == len(found)
    seen = []
    map_leaves(seen.append, tree)
    assert seen == [leaf for _, leaf in found]


@given(TREES)
def test_a_map_keeps_the_form_and_leaves_the_tree_alone(tree):
    before = repr(tree)
    assert repr(map_leaves(lambda leaf: leaf, tree)) == before
    changed = map_leaves(str, tree)
    assert repr(tree) == before
    assert list(leaves(changed)) == [(path, str(leaf)) for path, leaf in leaves(tree)]


def test_mappings_become_dicts_and_named_tuples_stay():
    changed = map_leaves(lambda leaf: leaf + 1, Point(OrderedDict(b=1, a=2), Several([3])))
    assert type(changed) is Point
    assert type(changed.x) is dict
    assert type(changed.y) is Several
    assert changed == Point({"b": 2, "a": 3}, [4])
    assert list(changed.x) == ["b", "a"]


def test_a_container_may_be_a_leaf():
    tree = {"a": [1, 2], "b": (3, [])}
    found = list(leaves(tree, is_leaf=lambda each: isinstance(each, list)))
    assert found == [(("a",), [1, 2]), (("b", 0), 3), (("b", 1), [])]
    lengths = map_leaves(
        lambda leaf: len(leaf) if isinstance(leaf, list) else leaf,
        tree,
        is_leaf=lambda each: isinstance(each, list),
    )
    assert lengths == {"a": 2, "b": (3, 0)}
    assert list(leaves([], is_leaf=lambda _: True)) == [((), [])]


def test_tensors_come_in_the_order_of_the_tree():
    assert list(tensors_in({"b": (TWO, "text"), "a": [ONE, {"c": TWO}]})) == [TWO, ONE, TWO]
    assert list(tensors_in(ONE)) == [ONE]
    assert list(tensors_in(Plain(ONE))) == []  # whose attributes only ``list_tensors`` looks at


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


MATRIX = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "tensor",
    [
        MATRIX,
        MATRIX.t(),
        MATRIX[:, ::2],
        torch.ones(1).expand(5),
        torch.ones(1).expand(5).narrow(0, 0, 1),  # one element with a stride of 0
        torch.tensor(3),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        MATRIX.to(torch.bfloat16),
        MATRIX.to(torch.float8_e4m3fn),
        MATRIX.to(torch.uint16),
        torch.complex(MATRIX, -MATRIX).conj(),
        MATRIX.clone().requires_grad_(),
    ],
)
def test_bytes_are_those_of_the_numbers_in_order(tensor):
    found = bytes_of(tensor)
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    plain.copy_(tensor.detach())
    assert found.dtype == torch.uint8
    assert found.shape == (tensor.numel() * tensor.element_size(),)
    assert bytes(found.tolist()) == bytes(plain.reshape(-1).view(torch.uint8).tolist())


def test_contiguous_memory_is_shared():
    assert bytes_of(MATRIX).data_ptr() == MATRIX.data_ptr()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_tensors_differ_by_place_and_value(kind):
    eye = torch.eye(3)
    one, same, other, moved = (getattr(t, kind)() for t in (eye, eye, 2 * eye, eye.flip(0)))
    assert torch.equal(bytes_of(one), bytes_of(same))
    assert not torch.equal(bytes_of(one), bytes_of(other))
    assert not torch.equal(bytes_of(one), bytes_of(moved))


@pytest.mark.filterwarnings("ignore")  # torch calls quantized tensors deprecated
def test_quantized_tensors():
    quantized = torch.quantize_per_tensor(MATRIX, 0.5, 0, torch.qint8)
    assert bytes_of(quantized).tolist() == [0, 2, 4, 6, 8, 10]


def test_types_and_shapes_are_described():
    assert describe(torch.zeros(2, 3)) == "float32 of shape (2, 3)"
    assert describe([1]) == "a list of (a int)"
    assert describe({"a": torch.zeros(1)}) == "a dict of (a: float32 of shape (1,))"
    assert describe(list(range(9))).endswith("a int, ...)")
    assert describe(7) == "a int"
