"""Runs with an order of the user's: the same steps on any split, and after a stop."""

import numpy as np
import pytest
import torch
from graphs import Again
from orders import data, named, train, with_repeats
from ranks import run_ranks
from torch import nn

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import captured_step
from ddp_sgd.report.journal import read_journal

ORDERS = {"computed": named(with_repeats), "sequential": "sequential"}


def by_hand(indices_of):
    """Train as the configuration of ``train`` says, by torch alone, on whole global batches."""
    torch.manual_seed(0)
    model, (inputs, targets) = nn.Linear(3, 4).double(), data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        indices = torch.as_tensor(indices_of(epoch))
        for batch in indices.split(8):
            loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


CONSTANT = {"schedule": {"name": "constant"}, "optim": {"reference_batch": 8}}


@pytest.mark.parametrize("name", ORDERS)
def test_the_steps_are_those_of_a_plain_loop_over_the_order(name, tmp_path):
    def indices_of(epoch):
        return with_repeats(30, 0, epoch, 8) if name == "computed" else np.arange(30)

    result, weights = train(Runtime(), tmp_path, ORDERS[name], **CONSTANT)
    assert result.samples == 3 * len(indices_of(0))
    torch.testing.assert_close(weights, by_hand(indices_of), rtol=1e-12, atol=1e-12)


def _many(runtime, folder):
    """All that two ranks do: the whole run, one that is stopped, and the end of one rank's."""
    order, half = ORDERS["computed"], {"batch_size": 2, "accumulate": 2}
    whole = train(runtime, f"{folder}/whole", order, data=half, **CONSTANT)
    for looks in (7, None):
        parts = train(runtime, f"{folder}/parts", order, looks=looks, data=half, **CONSTANT)
    grown = train(
        runtime, f"{folder}/one", order, data={"batch_size": 4, "accumulate": 2}, **CONSTANT
    )
    runs = (whole, parts, grown)
    return [(result.samples, result.weights_digest, weights.tolist()) for result, weights in runs]


def test_any_split_and_any_stop_take_the_same_steps(tmp_path):
    order = ORDERS["computed"]
    alone, weights = train(Runtime(), tmp_path / "alone", order, **CONSTANT)
    train(
        Runtime(), tmp_path / "one", order, looks=7,
        data={"batch_size": 4, "accumulate": 2}, **CONSTANT,
    )  # fmt: skip
    for whole, parts, grown in run_ranks(2, _many, str(tmp_path)):
        assert whole[:2] == parts[:2]
        assert whole[0] == grown[0] == alone.samples == 111
        for _, _, other in (whole, grown):
            np.testing.assert_allclose(other, weights, rtol=1e-12, atol=1e-12)


def test_a_stop_in_the_middle_of_an_epoch_changes_no_bit(tmp_path):
    whole, _ = train(Runtime(), tmp_path / "whole", ORDERS["computed"])
    for looks in (3, 4, None):
        parts, _ = train(Runtime(), tmp_path / "parts", ORDERS["computed"], looks=looks)
    assert parts.weights_digest == whole.weights_digest
    starts = [row["step"] for row in read_journal(tmp_path / "parts/digits/metrics.jsonl")
              if row["event"] == "resume"]  # fmt: skip
    assert starts == [4, 9]


@pytest.mark.parametrize("name", ORDERS)
def test_loader_processes_read_in_the_same_order(name, tmp_path):
    digests = {
        train(Runtime(), tmp_path / str(workers), ORDERS[name], data={"workers": workers})[
            0
        ].weights_digest
        for workers in (0, 2)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("name", ORDERS)
def test_captured_steps_take_the_same_samples(name, tmp_path, monkeypatch):
    monkeypatch.setattr(captured_step, "new_graph", lambda _: Again())
    digests = {
        train(
            Runtime(),
            tmp_path / str(captured),
            ORDERS[name],
            compute={"cuda_graphs": captured},
            dtype=torch.float32,
        )[0].weights_digest
        for captured in (False, True)
    }
    assert len(digests) == 1


def test_the_first_lines_and_the_plan_say_what_is_read(tmp_path, capsys):
    train(Runtime(), tmp_path, ORDERS["computed"])
    distinct, times = np.unique(with_repeats(30, 0, 0, 8), return_counts=True)
    words = f"reads {len(distinct)} of 30 samples, {(times > 1).sum()} of them more than once"
    assert f"order     with_repeats, {words}\n" in capsys.readouterr().out
