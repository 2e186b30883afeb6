import pytest
from pydantic import ValidationError

from ddp_sgd.config.schema import RunConfig


@pytest.mark.parametrize(
    "values",
    [
        {"parallel": {"static_graph": True}, "data": {"accumulate": 2}},
        {"name": ".."},
        {"name": "a/b"},
        {"name": "x" * 201},
        {"name": ""},
        {"steps": 0},
        {"steps": 10, "epochs": 3},
        {"steps": 10, "on_resize": "rescale"},
        {"schedule": {"momentum_start": 0.5}, "optim": {"momentum": 0}},
    ],
)
def test_what_cannot_be_together(values):
    with pytest.raises(ValidationError):
        RunConfig.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": {"name": "step", "milestones": [19.5]}},
        {"schedule": {"name": "step", "milestones": [20]}},  # of 20 epochs
        {"schedule": {"warmup_epochs": 21}},
        {"parallel": {"static_graph": True}},
        {"data": {"eval": None}},
        {"name": "a.b-c_1"},
        {"steps": 10},
        {"steps": 10, "epochs": 20},  # the default, as in the configuration that a run leaves
        {"steps": None, "epochs": 3},
        {"schedule": {"momentum_start": 0.5, "warmup_epochs": 1}},
    ],
)
def test_what_can(values):
    RunConfig.model_validate(values)


def test_two_lengths_are_refused_with_both_values():
    with pytest.raises(ValidationError) as caught:
        RunConfig(steps=10, epochs=3)
    (fault,) = caught.value.errors()
    assert str(fault["ctx"]["error"]) == (
        "epochs is 3 while steps is 10; leave one of them out, or set steps=null"
    )


def test_a_run_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().epochs = 3
