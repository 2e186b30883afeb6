"""One whole run in one process; over ranks, see tests/distributed/."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from ddp_sgd.config import RunConfig, load_config
from ddp_sgd.data import InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.errors import DataError, DivergedError, ExitCode
from ddp_sgd.models import MLP
from ddp_sgd.report.journal import read_journal


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def describe(folder, **changes):
    return RunConfig(
        output_dir=str(folder),
        wandb={"mode": "disabled"},
        **{"epochs": 2, "resume": "never"} | changes,
    )


def rows(folder, event, name="digits"):
    return [row for row in read_journal(folder / name / "metrics.jsonl") if row["event"] == event]


def result_of(folder):
    return json.loads((folder / "digits" / "result.json").read_text())


def test_a_run_leaves_what_the_contract_says(tmp_path):
    model = MLP(64, [16], 10)
    result = fit(describe(tmp_path), Runtime(), model=model)
    folder = tmp_path / "digits"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "checkpoints", "config.yaml", "metrics.jsonl", "plan.json", "result.json",
    }  # fmt: skip
    assert load_config(["--config", str(folder / "config.yaml")], environ={}) == describe(tmp_path)
    assert json.loads((folder / "plan.json").read_text())["total_steps"] == 90
    written = json.loads((folder / "result.json").read_text())
    assert written.pop("wall_s") > 0
    assert written == json.loads(json.dumps(result.as_row()))
    assert (result.status, result.exit_code, result.step, result.epoch) == ("finished", 0, 90, 2.0)
    assert result.weights_digest == weights_digest(model)
    journal = read_journal(folder / "metrics.jsonl")
    # A checkpoint is told of when it has been written, which may be after the next evaluation.
    others = [row for row in journal if row["event"] not in ("train", "checkpoint")]
    assert [row["event"] for row in others] == ["start", "eval", "eval", "end"]
    saved = [number for number, row in enumerate(journal) if row["event"] == "checkpoint"]
    assert [journal[number]["step"] for number in saved] == [45, 90]
    assert all(journal.index(e) < s for e, s in zip(others[1:3], saved, strict=True))
    for row in journal:
        assert list(row)[:5] == ["event", "time", "step", "epoch", "samples"]
    assert [row["step"] for row in rows(tmp_path, "train")] == [
        10,
        20,
        30,
        40,
        45,
        50,
        60,
        70,
        80,
        90,
    ]
    assert rows(tmp_path, "eval")[-1]["eval/accuracy"] == result.scores["eval/accuracy"]


def test_the_same_run_twice_gives_the_same_bits_and_keeps_both(tmp_path):
    config = describe(tmp_path, resume="never")
    digests = {fit(config, Runtime()).weights_digest for _ in range(3)}
    assert len(digests) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "digits.1", "digits.2"}


def test_the_loss_of_the_journal_is_the_mean_over_samples(tmp_path):
    """With a rate of almost nothing the weights stand still, so the mean over an epoch is the loss
    of the set.
    """
    torch.manual_seed(0)
    data = InMemory(torch.randn(50, 4), torch.randint(0, 3, (50,)))
    model = MLP(4, [], 3)
    expected = nn.functional.cross_entropy(model(data.inputs), data.targets).item()
    config = describe(
        tmp_path, epochs=1, optim={"lr": 1e-30}, data={"batch_size": 8}, log={"every_steps": 100}
    )
    fit(config, Runtime(), model=model, train_set=data)
    (row,) = rows(tmp_path, "train")
    assert row["train/loss"] == row["train/loss_rank0"] == pytest.approx(expected, rel=1e-6)
    assert row["samples"] == 50


def test_evaluation_every_few_epochs_and_at_the_end(tmp_path):
    fit(describe(tmp_path, epochs=5, eval={"every_epochs": 2}), Runtime())
    assert [row["epoch"] for row in rows(tmp_path, "eval")] == [2, 4, 5]


def test_rates_in_the_journal_follow_the_schedule(tmp_path):
    schedule = {"name": "step", "milestones": (1.0,), "gamma": 0.5}
    fit(describe(tmp_path, schedule=schedule), Runtime())
    assert {row["train/lr"] for row in rows(tmp_path, "train") if row["step"] <= 45} == {0.05}
    assert {row["train/lr"] for row in rows(tmp_path, "train") if row["step"] > 45} == {0.025}


class Interrupting(MLP):
    """Sends its own process a signal in the middle of a step."""

    def __init__(self, number, at):
        super().__init__(64, [], 10)
        self.number, self.at, self.seen = number, at, 0

    def forward(self, inputs):
        self.seen += self.training
        if self.seen == self.at:
            os.kill(os.getpid(), self.number)
        return super().forward(inputs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_between_steps(number, tmp_path):
    result = fit(describe(tmp_path, epochs=1000), Runtime(), model=Interrupting(number, at=13))
    assert (result.status, result.exit_code) == ("stopped", ExitCode.STOPPED)
    assert 13 <= result.step < 45_000
    assert rows(tmp_path, "stop")[0]["reason"] == number.name
    assert rows(tmp_path, "end")[0]["step"] == result_of(tmp_path)["step"] == result.step
    assert result_of(tmp_path)["exit_code"] == 75


def test_a_wish_that_comes_with_the_last_step_is_no_stop(tmp_path):
    stop = StopRequest()
    stop.ask("the operator")
    result = fit(describe(tmp_path, epochs=1, data={"batch_size": 1437}), Runtime(), stop=stop)
    assert (result.status, result.step) == ("finished", 1)
    assert "eval/accuracy" in result.scores


def test_a_run_that_diverges_says_so(tmp_path):
    data = InMemory(torch.full((40, 4), float("nan")), torch.zeros(40).long())
    config = describe(tmp_path, epochs=100, data={"batch_size": 4}, log={"every_steps": 1})
    with pytest.raises(DivergedError, match="not finite for 10 steps in a row"):
        fit(config, Runtime(), model=MLP(4, [], 2), train_set=data)
    failed = result_of(tmp_path)
    assert (failed["status"], failed["exit_code"], failed["step"]) == ("failed", 76, 10)
    assert "not finite" in failed["error"]
    last = rows(tmp_path, "train")[-1]
    assert last["train/loss"] is None
    assert last["train/skipped_steps"] == 10


def test_a_few_bad_batches_are_survived(tmp_path):
    data = InMemory(torch.randn(40, 4), torch.zeros(40).long())
    data.inputs[7] = float("inf")
    config = describe(tmp_path, epochs=3, data={"batch_size": 4}, log={"every_steps": 1})
    model = MLP(4, [], 2)
    assert fit(config, Runtime(), model=model, train_set=data).status == "finished"
    assert rows(tmp_path, "train")[-1]["train/skipped_steps"] == 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_label_out_of_range_in_the_middle_is_told_plainly(tmp_path):
    class Late:
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return torch.zeros(4), 9 if index == 60 else 0

    with pytest.raises(DataError, match="a label that the model has no score for: Target 9"):
        fit(describe(tmp_path), Runtime(), model=MLP(4, [], 2), train_set=Late())
    assert result_of(tmp_path)["exit_code"] == 65


def test_a_defect_is_recorded_too(tmp_path):
    class Faulty(MLP):
        def forward(self, inputs):
            if self.training and len(inputs) == 32:  # not in the sanity check
                raise KeyError("of the user's")
            return super().forward(inputs)

    with pytest.raises(KeyError):
        fit(describe(tmp_path), Runtime(), model=Faulty(64, [], 10))
    assert result_of(tmp_path)["exit_code"] == 70


def test_a_run_without_held_out_data(tmp_path):
    result = fit(describe(tmp_path, data={"eval": None}), Runtime())
    assert result.scores == {}
    assert not rows(tmp_path, "eval")


def test_dropout_and_augmentation_repeat_themselves(tmp_path):
    def once():
        torch.rand(1)
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(), nn.Linear(32, 10))
        return fit(describe(tmp_path), Runtime(), model=model).weights_digest

    assert once() == once()
