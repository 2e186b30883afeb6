"""``data.test``: scored once at the end, with the weights of the best checkpoint."""

import json

import pytest
import torch
from graphs import StopAt
from ranks import run_ranks
from saved_run import flip_a_bit
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig, read_command_line
from ddp_sgd.data import Digits
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.evaluate import look_up, score_again
from ddp_sgd.report.journal import read_journal

SPLIT = {
    name: {"class_path": "ddp_sgd.data.Digits", "init_args": {"split": name, "shape": "image"}}
    for name in ("train", "eval")
}
NET = {
    "class_path": "ddp_sgd.models.ConvNet",
    "init_args": {"widths": [4], "batch_norm": True},
}


def describe(folder, **changes):
    """Describe a run whose last epoch, at a rate that is too high, spoils the weights."""
    basis = {
        "output_dir": str(folder),
        "epochs": 3,
        "model": NET,
        "data": {"batch_size": 100, **SPLIT, "test": SPLIT["train"], **changes.pop("data", {})},
        "optim": {"lr": 0.5, "reference_batch": 100, "momentum": 0.0},
        "schedule": {"name": "step", "milestones": [2], "gamma": 10.0, "warmup_epochs": 0.0},
        "wandb": {"mode": "disabled"},
    }
    return RunConfig.model_validate(basis | changes)


def rows(folder, key="test/count"):
    journal = read_journal(folder / "digits" / "metrics.jsonl")
    return [row for row in journal if row["event"] == "eval" and key in row]


def final_scores(row):
    return {key: value for key, value in row.items() if key.startswith("test/")}


def best_step(folder):
    return max(rows(folder, "eval/accuracy"), key=lambda row: row["eval/accuracy"])["step"]


