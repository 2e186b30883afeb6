"""Post-local SGD: ranks go their own ways and meet again."""

import pytest
import torch
from ranks import run_ranks

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits
from ddp_sgd.distributed import data_parallel
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.models import MLP
from ddp_sgd.optim.sgd import SGD
from ddp_sgd.report.journal import read_journal


def life(runtime, folder, local, stop_after=-1, **changes):
    """One life of a run; gives the result, the weights, and which steps left ranks different."""
    torch.manual_seed(0)
    model, wish, taken, step = MLP(64, [16], 10), StopRequest(), [0], SGD.step
    digests = []

    def counted(*arguments):
        step(*arguments)
        taken[0] += 1
        if taken[0] == stop_after and runtime.rank == 1:
            wish.ask("the test")

    config = RunConfig(
        **{
            "name": "x",
            "output_dir": str(folder),
            "epochs": 2,
            "log": {"every_steps": 3},
            "data": {"batch_size": 32, "eval": None},
            "optim": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
            "parallel": {"local_sgd": local},
            "wandb": {"mode": "disabled"},
        }
        | changes
    )
    SGD.step = counted
    average = data_parallel.LocalSGD.average

    def averaged(wrapper):
        digests.append(weights_digest(model))
        average(wrapper)
        digests.append(weights_digest(model))

    data_parallel.LocalSGD.average = averaged
    result = fit(config, runtime, model=model, train_set=Digits(), stop=wish)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    return result.status, result.step, result.weights_digest, weights, digests


def test_with_a_period_of_one_step_it_is_plain_sgd(tmp_path):
    """Averaging weights after a step from the same place is stepping by the average.

    46 steps of float32 rounding, 6e-8 each, fourfold through a momentum of 0.9.
    """
    plain, _ = run_ranks(2, life, tmp_path / "plain", {})
    local, _ = run_ranks(2, life, tmp_path / "local", {"start_step": 5, "period": 1})
    assert local[1] == plain[1] == 46
    assert len(local[4]) == 2 * (46 - 5)
    assert abs(local[3] - plain[3]).max() <= 2e-6 * abs(plain[3]).max()


def test_ranks_differ_in_between_and_meet_again(tmp_path):
    local = {"start_step": 4, "period": 5}
    (*_, digest, _, first), (*_, same, _, second) = run_ranks(2, life, tmp_path, local)
    assert digest == same
    apart, together = slice(0, None, 2), slice(1, None, 2)
    assert first[together] == second[together]
    assert not set(first[apart]) & set(second[apart])
    # Steps 5 to 45 on the grid of 5, and the ends of epochs, 23 and 46.
    assert len(first[together]) == len(range(5, 46, 5)) + 2
    rows = [
        r["step"] for r in read_journal(tmp_path / "x" / "metrics.jsonl") if r["event"] == "train"
    ]
    # Every 3 steps as long as ranks are equal, then at the first step where they meet.
    assert rows == [3, 10, 15, 20, 23, 25, 30, 35, 40, 45, 46]


@pytest.mark.parametrize("stop_after", [2, 7, 23, 31])
def test_a_stop_waits_until_ranks_meet_and_changes_nothing(stop_after, tmp_path):
    local = {"start_step": 4, "period": 5}
    whole, _ = run_ranks(2, life, tmp_path / "whole", local)
    stopped, _ = run_ranks(2, life, tmp_path / "parts", local, stop_after)
    assert stopped[0] == "stopped"
    # At a row, every 3 steps, if there is no beat before; then where ranks meet.
    assert stopped[1] in {2: (2, 3), 7: (10,), 23: (23,), 31: (35,)}[stop_after]
    rest, _ = run_ranks(2, life, tmp_path / "parts", local)
    assert rest[:3] == whole[:3]


def test_alone_nothing_is_averaged(tmp_path):
    (one,) = run_ranks(1, life, tmp_path / "local", {"start_step": 0, "period": 5})
    (other,) = run_ranks(1, life, tmp_path / "plain", {})
    assert one[2] == other[2]
    assert one[4] == []
