import pytest
from pydantic import ValidationError

from ddp_sgd.config import ParallelConfig, RunConfig, RuntimeConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"replica": "flat", "static_graph": True},
            "parallel.static_graph is true while parallel.replica is flat",
        ),
        (
            {"replica": "flat", "find_unused_parameters": True},
            "parallel.find_unused_parameters is true while parallel.replica is flat",
        ),
        (
            {"replica": "flat", "compression": "bf16"},
            "parallel.compression is bf16 while parallel.replica is flat",
        ),
        (
            {"compression": "fp16", "local_sgd": {"start_step": 10}},
            "parallel.compression is fp16 while parallel.local_sgd.start_step is 10",
        ),
        (
            {"compression": "powersgd", "static_graph": True},
            "parallel.compression is powersgd while parallel.static_graph is true",
        ),
        (
            {"compression": "powersgd", "find_unused_parameters": True},
            "set parallel.find_unused_parameters=false",
        ),
        (
            {"replica": "ddp", "local_sgd": {"start_step": 0}},
            "parallel.replica is ddp while parallel.local_sgd.start_step is 0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**options)


def test_a_save_between_two_averages_is_refused_with_a_number_that_fits():
    local = {"local_sgd": {"start_step": 100, "period": 8}}
    with pytest.raises(ValidationError, match="checkpoint.every_steps=16"):
        RunConfig(parallel=local, checkpoint={"every_steps": 20})
    RunConfig(parallel=local, checkpoint={"every_steps": 24})
    RunConfig(parallel={"local_sgd": {"period": 8}}, checkpoint={"every_steps": 20})  # never local


def test_a_deadline_is_a_date():
    RuntimeConfig(deadline="2026-12-24T18:00:00+01:00")
    with pytest.raises(ValidationError, match="give a date such as"):
        RuntimeConfig(deadline="2026-13-45T99:99")
