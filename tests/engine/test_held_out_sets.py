"""Several held-out sets by name: one row, one result, and the first chooses the best checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch
from graphs import StopAt
from ranks import run_ranks
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig, load_config, read_command_line
from ddp_sgd.data import Digits
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.evaluate import look_up, score_again
from ddp_sgd.models import MLP
from ddp_sgd.report.journal import read_journal

DIGITS = {
    name: {"class_path": "ddp_sgd.data.Digits", "init_args": {"split": split}}
    for name, split in (("held-out", "eval"), ("seen", "train"))
}


def describe(folder, **changes):
    basis = {"output_dir": str(folder), "epochs": 2, "wandb": {"mode": "disabled"}}
    return RunConfig.model_validate(basis | changes)


def rows(folder, event="eval"):
    return [r for r in read_journal(folder / "digits" / "metrics.jsonl") if r["event"] == event]


def scores_of(row):
    return {key: value for key, value in row.items() if key.startswith("eval/")}


def train(runtime, folder, **changes):
    data = {"eval": DIGITS, **changes.pop("data", {})}
    return fit(describe(folder, data=data, **changes), runtime)


def rescore(runtime, path):
    line = read_command_line(["x"], {}, program="", about="", argument="X")
    return score_again(look_up(path, line.over, runtime), runtime)


def test_every_set_has_its_scores_in_one_row_and_in_the_result(tmp_path, capsys):
    result = train(Runtime(), tmp_path / "named")
    alone = {}
    for name, component in DIGITS.items():
        whole = fit(describe(tmp_path / name, data={"eval": component}), Runtime())
        assert whole.weights_digest == result.weights_digest
        alone |= {key.replace("eval/", f"eval/{name}/"): v for key, v in whole.scores.items()}
    assert result.scores == alone
    assert list(result.scores) == list(alone)  # in the order given
    assert [row["step"] for row in rows(tmp_path / "named")] == [45, 90]
    assert scores_of(rows(tmp_path / "named")[-1]) == alone
    written = json.loads((tmp_path / "named" / "digits" / "result.json").read_text())
    assert scores_of(written) == alone
    file = tmp_path / "named" / "digits" / "config.yaml"
    again = load_config(["--config", str(file)], environ={})
    assert again == describe(tmp_path / "named", data={"eval": DIGITS})
    assert list(again.data.eval_sets) == ["data.eval.held-out", "data.eval.seen"]
    out = capsys.readouterr().out
    share = f"({alone['eval/seen/correct']}/1437)"
    assert out.count("eval/held-out loss ") == out.count("eval/seen loss ") == 3
    assert share in out
    assert "scores    eval/held-out, eval/seen; the best checkpoint by eval/held-out" in out


def test_ranks_and_a_new_evaluation_give_the_same_scores(tmp_path):
    results = run_ranks(2, train, tmp_path)
    assert results[0].scores == results[1].scores == scores_of(rows(tmp_path)[-1])
    for world_size in (1, 3):
        for scores, digest in run_ranks(world_size, rescore, tmp_path / "digits"):
            assert (scores, digest) == (results[0].scores, results[0].weights_digest)


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_set_chooses_the_best_checkpoint(first, tmp_path):
    """One set has the labels that the model learns, in the other all labels are wrong."""
    data = Digits("eval")
    inputs, labels = torch.as_tensor(data.inputs), torch.as_tensor(data.targets)
    right, wrong = TensorDataset(inputs, labels), TensorDataset(inputs, (labels + 1) % 10)
    sets = {"right": right, "wrong": wrong}
    chosen = dict(sorted(sets.items(), reverse=first == 1))
    config = describe(tmp_path, epochs=3, checkpoint={"keep": 3})
    fit(config, Runtime(), model=MLP(64, [16], 10), train_set=Digits(), eval_set=chosen)
    accuracies = [row[f"eval/{next(iter(chosen))}/accuracy"] for row in rows(tmp_path)]
    best = (tmp_path / "digits" / "checkpoints" / "best").readlink().stem
    assert best == f"step-{45 * (1 + accuracies.index(max(accuracies))):08d}"
    assert best == ("step-00000135", "step-00000045")[first]


def test_an_evaluation_that_is_stopped_between_sets_is_done_again_as_a_whole(tmp_path):
    class Told(TensorDataset):
        """Requests a stop while it is scored the first time, after the sanity check."""

        def __init__(self):
            super().__init__(torch.zeros(4, 64), torch.zeros(4).long())
            self.reads, self.stop = 0, SimpleNamespace(reason=None)

        def __getitem__(self, index):
            self.reads += 1
            self.stop.reason = "told" if self.reads > 6 else None
            return super().__getitem__(index)

    told = Told()
    sets = {"told": told, "after": Digits("eval")}
    options = {"train_set": Digits(), "eval_set": sets}
    stopped = fit(describe(tmp_path), Runtime(), **options, stop=told.stop)
    assert (stopped.status, stopped.step, stopped.scores) == ("stopped", 45, {})
    assert rows(tmp_path) == []
    assert fit(describe(tmp_path), Runtime(), **options).status == "finished"
    assert [row["step"] for row in rows(tmp_path)] == [45, 90]
    assert all("eval/after/count" in row for row in rows(tmp_path))


def test_errors_name_the_set(tmp_path):
    narrow = TensorDataset(torch.zeros(4, 3), torch.zeros(4).long())
    many = TensorDataset(torch.zeros(4, 64), torch.full((4,), 10))
    for wrong, error, message in (
        (narrow, ConfigError, r"which fails on inputs of .* from data\.eval\.wrong, Run"),
        (many, DataError, r"data\.eval\.wrong has labels"),
        (5, ConfigError, r"data\.eval\.wrong is a int"),
        (TensorDataset(torch.zeros(0, 64), torch.zeros(0)), DataError, r"data\.eval\.wrong is emp"),
    ):
        sets = {"good": Digits("eval"), "wrong": wrong}
        with pytest.raises(error, match=message):
            fit(describe(tmp_path), Runtime(), train_set=Digits(), eval_set=sets)


def train_on_sets_in_another_order(runtime, folder):
    sets = {"right": Digits("eval"), "wrong": Digits("train")}
    ordered = dict(sorted(sets.items(), reverse=runtime.rank == 1))
    return fit(describe(folder), runtime, train_set=Digits(), eval_set=ordered)


def test_ranks_have_the_same_sets_in_the_same_order(tmp_path):
    errors = run_ranks(2, train_on_sets_in_another_order, tmp_path, raises=True)
    assert {error.error for error in errors} <= {"DataError", "RemoteError"}
    assert any("give every rank the same data, in the same order" in str(e) for e in errors)


def test_other_sets_on_a_resume_change_nothing_else(tmp_path):
    assert fit(describe(tmp_path / "a"), Runtime(), stop=StopAt(1)).status == "stopped"
    result = train(Runtime(), tmp_path / "a")
    assert "eval/seen/accuracy" in result.scores
    assert result.weights_digest == train(Runtime(), tmp_path / "b").weights_digest
