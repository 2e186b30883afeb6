import math

import numpy as np
import pytest
import torch

from ddp_sgd.tree import (
    Difference,
    compare_plain,
    compare_trees,
    difference_lines,
    misfits,
)


def test_equal_trees_do_not_differ():
    tree = {"a": torch.tensor([1.0, math.nan]), "b": {"c": [1, "x", torch.zeros(0)]}, "d": {}}
    assert compare_trees(tree, tree) == []
    assert compare_trees({}, {}) == []
    assert difference_lines([]) == []


def test_distances_are_those_of_numpy():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 5)).astype(np.float32)
    b = a.copy()
    b[1, 2] += 0.5
    b[2, 0] -= 2.0
    (found,) = compare_trees({"w": torch.from_numpy(a)}, {"w": torch.from_numpy(b)})
    distance = b.astype(np.float64) - a
    assert (found.name, found.elements, found.differing) == ("w", 15, 2)
    assert found.max_abs == np.abs(distance).max()
    expected = np.linalg.norm(distance) / np.linalg.norm(a.astype(np.float64))
    assert found.relative == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("a", "b", "relative"),
    [
        (torch.zeros(2), torch.ones(2), math.inf),
        (torch.tensor([0.0]), torch.tensor([-0.0]), 0.0),  # another byte, no distance
        (torch.tensor([True]), torch.tensor([False]), 1.0),
        (torch.tensor(3), torch.tensor(6), 1.0),
        (torch.tensor([3j]), torch.tensor([6j]), 1.0),
        (torch.ones(4, dtype=torch.bfloat16).view(2, 2).T, torch.zeros(2, 2).bfloat16(), 1.0),
    ],
)
def test_any_type_can_be_compared(a, b, relative):
    (found,) = compare_trees([a], [b])
    assert found.relative == pytest.approx(relative)
    assert found.differing == a.numel()


def test_what_cannot_be_compared_is_said():
    first = {"a": torch.zeros(2), "b": torch.zeros(2), "c": 1, "e": 3}
    second = {"b": torch.zeros(2, dtype=torch.float64), "c": 2, "d": torch.zeros(3), "e": 3}
    found = {entry.name: entry.misfit for entry in compare_trees(first, second)}
    assert found == {
        "a": "float32 (2,) -> absent",
        "b": "float32 (2,) -> float64 (2,)",
        "c": "1 -> 2",
        "d": "absent -> float32 (3,)",
    }
    assert misfits(first, second) == [
        "a was float32 (2,), is absent",
        "b was float32 (2,), is float64 (2,)",
        "d was absent, is float32 (3,)",
    ]


def test_settings_are_named_by_their_path():
    first = {"step": 3, "config": {"optim": {"lr": 0.1}, "tags": [], "gone": None}}
    second = {"step": 4, "config": {"optim": {"lr": 0.2}, "tags": ["x"]}}
    assert compare_plain(first, second) == [
        "step: 3 -> 4",
        "config.optim.lr: 0.1 -> 0.2",
        "config.tags: [] -> absent",
        "config.gone: None -> absent",
        "config.tags.0: absent -> x",
    ]


def test_the_table_is_short_and_has_the_largest_on_top():
    many = [
        Difference(name=f"w{n}", elements=9, differing=1, max_abs=0.5, relative=n / 1000)
        for n in range(50)
    ]
    many.append(Difference(name="odd", elements=1, differing=1))
    many.append(Difference(name="new", misfit="absent -> a dict"))
    lines = difference_lines(many)
    assert [line.split()[0] for line in lines[:4]] == ["tensor", "new", "odd", "w49"]
    assert len(lines) == 42
    assert lines[-1] == "and 12 more"
