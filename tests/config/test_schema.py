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
    ],
)
def test_what_can(values):
    RunConfig.model_validate(values)


def test_a_run_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().epochs = 3
