"""Runs on samples of several columns, with targets or without: the same steps on any split."""

import numpy as np
import pytest
import torch
from graphs import Again, StopAt
from ranks import run_ranks
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import captured_step
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError, RefusedError
from ddp_sgd.evaluate import look_up, score_again
from ddp_sgd.report.journal import read_journal

N = 27
GENERATOR = torch.Generator().manual_seed(3)
PARTS = {
    "left": torch.randn(N, 3, generator=GENERATOR),
    "right": torch.randn(N, 3, generator=GENERATOR),
    "name": torch.arange(N),
}


class Mappings:
    def __len__(self):
        return N

    def __getitem__(self, index):
        return {key: part[index] for key, part in PARTS.items()}


class Whole(Mappings):
    def __getitems__(self, indices):
        return {key: part[indices] for key, part in PARTS.items()}


class Views(nn.Module):
    """Two views of a sample, each through the same layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, left, right):
        return self.layer(left), self.layer(right)


def apart(outputs):
    """How far the views of a sample are apart, as a mean over samples."""
    left, right = outputs
    return (left - right).square().mean() + (left.sum(dim=1) - 1).square().mean()


NAMED, PLACED = {"input": ["left", "right"]}, {"input": [0, 1]}
SETS = {
    "mappings": (Mappings(), NAMED),
    "whole batches": (Whole(), NAMED),
    "TensorDataset": (TensorDataset(*PARTS.values()), PLACED),
    "zip": (list(zip(*PARTS.values(), strict=True)), PLACED),
}


def train(runtime, folder, name, *, looks=None, loss=apart, model=None, data=None, **sections):
    torch.manual_seed(0)
    dataset, chosen = SETS[name]
    config = RunConfig(
        output_dir=str(folder),
        epochs=3,
        wandb={"mode": "disabled"},
        log={"every_steps": 1},
        optim={"reference_batch": 8},
        data={"batch_size": 8, **chosen, **(data or {})},
        **sections,
    )
    model = model or Views()
    stop = None if looks is None else StopAt(looks)
    result = fit(
        config, runtime, model=model, loss=loss, train_set=dataset, eval_set=dataset, stop=stop
    )
    return result, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One rank, in the form that is fastest."""
    return train(Runtime(), tmp_path_factory.mktemp("plain"), "TensorDataset")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", SETS)
def test_any_form_of_the_same_samples_gives_the_same_bits(name, workers, plain, tmp_path):
    result, _ = train(Runtime(), tmp_path, name, data={"workers": workers})
    assert result.weights_digest == plain[0].weights_digest
    assert result.scores == plain[0].scores
    assert set(result.scores) == {"eval/loss", "eval/count"}
    assert result.scores["eval/count"] == N


def test_a_stop_changes_no_bit(plain, tmp_path):
    for looks in (2, 4, None):
        result, _ = train(Runtime(), tmp_path, "mappings", looks=looks)
    assert result.weights_digest == plain[0].weights_digest
    resumed = [row for row in read_journal(tmp_path / "digits/metrics.jsonl")
               if row["event"] == "resume"]  # fmt: skip
    assert len(resumed) == 2


def _on_ranks(runtime, folder):
    half = {"batch_size": 2, "accumulate": 2}
    runs = [train(runtime, f"{folder}/{name}", name, data=half) for name in SETS]
    return [(result.scores, weights.tolist()) for result, weights in runs]


def test_two_ranks_with_two_micro_batches_take_the_same_steps(plain, tmp_path):
    for runs in run_ranks(2, _on_ranks, str(tmp_path)):
        for scores, weights in runs:
            np.testing.assert_allclose(weights, plain[1], rtol=1e-5, atol=1e-6)
            assert scores["eval/count"] == N
            assert scores["eval/loss"] == pytest.approx(plain[0].scores["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["TensorDataset", "mappings"])
def test_captured_steps_have_no_targets_either(name, tmp_path, monkeypatch):
    monkeypatch.setattr(captured_step, "new_graph", lambda _: Again())
    digests = {
        train(Runtime(), tmp_path / str(captured), name, compute={"cuda_graphs": captured})[
            0
        ].weights_digest
        for captured in (True, False)
    }
    assert len(digests) == 1


def test_a_target_is_chosen_like_an_input(tmp_path):
    def loss(outputs, targets):
        assert targets.dtype == torch.int64
        return (outputs[0].sum(dim=1) - targets).square().mean()

    digests = {
        train(Runtime(), tmp_path / name, name, loss=loss, data={"target": target})[
            0
        ].weights_digest
        for name, target in (("TensorDataset", 2), ("mappings", "name"), ("whole batches", "name"))
    }
    assert len(digests) == 1


def test_a_loss_that_needs_targets_is_refused_before_the_run(tmp_path):
    data = {"input": 0}
    with pytest.raises(ConfigError, match=r"^loss is MSELoss, which fails without targets, .*"):
        train(
            Runtime(), tmp_path, "TensorDataset", data=data, loss=nn.MSELoss(),
            model=nn.Linear(3, 1),
        )  # fmt: skip


def test_a_resume_with_other_parts_is_refused(tmp_path):
    train(Runtime(), tmp_path, "TensorDataset", looks=2)
    with pytest.raises(RefusedError, match=r"data\.input was \[0, 1\], is \[1, 0\]"):
        train(Runtime(), tmp_path, "TensorDataset", data={"input": [1, 0]})


def test_evaluations_of_another_size_score_the_same(tmp_path, plain):
    for size in (1, 5, 64):
        folder = tmp_path / str(size)
        result, _ = train(Runtime(), folder, "TensorDataset", eval={"batch_size": size})
        assert result.weights_digest == plain[0].weights_digest
        assert result.scores["eval/count"] == N
        assert result.scores["eval/loss"] == pytest.approx(plain[0].scores["eval/loss"], rel=1e-6)


def test_a_saved_model_is_scored_again_with_the_same_parts_and_batch(tmp_path):
    config = RunConfig(
        output_dir=str(tmp_path),
        epochs=1,
        wandb={"mode": "disabled"},
        model={"class_path": f"{__name__}.Views"},
        loss={"class_path": f"{__name__}.apart", "call": False},
        data={
            "train": {"class_path": f"{__name__}.Mappings"},
            "eval": {"class_path": f"{__name__}.Whole"},
            "input": ["left", "right"],
        },
        eval={"batch_size": 4},
    )
    result = fit(config, Runtime())
    saved = look_up(tmp_path / "digits", RunConfig.model_validate, Runtime())
    scores, digest = score_again(saved, Runtime())
    assert (scores, digest) == (result.scores, result.weights_digest)
