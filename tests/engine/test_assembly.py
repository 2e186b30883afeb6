import pytest
import torch
from torch import nn
from user_code import Pad

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits, InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.assembly import assemble
from ddp_sgd.engine.components import gather_parts
from ddp_sgd.engine.resume import Past
from ddp_sgd.errors import ConfigError
from ddp_sgd.models import MLP

ANEW = Past(run_id="cafe0123")
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
    parts = gather_parts(config, **NOTHING)
    assert isinstance(parts.collate, Pad)
    assemble(config, parts, Runtime(), ANEW)
    assert gather_parts(RunConfig(), **NOTHING).collate is None


def test_evaluation_may_be_left_out():
    config = RunConfig(data={"eval": None})
    parts = gather_parts(config, **NOTHING)
    assert parts.eval_set is None
    assert assemble(config, parts, Runtime(), ANEW).score(lambda: False) == {}


def test_rates_follow_the_plan():
    config = RunConfig(epochs=10, schedule={"name": "linear"})
    job = assemble(config, gather_parts(config, **NOTHING), Runtime(), ANEW)
    assert job.rate(0) == job.plan.peak_lr == 0.05
    assert job.rate(job.plan.total_steps // 2) == pytest.approx(0.025)


def test_the_model_s_random_numbers_follow_from_the_step():
    config = RunConfig()
    job = assemble(config, gather_parts(config, **NOTHING), Runtime(), ANEW)

    def draw(step):
        job.seed_model(step)
        return torch.rand(4).tolist()

    assert draw(3) == draw(3) != draw(4)


def test_held_out_data_are_tried_as_well():
    config = RunConfig()
    wrong = InMemory(torch.zeros(4, 3), torch.zeros(4).long())
    parts = gather_parts(config, **NOTHING | {"train_set": Digits(), "eval_set": wrong})
    with pytest.raises(ConfigError, match=r"on inputs of float32 of shape \(4, 3\), RuntimeError"):
        assemble(config, parts, Runtime(), ANEW)


def test_a_pretrained_model_is_trained_in_training_mode():
    parts = gather_parts(RunConfig(), **NOTHING | {"model": MLP(64, [], 10).eval()})
    assert parts.model.training
    partly = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout().eval())
    parts = gather_parts(RunConfig(), **NOTHING | {"model": partly})
    assert [module.training for module in parts.model] == [True, True, False]
