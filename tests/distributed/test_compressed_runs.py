"""Runs with compressed gradients: stop and resume, other ranks, one rank."""

import pytest
import torch
from ranks import run_ranks

from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.checkpointing.store import CheckpointFolder
from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits, InMemory
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.models import MLP
from ddp_sgd.optim.sgd import SGD


def life(runtime, folder, kind, stop_after=-1):
    """One life of a run of digits, one of which is no number in one place."""
    torch.manual_seed(0)
    digits, wish, taken, inner = Digits(), StopRequest(), [0], SGD.step
    inputs = torch.as_tensor(digits.inputs[:640]).clone()
    inputs[7, 7] = float("nan")

    def counted(*arguments):
        inner(*arguments)
        taken[0] += 1
        if taken[0] == stop_after and runtime.rank == 1:
            wish.ask("the test")

    SGD.step = counted
    config = RunConfig(
        name="x",
        output_dir=str(folder),
        epochs=3,
        log={"every_steps": 1},
        data={"batch_size": 16, "eval": None},
        optim={"lr": 0.1, "reference_batch": 32, "momentum": 0.9},
        parallel={"compression": kind, "bucket_mb": 0.03},
        wandb={"mode": "disabled"},
    )
    model = MLP(64, [64, 64], 10)
    data = InMemory(inputs, torch.as_tensor(digits.targets[:640]))
    result = fit(config, runtime, model=model, train_set=data, stop=wish)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.no_grad():
        right = model(torch.as_tensor(digits.inputs)).argmax(1) == torch.as_tensor(digits.targets)
    accuracy = right.float().mean().item()
    return result.status, result.step, result.weights_digest, weights.numpy(), accuracy


@pytest.mark.parametrize("kind", ["bf16", "fp16", "powersgd"])
def test_stop_and_resume_give_the_same_bits(kind, tmp_path):
    whole = run_ranks(2, life, tmp_path / "whole", kind)
    assert whole[0][:3] == whole[1][:3]
    assert whole[0][:2] == ("finished", 60)
    assert whole[0][4] > 0.8  # though a step in each epoch is skipped
    for stop in (6, 19):  # PowerSGD leaves the first ten whole, and counts on
        assert run_ranks(2, life, tmp_path / "parts", kind, stop)[0][0] == "stopped"
    saved = CheckpointFolder(tmp_path / "parts" / "x" / "checkpoints")
    newest = read_tensors(saved.path / saved.manifests()[-1].file)
    assert ("compression" in newest) == (kind == "powersgd")
    rest = run_ranks(2, life, tmp_path / "parts", kind)
    assert rest[0][:3] == rest[1][:3] == whole[0][:3]


def test_a_run_goes_on_with_other_ranks(tmp_path):
    for world_size, stop in ((2, 25), (4, 10), (1, 10), (2, -1)):
        lives = run_ranks(world_size, life, tmp_path, "powersgd", stop)
        assert len({digest for _, _, digest, *_ in lives}) == 1
    assert lives[0][:2] == ("finished", 60)
    assert lives[0][4] > 0.8


def test_alone_nothing_is_compressed(tmp_path):
    (plain,) = run_ranks(1, life, tmp_path / "plain", "none")
    (compressed,) = run_ranks(1, life, tmp_path / "compressed", "powersgd")
    assert compressed[2] == plain[2]
