import functools
import json
import platform
from collections import OrderedDict
from dataclasses import asdict

import pytest
import torch
from saving import header
from torch import nn

from ddp_sgd.checkpointing.serialization import read_tensors, refuse_foreign, write_checkpoint
from ddp_sgd.checkpointing.store import CheckpointFolder, SkippedSteps
from ddp_sgd.config import RunConfig
from ddp_sgd.data.order import ORDER
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers
from ddp_sgd.engine.train_state import (
    State,
    describe_loss,
    other_state_dict,
    run_state_dict,
)
from ddp_sgd.errors import ConfigError, ExitCode
from ddp_sgd.optim.sgd import build_sgd
from ddp_sgd.plan import make_plan


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    return model


def gather(step, *, data=None, model=None, optimizer=None, world_size=1, **state):
    config = RunConfig(epochs=3, data={"batch_size": 8} | (data or {}))
    model = model or nn.Linear(2, 2)
    return run_state_dict(
        State(step=step, **state),
        model=model,
        optimizer=optimizer or build_sgd(model, momentum=0.9),
        plan=make_plan(config, samples=100, world_size=world_size),
        config=config.model_dump(mode="json"),
        run_id="0a1b2c3d",
        loss="x()",
    )


@pytest.mark.parametrize(
    ("step", "epoch", "position", "samples"),
    [
        (0, 0, 0, 0),
        (1, 0, 16, 16),
        (6, 0, 96, 96),
        (7, 1, 0, 100),  # the last step of an epoch trained four samples
        (10, 1, 48, 148),
        (14, 2, 0, 200),
        (21, 3, 0, 300),
    ],
)
def test_a_header_says_where_the_next_step_begins(step, epoch, position, samples):
    head, _ = gather(step, world_size=2)
    assert (head.step, head.epoch, head.position, head.samples) == (step, epoch, position, samples)
    assert head.world_size == 2


def test_a_dropped_tail_does_not_count():
    head, _ = gather(6, world_size=2, data={"tail": "drop"})
    assert (head.epoch, head.position, head.samples) == (1, 0, 96)


def test_a_header_says_what_the_run_is():
    head, _ = gather(3, scores={"eval/accuracy": 0.5}, scored_at=3, skipped=SkippedSteps(4, 1, 2))
    assert (head.scores, head.scored_at, head.skipped) == ({"eval/accuracy": 0.5}, 3, (4, 1, 2))
    assert head.is_scored
    assert head.versions == {
        "ddp_sgd": head.versions["ddp_sgd"],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "order": ORDER,
    }
    assert RunConfig.model_validate(head.config).data.batch_size == 8
    assert head.plan["global_batch"] == 8
    assert json.loads(json.dumps(asdict(head)))["plan"] == head.plan


def test_later_scores_do_not_change_an_earlier_header():
    state = State(scores={"eval/loss": 1.0})
    head, _ = gather(0, scores=state.scores)
    state.scores["eval/loss"] = 2.0
    assert head.scores == {"eval/loss": 1.0}


