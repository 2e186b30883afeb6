import re
from collections import UserDict

import pytest
import torch

from ddp_sgd.config.sections import Component
from ddp_sgd.data import Columns
from ddp_sgd.data.fetcher import Fetcher, Request
from ddp_sgd.data.selection import Selection
from ddp_sgd.errors import DataError
from ddp_sgd.instantiate import instantiate

ROWS = [{"image": number, "label": -number, "file": "x"} for number in range(4)]
TRIPLES = [(number, 10 * number, -number) for number in range(4)]


class Rows:
    """Rows as Hugging Face's ``Dataset`` gives them: columns by name, a list of rows by a list."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return UserDict({name: column[index] for name, column in self.columns.items()})

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_rows_become_pairs():
    data = Columns(ROWS, input="image", target="label")
    assert len(data) == 4
    assert data[2] == (2, -2)


@pytest.mark.parametrize(
    ("input", "target", "pair"),
    [
        (0, 2, (3, -3)),
        (1, 0, (30, 3)),
        (0, -1, (3, -3)),
        ([0, 1], 2, ((3, 30), -3)),
        ([2], [0, 1], ((-3,), (3, 30))),
    ],
)
@pytest.mark.parametrize("kind", [tuple, list])
def test_positions_choose_from_tuples_and_lists(kind, input, target, pair):
    assert Columns([kind(row) for row in TRIPLES], input, target)[3] == pair


@pytest.mark.parametrize(
    ("input", "target", "pair"),
    [
        (["image", "file"], "label", ({"image": 3, "file": "x"}, -3)),
        ("image", ["label"], (3, {"label": -3})),
    ],
)
def test_a_list_of_names_gives_a_mapping(input, target, pair):
    assert Columns(ROWS, input, target)[3] == pair


def test_keys_of_a_mapping_may_be_numbers():
    assert Columns([{0: "a", 7: "b"}], 7, 0)[0] == ("b", "a")


def test_transforms_see_their_own_half():
    data = Columns(ROWS, "image", "label", lambda x: 10 * x, target_transform=lambda y: y - 1)
    assert data[3] == (30, -4)
    assert Columns(TRIPLES, [0, 1], 2, transform=sum)[3] == (33, -3)


@pytest.mark.parametrize(
    ("rows", "input", "message"),
    [
        (ROWS, "digit", "names digit while {} has image, label, file; name one of those."),
        (ROWS, ["image", "digit"], "names digit while {} has image, label, file; name one"),
        (ROWS, 0, "names 0 while {} has image, label, file; name one"),
        ([{}], 0, "names 0 while {} has no columns; name one"),
        (TRIPLES, 3, "names 3 while {} is a tuple of 3; give a position from 0 to 2."),
        (TRIPLES, [0, -4], "names -4 while {} is a tuple of 3; give a position from 0 to 2"),
        (TRIPLES, "image", "names image while {} is a tuple of 3; give a position from 0 to 2"),
        ([1, 2], 0, "names 0 while {} is a int; let samples be mappings, tuples or lists, or"),
    ],
)
def test_a_missing_part_is_named_with_those_that_exist(rows, input, message):
    words = re.escape(message.format("rows[0]"))
    with pytest.raises(DataError, match=f"^input {words}"):
        Columns(rows, input, input)[0]
    with pytest.raises(DataError, match=rf"^data\.input {words}"):
        Selection(input)(rows[0], "rows[0]")


@pytest.mark.parametrize("choice", [1.5, [], [0, "a"], [True], None, {"a": 1}, [None]])
def test_a_choice_is_names_or_positions(choice):
    with pytest.raises(DataError, match=r"^input is .*; give a name, a position, or a list of"):
        Columns(ROWS, choice, "label")
    with pytest.raises(DataError, match=r"^target is "):
        Columns(ROWS, "image", choice)


def test_rows_of_hugging_face_form_batches():
    rows = Rows(ids=torch.arange(12.0).reshape(4, 3), mask=torch.ones(4, 3), label=[3, 2, 1, 0])
    fetcher = Fetcher(Columns(rows, ["ids", "mask"], "label"), "data.train", seed=0)
    inputs, targets = fetcher.__getitems__(Request(0, torch.tensor([2, 0]).numpy()))
    assert inputs["ids"].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert inputs["mask"].shape == (2, 3)
    assert targets.tolist() == [1, 3]


def test_a_configuration_names_parts():
    rows = {"class_path": "builtins.dict", "init_args": {"a": 1, "b": 2, "c": 3}}
    columns = Component(
        class_path="ddp_sgd.data.Columns",
        init_args={"rows": [rows], "input": ["a", "b"], "target": "c"},
    )
    assert instantiate(columns, "data.train")[0] == ({"a": 1, "b": 2}, 3)
