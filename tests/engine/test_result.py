import json
from dataclasses import replace

import pytest
from ranks import run_ranks

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.data_parallel import DataParallelModel, FlatAllReduce
from ddp_sgd.distributed.progress import ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.result import build_result, read_result, weights_digest
from ddp_sgd.engine.sync import TimeShares
from ddp_sgd.engine.train_state import State
from ddp_sgd.models import MLP
from ddp_sgd.plan import make_plan

PLAN = make_plan(RunConfig(epochs=2), samples=100, world_size=1)


@pytest.mark.parametrize(("step", "status", "code"), [(8, "finished", 0), (3, "stopped", 75)])
def test_a_run_is_finished_with_its_last_step(step, status, code):
    model = MLP(2, [], 2)
    state, shares = (
        State(step, {"eval/accuracy": 0.5}),
        TimeShares(ProgressTracker(), Runtime(), ()),
    )
    result = build_result(state, PLAN, DataParallelModel(model, Runtime()), shares, Runtime())
    assert result.as_row() == {
        "status": status,
        "exit_code": code,
        "step": step,
        "epoch": PLAN.epoch_at(step),
        "samples": PLAN.samples_at(step),
        "world_size": 1,
        "eval/accuracy": 0.5,
        "share/data": 0.0,
        "share/compute": 0.0,
        "share/waiting": 0.0,
        "share/bookkeeping": 0.0,
        "weights_digest": weights_digest(model),
    }


def drift(runtime):
    wrapper = FlatAllReduce(MLP(2, [], 2), runtime)
    if runtime.rank == 1:
        next(wrapper.inner.parameters()).data[0, 0] += 1e-7
    build_result(
        State(8), PLAN, wrapper, TimeShares(ProgressTracker(), runtime, wrapper.meets_in), runtime
    )


def test_replicas_that_drifted_apart_are_found():
    errors = run_ranks(2, drift, raises=True)
    assert {"RuntimeError"} <= {error.error for error in errors} <= {"RuntimeError", "RemoteError"}
    assert any("the weights differ between ranks" in error.text for error in errors)


def test_the_most_memory_of_any_rank_is_part_of_the_result(tmp_path):
    model = MLP(2, [], 2)
    shares = TimeShares(ProgressTracker(), Runtime(), ())
    result = build_result(State(8), PLAN, DataParallelModel(model, Runtime()), shares, Runtime())
    assert result.peak_bytes is None  # on the CPU
    result = replace(result, peak_bytes=12)
    assert result.as_row()["memory/peak_bytes"] == 12
    (tmp_path / "result.json").write_text(json.dumps(result.as_row()))
    assert read_result(tmp_path) == result