def test_tensors_are_gathered_where_they_are_by_name():
    model = tied()
    optimizer = build_sgd(model, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step(0.1)
    _, tree = gather(1, model=model, optimizer=optimizer)
    assert list(tree["model"]) == list(model.state_dict())
    assert tree["model"]["0.weight"].data_ptr() == model[0].weight.data_ptr()
    momentum = tree["optimizer"]["momentum_buffer"]
    assert list(momentum) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert momentum["0.weight"] is optimizer.momentum_buffers[model[0].weight]


def test_without_momentum_there_are_no_momentum_buffers():
    model = nn.Linear(2, 2)
    optimizer = build_sgd(model)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step(0.1)
    assert gather(1, model=model, optimizer=optimizer)[1]["optimizer"] == {"momentum_buffer": {}}


PLAIN = {
    "tensor": torch.zeros(2),
    "parameter": nn.Parameter(torch.zeros(2)),
    "size": torch.Size([2, 3]),
    "numbers": [1, 2.5, True, None, 1 + 2j],
    "text": ("a", b"b"),
    "nested": OrderedDict({"x": {"y": [torch.zeros(1)]}, 3: 4}),
}


def test_what_is_not_refused_comes_back_from_a_file(tmp_path):
    refuse_foreign(PLAIN)
    manifest = write_checkpoint(CheckpointFolder(tmp_path), header(), {"model": PLAIN}, keep=1)
    back = read_tensors(tmp_path / manifest.file)["model"]
    assert {key: back[key] for key in ("numbers", "text", "size")} == {
        key: PLAIN[key] for key in ("numbers", "text", "size")
    }
    assert back["nested"]["x"]["y"][0].equal(torch.zeros(1))


class Derived(torch.Tensor):
    """A tensor that is more than one."""


class Named(tuple):
    """A tuple that is more than one."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("tree", "path", "kind"),
    [
        ({"a": {"b": object()}}, "model.a.b", "object"),
        ({"a": [0, {1}]}, "model.a.1", "set"),
        ({"a": lambda: 0}, "model.a", "function"),
        ({"a": (torch.zeros(1), torch.Generator())}, "model.a.1", "Generator"),
        ({"a": torch.float32}, "model.a", "dtype"),
        ({"a": torch.zeros(1).as_subclass(Derived)}, "model.a", "Derived"),
        ({"a": Named((1, 2))}, "model.a", "Named"),
        ({frozenset(): 1}, "model.frozenset()", "frozenset"),
    ],
)
def test_what_a_reader_would_not_take_is_named(tree, path, kind):
    with pytest.raises(ConfigError) as caught:
        refuse_foreign(tree)
    assert str(caught.value) == (
        f"the state {path} is a {kind}, which a checkpoint cannot hold; keep tensors and plain "
        "numbers, text, lists and mappings in the state of the model."
    )
    assert caught.value.exit_code == ExitCode.CONFIG


class Odd(nn.Module):
    """A loss with state of its own besides tensors."""

    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


class Called:
    """A loss that is an object which can be called."""

    def __call__(self, outputs, targets):
        return (outputs - targets).mean()


ENTROPY = "torch.nn.modules.loss.CrossEntropyLoss"


@pytest.mark.parametrize(
    ("loss", "described"),
    [
        (nn.CrossEntropyLoss(), f"{ENTROPY}()"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), f"{ENTROPY}(weight (3,))"),
        (nn.functional.cross_entropy, "torch.nn.functional.cross_entropy()"),
        (
            functools.partial(nn.functional.cross_entropy, label_smoothing=0.1),
            "torch.nn.functional.cross_entropy()",
        ),
        (
            functools.partial(nn.CrossEntropyLoss(weight=torch.ones(3))),
            f"{ENTROPY}(weight (3,))",
        ),
        (lambda outputs, targets: 0.0, f"{__name__}.<lambda>()"),
        (Odd(), f"{__name__}.Odd()"),
        (Called(), f"{__name__}.Called()"),
    ],
)
def test_a_loss_is_named_by_what_it_is_and_the_shapes_that_it_holds(loss, described):
    assert describe_loss(loss) == described


class Counting(nn.Module):
    """A persistent buffer, one that steps change and the state lacks, and one that stays."""

    def __init__(self):
        super().__init__()
        self.register_buffer("saved", torch.zeros(1))
        self.register_buffer("moving", torch.zeros(2), persistent=False)
        self.register_buffer("table", torch.ones(3), persistent=False)


def test_buffers_that_the_state_of_the_model_lacks():
    model, loss = nn.Sequential(Counting()), nn.CrossEntropyLoss(weight=torch.ones(4))
    places = [(model[0], "saved"), (model[0], "moving")]
    others = other_state_dict(model, {"loss": loss}, TrainingBuffers(places, [], Runtime()))
    assert others == {
        "buffers": {"0.moving": model[0].moving},
        "loss_buffers": {"loss.weight": loss.weight},
    }
    none = TrainingBuffers([], [], Runtime())
    assert other_state_dict(model, {"loss": nn.CrossEntropyLoss()}, none) == {}
