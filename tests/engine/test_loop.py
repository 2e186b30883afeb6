"""The order of things in the loop; whole runs are in test_fit.py and tests/distributed/."""

import json

import pytest
import torch

from ddp_sgd.checkpointing import checkpointer as module
from ddp_sgd.checkpointing.store import SkippedSteps
from ddp_sgd.config import RunConfig
from ddp_sgd.data import InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit, refuse_divergence
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.errors import DivergedError, ExitCode, OutputError
from ddp_sgd.models import MLP
from ddp_sgd.report.journal import read_journal


def run(folder, stop=None, model=None, **changes):
    """Four steps per epoch."""
    torch.manual_seed(0)
    samples = InMemory(torch.randn(16, 4), torch.randint(0, 2, (16,)))
    basis = {"name": "x", "epochs": 2, "wandb": {"mode": "disabled"}, "data": {"batch_size": 4}}
    config = RunConfig(output_dir=str(folder), **basis | changes)
    model = model or MLP(4, [], 2)
    return fit(config, Runtime(), model=model, train_set=samples, eval_set=samples, stop=stop)


def rows(folder, *events):
    journal = read_journal(folder / "x" / "metrics.jsonl")
    return [row for row in journal if row["event"] in events]


class Late(StopRequest):
    """Asks at the beat with this number."""

    def __init__(self, beats):
        self.left = beats
        super().__init__()

    @property
    def reason(self):
        self.left -= 1
        return "the test" if self.left < 0 else None

    @reason.setter
    def reason(self, value):
        pass


def test_a_stop_leaves_without_scoring_and_the_score_is_made_up_for(tmp_path):
    """A grace period is for saving; the evaluation at the edge of an epoch can wait."""
    log = {"every_steps": 1}
    stopped = run(tmp_path, Late(3), log=log)
    assert (stopped.step, stopped.scores) == (4, {})
    assert rows(tmp_path, "eval") == []
    run(tmp_path, log=log)
    assert [row["step"] for row in rows(tmp_path, "eval")] == [4, 8]
    best = tmp_path / "x" / "checkpoints" / "best"
    assert best.exists()  # what was made up for is not forgotten
    order = [(row["event"], row["step"]) for row in rows(tmp_path, "resume", "eval", "train")]
    assert order[4:6] == [("resume", 4), ("eval", 4)]


class Impatient(MLP):
    """Asks to stop while it is being scored for the first time."""

    def __init__(self, wish):
        super().__init__(4, [], 2)
        self.wish, self.scored = wish, 0

    def forward(self, inputs):
        if not self.training:
            self.scored += 1
            if self.scored == 2:  # the sanity check leaves no trace
                self.wish.ask("the test")
        return super().forward(inputs)


def test_a_wish_to_stop_cuts_an_evaluation_short(tmp_path):
    """It may take an hour, and a grace period is a minute."""
    wish = StopRequest()
    model = Impatient(wish)
    stopped = run(tmp_path, wish, model=model)
    assert (stopped.status, stopped.step, stopped.scores) == ("stopped", 4, {})
    assert model.scored == 2  # of 4
    assert [row["step"] for row in rows(tmp_path, "checkpoint", "eval", "stop")] == [4, 4]
    run(tmp_path)
    assert [row["step"] for row in rows(tmp_path, "eval")] == [4, 8]


def test_the_evaluation_at_the_end_of_a_run_is_not_cut_short(tmp_path):
    wish = StopRequest()
    ended = run(tmp_path, wish, model=Impatient(wish), epochs=1)
    assert ended.status == "finished"
    assert ended.scores["eval/count"] == 16


def test_a_row_ends_where_the_state_is_saved(tmp_path):
    run(tmp_path, log={"every_steps": 100}, checkpoint={"every_steps": 3})
    assert [row["step"] for row in rows(tmp_path, "train")] == [3, 4, 6, 8]
    saved = rows(tmp_path, "checkpoint")
    assert [row["step"] for row in saved] == [3, 4, 6, 8]
    for row in saved:
        assert row["file"] == f"step-{row['step']:08d}.pt"
        assert row["bytes"] > 0
        assert row["save_s"] > 0 < row["stall_s"]


