"""Checkpoints for tests; run as a program, it forks processes that save until they are killed."""

import json
import os
import random
import sys
import time
from pathlib import Path

import torch

from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.writing import write_checkpoint


def header(step=1, **changes):
    """Where a run of 100 samples an epoch, ten a step, stood."""
    epoch, position = divmod(10 * step, 100)
    return Header(
        **{
            "step": step,
            "epoch": epoch,
            "position": position,
            "samples": 10 * step,
            "scored_at": 0,
            "scores": {},
            "skipped": (0, 0, 0),
            "world_size": 1,
            "run_id": "0a1b2c3d",
            "loss": "torch.nn.modules.loss.CrossEntropyLoss()",
            "plan": {"samples": 100, "peak_lr": 1e-05},
            "config": {"name": "é", "epochs": 2},
            "versions": {"torch": "2"},
        }
        | changes
    )


def scored(step, accuracy, **changes):
    """The same, just evaluated."""
    return header(step, scored_at=step, scores={"eval/accuracy": accuracy}, **changes)


def tensors(value, size=64):
    """Weights and velocities that are all of one value."""
    return {
        "model": {"weight": torch.full((size,), float(value))},
        "optimizer": {"momentum_buffer": {"weight": torch.full((size,), -float(value))}},
    }


def write(folder, step, keep=3, size=64, **changes):
    """Save a step whose tensors hold its number."""
    return write_checkpoint(
        CheckpointFolder(folder), header(step, **changes), tensors(step, size), keep=keep
    )


def flip(path, bit):
    """Flip one bit of a file in place."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def names(folder):
    """Names of everything in a folder."""
    return {path.name for path in folder.iterdir()}


def _save_until_killed(folder, step, size):
    accuracy = random.Random(step)
    while True:
        _say(began=step)
        start = time.perf_counter()
        write_checkpoint(
            CheckpointFolder(folder), scored(step, accuracy.random()), tensors(step, size), keep=2
        )
        _say(saved=step, seconds=time.perf_counter() - start)
        step += 1


def _say(**words):
    os.write(1, (json.dumps(words) + "\n").encode())


def _serve(folder, size):
    """Fork a saving process for each number of a step on standard input."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _save_until_killed(folder, int(line), size)
        _say(pid=child)
        os.waitpid(child, 0)
        _say(ended=child)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
