import pytest
import torch
from gathered import context_of, gather
from torch import nn
from user_code import Pad

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits, InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.resume import ResumePoint
from ddp_sgd.errors import ConfigError
from ddp_sgd.models import MLP

FRESH = ResumePoint(run_id="cafe0123")
DATA = ("train", "eval", "collate")
NOTHING = {"model": None, "loss": None, "train_set": None, "eval_set": None}


def test_a_collate_function_is_built_once_and_tried_on_both_data_sets():
    sentences = {"class_path": "user_code.Sentences"}
    model = {
        "class_path": "ddp_sgd.models.MLP",
        "init_args": {"inputs": 3, "hidden": [], "classes": 2},
    }
    data = {"train": sentences, "eval": sentences, "collate": {"class_path": "user_code.Pad"}}
    config = RunConfig(data=data, model=model)
    components = gather(config, **NOTHING)
    assert isinstance(components.reading.collate, Pad)
    context_of(config, components, Runtime(), FRESH)
    assert gather(RunConfig(), **NOTHING).reading.collate is None


def test_evaluation_may_be_left_out():
    config = RunConfig(data={"eval": None})
    components = gather(config, **NOTHING)
    assert components.eval_sets == {}
    assert context_of(config, components, Runtime(), FRESH).score(lambda: False) == {}


def test_held_out_data_are_tried_as_well():
    config = RunConfig()
    wrong = InMemory(torch.zeros(4, 3), torch.zeros(4).long())
    components = gather(config, **NOTHING | {"train_set": Digits(), "eval_set": wrong})
    with pytest.raises(ConfigError, match=r"on inputs of float32 of shape \(4, 3\), RuntimeError"):
        context_of(config, components, Runtime(), FRESH)


def test_a_pretrained_model_is_trained_in_training_mode():
    components = gather(RunConfig(), **NOTHING | {"model": MLP(64, [], 10).eval()})
    assert components.model.training
    partly = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout().eval())
    components = gather(RunConfig(), **NOTHING | {"model": partly})
    assert [module.training for module in components.model] == [True, True, False]
