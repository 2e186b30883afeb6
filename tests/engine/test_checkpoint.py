"""Checkpoints of a whole run: what its files hold, and who writes them."""

import threading

import pytest
import torch
from ranks import run_ranks
from saving import names, write
from torch import nn

from ddp_sgd import __version__
from ddp_sgd.checkpointing.checkpointer import NoCheckpointer, open_checkpointer
from ddp_sgd.config import RunConfig
from ddp_sgd.data import InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError
from ddp_sgd.report.journal import read_journal


class Odd(nn.Linear):
    """With a state that no one could load safely."""

    def get_extra_state(self):
        return {"made": threading.Event()}

    def set_extra_state(self, state):
        pass


def test_state_that_cannot_be_read_back_is_refused_at_the_start(tmp_path):
    config = RunConfig(output_dir=str(tmp_path), name="x", wandb={"mode": "disabled"})
    data = InMemory(torch.randn(40, 4), torch.randint(0, 3, (40,)))
    with pytest.raises(ConfigError, match="the state model._extra_state.made is a Event"):
        fit(config, Runtime(), model=Odd(4, 3), train_set=data)
    assert {row["event"] for row in read_journal(tmp_path / "x" / "metrics.jsonl")} == {
        "start",
        "end",
    }


def test_only_the_rank_that_has_the_folder_saves():
    host = torch.device("cpu")
    with open_checkpointer(
        None, {}, device=host, keep=1, before=lambda: None, report=lambda *_: None
    ) as checkpoints:
        assert isinstance(checkpoints, NoCheckpointer)
        checkpoints.save(None, {})
        checkpoints.poll()
        checkpoints.finish()
        assert checkpoints.save_s == 0


class Normalized(nn.Module):
    """With buffers, and two names for one weight."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.scores = nn.Linear(4, 3)
        self.also = self.scores.weight

    def forward(self, inputs):
        return self.scores(self.norm(inputs))


def fit_a_little(runtime, folder):
    torch.manual_seed(0)
    data = InMemory(torch.randn(40, 4), torch.randint(0, 3, (40,)))
    config = RunConfig(
        output_dir=folder, name="x", epochs=3, data={"batch_size": 5}, wandb={"mode": "disabled"}
    )
    model = Normalized()
    result = fit(config, runtime, model=model, train_set=data, eval_set=data)
    return result.step, {name: value.tolist() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_file_of_a_run_holds_all_that_it_needs_under_plain_names(world_size, tmp_path):
    step, weights = run_ranks(world_size, fit_a_little, str(tmp_path))[0]
    assert step == 3 * 8 // world_size
    folder = tmp_path / "x" / "checkpoints"
    content = torch.load((folder / "last").resolve(), weights_only=True)
    assert content["cursor"] == {"epoch": 3, "position": 0, "step": step, "samples": 120}
    assert {name: value.tolist() for name, value in content["model"].items()} == weights
    assert set(content["optimizer"]["momentum_buffer"]) == {
        name for name, _ in Normalized().named_parameters()
    }
    assert not any("module." in name for name in content["model"])
    assert content["plan"]["global_batch"] == 5 * world_size
    assert content["config"]["epochs"] == 3
    assert content["world_size"] == world_size
    assert content["versions"]["ddp_sgd"] == __version__
    assert content["versions"]["torch"] == torch.__version__
    assert content["scored_at"] == step
    start, *_ = rows = read_journal(tmp_path / "x" / "metrics.jsonl")
    assert content["run_id"] == start["run_id"]
    told = [row for row in rows if row["event"] == "checkpoint"]
    assert [row["step"] for row in told] == [step // 3, 2 * step // 3, step]
    assert told[-1]["file"] == (folder / "last").readlink().name
    assert write(folder, step + 1, samples=130, keep=1).file in names(folder)  # all were whole
