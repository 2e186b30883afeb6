"""Rates of a run: the same on all ranks, as numbers and on the device."""

import pytest
import torch
from ranks import RankError, run_ranks
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.rates import Rates, require_equal_curves
from ddp_sgd.optim.sgd import RateTable, build_sgd
from ddp_sgd.plan import make_plan

PLAN = make_plan(RunConfig(optim={"lr": 0.5}, steps=40), samples=320, world_size=1)
LINE = "schedule.curve, with the warm-up, is "


def test_a_rate_is_the_factor_of_the_peak_and_momentum_is_set_with_it():
    optimizer = build_sgd(nn.Linear(2, 2), momentum=0.9)
    rates = Rates(PLAN, lambda step: 1 / (1 + step), lambda step: step / 10, None)
    assert (rates.lr_at(0), rates.lr_at(4)) == (0.5, 0.1)
    assert rates.begin_step(4, 0.1, optimizer) == 0.1
    assert optimizer.momentum == 0.4


def test_momentum_that_does_not_change_stays_as_it_is():
    optimizer = build_sgd(nn.Linear(2, 2), momentum=0.9)
    Rates(PLAN, lambda _: 1.0, None, None).begin_step(4, 0.5, optimizer)
    assert optimizer.momentum == 0.9


def test_a_step_reads_its_rate_from_the_table_if_there_is_one():
    table = RateTable(lambda step: step / 8, 40, torch.device("cpu"))
    rates = Rates(PLAN, lambda _: 1.0, None, table)
    rate = rates.begin_step(3, 0.5, build_sgd(nn.Linear(2, 2)))
    assert isinstance(rate, torch.Tensor)
    assert rate.item() == 3 / 8


def train(runtime, folder, rank):
    curve = {"class_path": "user_code.OtherOnRank", "init_args": {"rank": rank, "begin": 7}}
    config = RunConfig(
        output_dir=str(folder),
        wandb={"mode": "disabled"},
        steps=20,
        data={"batch_size": 4},
        schedule={"curve": curve},
    )
    samples = TensorDataset(torch.ones(40, 2), torch.zeros(40, dtype=torch.int64))
    return fit(config, runtime, model=nn.Linear(2, 2), train_set=samples).step


def test_a_curve_that_differs_between_ranks_is_refused_before_the_first_step(tmp_path):
    errors = run_ranks(2, train, tmp_path, 1, raises=True)
    assert all(isinstance(error, RankError) for error in errors)
    assert {error.error for error in errors} == {"ConfigError", "RemoteError"}
    assert f"{LINE}1.0 on rank 0" in str(errors[0])
    assert "at step 7 of the run; work it out from the arguments alone." in str(errors[0])
    assert run_ranks(2, train, tmp_path, 5) == [20, 20]


def test_alone_there_is_nobody_to_compare_with():
    calls = []
    require_equal_curves(calls.append, PLAN, Runtime())
    assert calls == []


@pytest.mark.parametrize("total_steps", [1, 999, 1000, 1001, 10**6])
def test_at_most_a_thousand_steps_are_compared(total_steps, monkeypatch):
    monkeypatch.setattr("ddp_sgd.engine.rates.gather_over_ranks", lambda value, _: [value])
    calls = []
    plan = make_plan(RunConfig(steps=total_steps), samples=320, world_size=1)
    require_equal_curves(lambda step: calls.append(step) or 1.0, plan, Runtime(world_size=2))
    assert calls[0] == 0
    assert min(total_steps, 500) <= len(calls) <= 1000
