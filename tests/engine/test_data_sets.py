"""Data sets by their keys; what is no data set is in test_sample_batch.py."""

import pytest

from ddp_sgd.config.sections import DataConfig
from ddp_sgd.data import Digits, InMemory
from ddp_sgd.engine.data_sets import gather_data, key_sets
from ddp_sgd.errors import ConfigError

NONE = {"train_set": None, "eval_set": None, "test_set": None}
DIGITS = {"class_path": "ddp_sgd.data.Digits"}
EVAL = DIGITS | {"init_args": {"split": "eval"}}


def test_what_is_not_given_is_built():
    data = DataConfig(eval={"b": EVAL, "a": DIGITS}, test=EVAL)
    built = gather_data(data, **NONE)
    assert len(built.train) == 1437
    assert list(built.held_out) == ["data.eval.b", "data.eval.a"]
    assert [len(each) for each in built.held_out.values()] == [360, 1437]
    assert {key: len(each) for key, each in built.test.items()} == {"data.test": 360}


def test_a_given_training_set_has_no_held_out_set_of_the_configuration_but_its_test_set():
    train_set = Digits()
    data = gather_data(DataConfig(), **NONE | {"train_set": train_set})
    assert data == (train_set, {}, {})
    data = gather_data(DataConfig(test=EVAL), **NONE | {"train_set": train_set})
    assert (data.held_out, list(data.test)) == ({}, ["data.test"])
    test_set = InMemory([0.0], [1])
    data = gather_data(DataConfig(test=EVAL), **NONE | {"test_set": test_set})
    assert (list(data.held_out), data.test["data.test"]) == (["data.eval"], test_set)


@pytest.mark.parametrize("name", ["a b", "a/b", "", "class_path", "args", 3])
def test_names_are_those_of_metrics(name):
    with pytest.raises(ConfigError, match=r"eval_set has a set of the name .*; use letters"):
        key_sets({name: Digits("eval"), "b": Digits("eval")})


def test_a_mapping_of_numbers_is_a_data_set():
    numbered = dict.fromkeys(range(4), (0.0, 0))
    assert key_sets(numbered) == {"data.eval": numbered}