def rescored(folder, step, component=SPLIT["train"]):
    """Score a checkpoint on the test set, by the command, as if that were held out."""
    split = json.dumps(component)
    line = read_command_line(["x", f"--data.eval={split}"], {}, program="", about="", argument="X")
    file = folder / "digits" / "checkpoints" / f"step-{step:08d}.pt"
    scores, _ = score_again(look_up(file, line.over, Runtime()), Runtime())
    return {key.replace("eval/", "test/"): value for key, value in scores.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(describe(folder), Runtime())


def test_the_weights_of_the_best_checkpoint_are_scored_once(run):
    folder, result = run
    step = best_step(folder)
    assert step < result.step == 45
    (row,) = rows(folder)
    assert row["step"] == 45
    assert final_scores(row) == {"test/step": step, **rescored(folder, step)}
    assert row["test/accuracy"] > rescored(folder, 45)["test/accuracy"]
    assert final_scores(result.scores) == final_scores(row)
    written = json.loads((folder / "digits" / "result.json").read_text())
    assert final_scores(written) == final_scores(row)


def test_the_run_itself_is_that_without_a_test_set(run, tmp_path):
    _, result = run
    without = fit(describe(tmp_path, data={"test": None}), Runtime())
    assert without.weights_digest == result.weights_digest
    assert not final_scores(without.scores)
    assert not rows(tmp_path)


class Extra(nn.Module):
    """A network with extra state, a hidden generator's worth of buffers, and dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10))
        self.register_buffer("passes", torch.zeros(()), persistent=False)
        self.told = {"epochs": 0}

    def forward(self, inputs):
        if self.training:
            self.passes += 1
        return self.layers(inputs) + 0 * self.passes

    def get_extra_state(self):
        return self.told

    def set_extra_state(self, state):
        self.told = state


def test_a_model_that_is_given_ends_with_the_last_weights_and_all_its_state(tmp_path):
    torch.manual_seed(0)
    model = Extra()
    draws = torch.default_generator
    result = fit(describe(tmp_path), Runtime(), model=model)
    assert weights_digest(model) == result.weights_digest
    assert model.passes.item() == 45
    assert model.told == {"epochs": 0}
    assert model.training
    state = draws.get_state()
    torch.manual_seed(0)
    same = Extra()
    fit(describe(tmp_path / "b", data={"test": None}), Runtime(), model=same)
    assert torch.equal(draws.get_state(), state)
    assert all(map(torch.equal, model.parameters(), same.parameters()))


@pytest.mark.parametrize("replica", ["flat", "ddp"])
def test_several_ranks_score_the_same_weights(replica, tmp_path):
    results = run_ranks(2, train_on_two, tmp_path, replica)
    assert results[0] == results[1]
    scores, _ = results[0]
    step = best_step(tmp_path)
    assert step < 45
    assert final_scores(scores) == {"test/step": step, **rescored(tmp_path, step)}


def train_on_two(runtime, folder, replica):
    config = describe(folder, parallel={"replica": replica}, data={"batch_size": 50})
    result = fit(config, runtime)
    return result.scores, result.weights_digest


def test_without_a_held_out_set_the_last_weights_are_scored(tmp_path, capsys):
    fit(describe(tmp_path, data={"eval": None}), Runtime())
    (row,) = rows(tmp_path)
    assert final_scores(row) == {"test/step": 45, **rescored(tmp_path, 45)}
    out = capsys.readouterr().out
    assert "data.test is scored with the weights of step 45, the last ones, since no held" in out
    assert "scores    test, once at the end, with the last weights" in out


def test_a_best_checkpoint_that_is_damaged_is_named(tmp_path, capsys):
    config = describe(tmp_path, data={"test": None})
    fit(config, Runtime())
    step = best_step(tmp_path)
    flip_a_bit(tmp_path / "digits" / "checkpoints" / f"step-{step:08d}.pt")
    fit(describe(tmp_path), Runtime())
    (row,) = rows(tmp_path)
    assert final_scores(row) == {"test/step": 45, **rescored(tmp_path, 45)}
    assert f"the last ones, since the best checkpoint, step-{step:08d}.pt, is damaged" in (
        capsys.readouterr().out
    )


def arrays_of(data):
    return torch.as_tensor(data.inputs), torch.as_tensor(data.targets)


def test_a_run_that_is_finished_repeats_its_scores(run, capsys):
    folder, result = run
    again = fit(describe(folder), Runtime())
    assert final_scores(again.scores) == final_scores(result.scores)
    assert len(rows(folder)) == 1
    assert "test loss " in capsys.readouterr().out


def test_a_finished_run_is_scored_on_a_test_set_that_is_new(run, tmp_path):
    _, result = run
    without = fit(describe(tmp_path, data={"test": None}), Runtime())
    scored = fit(describe(tmp_path), Runtime())
    assert scored.scores == result.scores
    assert scored.weights_digest == without.weights_digest
    assert len(rows(tmp_path)) == 1
    assert len(rows(tmp_path, "eval/count")) == 3


def test_loader_processes_read_the_test_set_too(run, tmp_path):
    _, result = run
    scores = fit(describe(tmp_path, data={"workers": 1}), Runtime()).scores
    assert scores == result.scores


def test_a_run_that_was_killed_in_the_test_scores_it_once_more_in_one_row(tmp_path):
    class Killed(Exception):
        pass

    class Failing(TensorDataset):
        def __getitem__(self, index):
            if self.reads > 8:
                raise Killed
            self.reads += 1
            return super().__getitem__(index)

    failing = Failing(*arrays_of(Digits("eval", shape="image")))
    failing.reads = 0
    with pytest.raises(DataError):
        fit(describe(tmp_path, data={"test": None}), Runtime(), test_set=failing)
    assert not rows(tmp_path)
    result = fit(describe(tmp_path), Runtime())
    (first,) = rows(tmp_path)
    (tmp_path / "digits" / "result.json").unlink()  # killed between the row and the result
    again = fit(describe(tmp_path), Runtime())
    (second,) = rows(tmp_path)
    assert again.scores == result.scores
    assert final_scores(second) == final_scores(first)


def test_a_run_that_is_stopped_is_not_tested_before_its_end(run, tmp_path):
    _, result = run
    stopped = fit(describe(tmp_path), Runtime(), stop=StopAt(2))
    assert stopped.status == "stopped"
    assert not final_scores(stopped.scores)
    assert not rows(tmp_path)
    resumed = fit(describe(tmp_path), Runtime())
    assert (resumed.scores, resumed.weights_digest) == (result.scores, result.weights_digest)
    assert len(rows(tmp_path)) == 1


def test_more_epochs_are_tested_at_their_own_end(tmp_path):
    fit(describe(tmp_path, epochs=1), Runtime())
    fit(describe(tmp_path, epochs=2), Runtime())
    assert [row["step"] for row in rows(tmp_path)] == [15, 30]


def test_a_test_set_is_looked_at_before_the_first_step(tmp_path):
    many = TensorDataset(torch.zeros(4, 1, 8, 8), torch.full((4,), 10))
    with pytest.raises(DataError, match=r"data\.test has labels from 10 to 10"):
        fit(describe(tmp_path), Runtime(), test_set=many)
    with pytest.raises(ConfigError, match=r"data\.test is a object"):
        fit(describe(tmp_path, data={"test": {"class_path": "builtins.object"}}), Runtime())
    assert not list((tmp_path / "digits").glob("checkpoints/*.pt"))
