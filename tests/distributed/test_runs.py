"""Whole runs over real ranks: stopping, diverging, reporting, ending with equal weights."""

import json
import os
import signal

import pytest
import torch
from ranks import run_ranks
from torch import nn
from wandb_reader import inspect_offline_run
from wandb_stub import KEY, WandbStub, isolate_wandb

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits, InMemory
from ddp_sgd.data.loader import EvalLoader
from ddp_sgd.data.sampler import EvalSampler
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.evaluation import evaluate
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.losses import Objective
from ddp_sgd.models import MLP, ConvNet
from ddp_sgd.report.journal import read_journal


def describe(folder, **changes):
    return RunConfig(
        output_dir=str(folder),
        **{"wandb": {"mode": "disabled"}, "epochs": 2, "resume": "never"} | changes,
    )


def journal(folder, event):
    return [
        row for row in read_journal(folder / "digits" / "metrics.jsonl") if row["event"] == event
    ]


class Signalled(MLP):
    """On one rank, sends its own process a signal in the middle of a step."""

    def __init__(self, at):
        super().__init__(64, [], 10)
        self.at, self.seen = at, 0

    def forward(self, inputs):
        self.seen += self.training
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(inputs)


def signalled(runtime, folder, victim):
    model = Signalled(at=5 if runtime.rank == victim else -1)
    result = fit(describe(folder, epochs=10_000), runtime, model=model)
    return result.status, result.exit_code, result.step, weights_digest(model)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(victim, tmp_path):
    first, second = run_ranks(2, signalled, tmp_path, victim)
    assert first == second
    assert first[:2] == ("stopped", 75)
    assert json.loads((tmp_path / "digits" / "result.json").read_text())["status"] == "stopped"
    reason = "SIGTERM" if victim == 0 else "another rank was asked to stop"
    assert journal(tmp_path, "stop")[0]["reason"] == reason


def poisoned(runtime, folder, share):
    """NaN in some samples; which rank meets them, the order decides."""
    torch.manual_seed(0)
    data = InMemory(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    data.inputs[: int(64 * share)] = float("nan")
    config = describe(folder, epochs=20, data={"batch_size": 2}, log={"every_steps": 1})
    model = MLP(4, [8], 2)
    result = fit(config, runtime, model=model, train_set=data)
    return result.step, weights_digest(model), all(p.isfinite().all() for p in model.parameters())


def test_nan_on_one_rank_skips_the_step_on_all(tmp_path):
    first, second = run_ranks(2, poisoned, tmp_path, 1 / 64)
    assert first == second
    assert first[2]
    rows = journal(tmp_path, "train")
    assert rows[-1]["train/skipped_steps"] == 20  # the bad sample comes once per epoch
    assert sum(row["train/loss"] is None for row in rows) == 20


def test_nan_for_good_ends_the_run_on_all_ranks(tmp_path):
    results = run_ranks(2, poisoned, tmp_path, 1.0, raises=True)
    assert sorted(result.error for result in results) == ["DivergedError", "RemoteError"]
    assert json.loads((tmp_path / "digits" / "result.json").read_text())["exit_code"] == 76


def with_buffers(runtime, folder, held_out):
    torch.manual_seed(runtime.rank)  # weights differ until the ranks meet
    model = ConvNet(widths=[4, 8], batch_norm=True)
    data = {"batch_size": 9, "accumulate": 2, "workers": 1}
    config = describe(folder, data=data, optim={"clip_norm": 1.0})
    eval_set = Digits("eval", shape="image") if held_out else None
    train_set = Digits(shape="image")
    result = fit(config, runtime, model=model, train_set=train_set, eval_set=eval_set)
    again = {}
    if eval_set:  # the same model once more, in one process
        chunks = EvalSampler(360, batch_size=9, rank=0, world_size=1)
        loader = EvalLoader(eval_set, chunks, seed=0, workers=0, device=runtime.device)
        objective = Objective(nn.CrossEntropyLoss(), torch.from_numpy(eval_set.targets))
        again = evaluate(model, objective, loader, Runtime())
    return result.weights_digest, weights_digest(model), result.scores, again


@pytest.mark.parametrize(("world_size", "held_out"), [(2, False), (3, True)])
def test_weights_and_buffers_end_equal_on_all_ranks(world_size, held_out, tmp_path):
    first, *others = run_ranks(world_size, with_buffers, tmp_path, held_out)
    assert all(other == first for other in others)
    assert first[0] == first[1]
    assert first[2] == first[3]  # the score is that of the model that came out


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, inputs):
        return self.used(inputs)


def branching(runtime, folder, search):
    config = describe(folder, parallel={"find_unused_parameters": search})
    return fit(config, runtime, model=Branching()).status


def test_unused_parameters_need_a_key_which_the_error_names(tmp_path):
    results = run_ranks(2, branching, tmp_path, False, raises=True)
    assert sorted(result.error for result in results) == ["ConfigError", "RemoteError"]
    assert "set parallel.find_unused_parameters=true" in results[0].text
    assert run_ranks(2, branching, tmp_path, True) == ["finished"] * 2


def with_options(runtime, folder, options):
    return fit(describe(folder, parallel=options), runtime).weights_digest


def test_options_of_the_wrapper_change_no_bit(tmp_path):
    plain = run_ranks(2, with_options, tmp_path, {})
    for options in ({"static_graph": True}, {"gradient_as_bucket_view": False}):
        assert run_ranks(2, with_options, tmp_path, options) == plain


def tracked(runtime, folder, mode):
    return fit(describe(folder, wandb={"mode": mode}), runtime).status


LOGGED = ("train", "eval")


def numbers(rows):
    """Rows by step with their measurements only."""
    return [
        {key: value for key, value in row.items() if "/" in key or key in ("step", "samples")}
        for row in rows
        if any("/" in key and not key.startswith("best/") for key in row)
    ]


def test_two_ranks_make_one_offline_run_with_the_journal_s_rows(tmp_path, monkeypatch):
    isolate_wandb(monkeypatch, tmp_path / "home")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert run_ranks(2, tracked, tmp_path / "runs", "offline") == ["finished"] * 2
    folder = tmp_path / "runs" / "digits"
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    rows = [row for event in LOGGED for row in journal(tmp_path / "runs", event)]
    key = lambda row: (row["step"], "eval/loss" in row)  # noqa: E731
    assert sorted(numbers(inspect_offline_run(folder)), key=key) == sorted(numbers(rows), key=key)
    assert len(rows) > 6
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_two_ranks_make_one_online_run_with_the_journal_s_rows(tmp_path, monkeypatch):
    isolate_wandb(monkeypatch, tmp_path / "home")
    with WandbStub() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert run_ranks(2, tracked, tmp_path / "runs", "online") == ["finished"] * 2
        ((_, received),) = stub.rows.items()
        rows = [row for event in LOGGED for row in journal(tmp_path / "runs", event)]
        key = lambda row: (row["step"], "eval/loss" in row)  # noqa: E731
        assert sorted(numbers(received), key=key) == sorted(numbers(rows), key=key)
