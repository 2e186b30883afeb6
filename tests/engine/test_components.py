from functools import partial

import pytest
import torch
from gathered import gather
from torch import nn

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits
from ddp_sgd.engine.components import ready_model
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.engine.resume import ResumePoint
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.models import MLP

FRESH = ResumePoint(run_id="cafe0123")
DATA = ("train", "eval", "collate")
NOTHING = {"model": None, "loss": None, "train_set": None, "eval_set": None}


def test_everything_from_the_configuration():
    components = gather(RunConfig(), **NOTHING)
    assert isinstance(components.model, MLP)
    assert isinstance(components.loss, nn.CrossEntropyLoss)
    assert (len(components.train_set), len(components.eval_sets["data.eval"])) == (1437, 360)


def test_weights_follow_from_the_seed_alone():
    torch.manual_seed(99)
    first = weights_digest(gather(RunConfig(), **NOTHING).model)
    torch.rand(3)
    assert weights_digest(gather(RunConfig(), **NOTHING).model) == first
    assert weights_digest(gather(RunConfig(seed=1), **NOTHING).model) != first


def test_what_is_given_is_taken():
    given = {
        "model": MLP(64, [], 10),
        "loss": nn.CrossEntropyLoss(),
        "train_set": Digits(),
        "eval_set": None,
    }
    components = gather(RunConfig(), **given)
    assert (components.model, components.loss, components.train_set) == (
        given["model"],
        given["loss"],
        given["train_set"],
    )
    assert components.eval_sets == {}  # the digits are not held out from somebody else's data


@pytest.mark.parametrize(
    ("key", "component", "error", "message"),
    [
        ("model", "builtins.dict", ConfigError, "model is a dict; name a torch.nn.Module"),
        ("loss", "builtins.object", ConfigError, "loss is a object; name a module or function"),
        ("train", "builtins.object", ConfigError, "data.train is a object"),
        ("eval", "builtins.list", DataError, "data.eval is empty"),
        (
            "collate",
            "builtins.object",
            ConfigError,
            "data.collate is a object; name a function from a list of samples to a batch",
        ),
        (
            "train",
            "ddp_sgd.data.Nothing",
            ConfigError,
            "data.train.class_path is ddp_sgd.data.Nothing",
        ),
    ],
)
def test_the_wrong_kind_is_named(key, component, error, message):
    section = {"class_path": component}
    config = RunConfig(**({"data": {key: section}} if key in DATA else {key: section}))
    with pytest.raises(error, match=message):
        gather(config, **NOTHING)


class PartlyFrozen(nn.Module):
    """The usual way to keep batch normalization frozen: a ``train`` of one's own."""

    def __init__(self):
        super().__init__()
        self.norm, self.free = nn.BatchNorm1d(64), nn.BatchNorm1d(64)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_s_own_train_is_called(wrap, training):
    module = PartlyFrozen()
    model = wrap(module)
    if not training:
        nn.Module.train(model, mode=False)
    ready_model(RunConfig().model, 0, model)
    assert (module.training, module.norm.training, module.free.training) == (True, False, True)


def test_parts_that_were_put_into_evaluation_mode_stay_there():
    model = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10).eval())
    ready_model(RunConfig().model, 0, model)
    assert [module.training for module in model] == [True, False]


def test_lazy_modules_have_their_shapes_before_anything_is_compared():
    given = NOTHING | {"model": nn.Sequential(nn.LazyLinear(10)), "train_set": Digits()}
    components = gather(RunConfig(), **given)
    assert components.model[0].weight.shape == (10, 64)


def test_functions_of_torch_become_modules_and_keep_their_names():
    given = NOTHING | {"loss": partial(nn.functional.cross_entropy, label_smoothing=0.1)}
    components = gather(RunConfig(), **given)
    assert isinstance(components.loss, nn.CrossEntropyLoss)
    assert components.loss.label_smoothing == 0.1
    assert components.loss_name == "torch.nn.functional.cross_entropy()"