def refuse_to_write(monkeypatch, steps):
    write = module.write_checkpoint

    def fail_sometimes(folder, header, tensors, *, keep):
        if header.step in steps:
            raise OSError(28, "No space left on device")
        return write(folder, header, tensors, keep=keep)

    monkeypatch.setattr(module, "write_checkpoint", fail_sometimes)


EVERY_STEP = {"checkpoint": {"every_steps": 1}}


def test_a_failed_save_is_told_and_survived(tmp_path, monkeypatch, capsys):
    refuse_to_write(monkeypatch, {2, 3, 5, 6})
    assert run(tmp_path, **EVERY_STEP).status == "finished"
    errors = [row["step"] for row in rows(tmp_path, "checkpoint") if "error" in row]
    assert errors == [2, 3, 5, 6]
    said = "checkpoint of step 2 not written: No space left on device; the run goes on"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("steps", [{3, 4, 5}, {8}])
def test_three_failed_saves_in_a_row_or_the_last_one_end_the_run(steps, tmp_path, monkeypatch):
    refuse_to_write(monkeypatch, steps)
    with pytest.raises(OutputError, match="does not take a checkpoint.*: No space left on device"):
        run(tmp_path, **EVERY_STEP)
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", ExitCode.OUTPUT)
    monkeypatch.undo()
    assert run(tmp_path, **EVERY_STEP).status == "finished"


def test_a_stop_that_cannot_save_does_not_claim_that_it_did(tmp_path, monkeypatch):
    refuse_to_write(monkeypatch, set(range(9)))
    with pytest.raises(OutputError):
        run(tmp_path, Late(1), log={"every_steps": 1})
    assert json.loads((tmp_path / "x" / "result.json").read_text())["exit_code"] == 73


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "plan.json", "result.json", "checkpoints"]
)
def test_a_folder_where_a_file_should_be_ends_a_resume_before_its_first_step(name, tmp_path):
    run(tmp_path, epochs=1)
    place = tmp_path / "x" / name
    place.rename(tmp_path / "kept")
    if name == "checkpoints":  # the other way round
        place.touch()
    else:
        place.mkdir()
    with pytest.raises(OutputError, match=f"{name} cannot be written: ") as caught:
        run(tmp_path)
    assert caught.value.exit_code == ExitCode.OUTPUT
    assert place.exists()
    assert not (tmp_path / "x.1").exists()


def test_ten_in_a_row_end_the_run():
    refuse_divergence(SkippedSteps(40, 1, 9), 0.1)
    with pytest.raises(
        DivergedError, match=r"not finite for 10 steps in a row at a rate of 0.1; lower optim.lr"
    ):
        refuse_divergence(SkippedSteps(10, 0, 10), 0.1)
    assert DivergedError.exit_code == ExitCode.DIVERGED


def test_rates_follow_the_schedule(tmp_path):
    run(tmp_path, log={"every_steps": 1}, schedule={"name": "linear"}, optim={"lr": 0.08})
    rates = [row["train/lr"] for row in rows(tmp_path, "train")]
    assert rates == pytest.approx([0.01 * left for left in range(8, 0, -1)])


class Drawing(MLP):
    """Keeps a number that it draws in each step."""

    def __init__(self):
        super().__init__(4, [], 2)
        self.drawn = []

    def forward(self, inputs):
        if self.training:
            self.drawn.append(torch.rand(()).item())
        return super().forward(inputs)


def test_the_model_s_random_numbers_follow_from_the_step(tmp_path):
    unbroken, stopped, resumed = Drawing(), Drawing(), Drawing()
    run(tmp_path / "unbroken", model=unbroken)
    assert run(tmp_path / "broken", Late(3), stopped, log={"every_steps": 1}).step == 4
    run(tmp_path / "broken", model=resumed)
    assert stopped.drawn[-4:] + resumed.drawn[-4:] == unbroken.drawn[-8:]
    assert len(set(unbroken.drawn[-8:])) == 8
