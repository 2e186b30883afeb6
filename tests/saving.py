"""Checkpoints for tests; run as a program, it forks processes that save until they are killed."""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from ddp_sgd.checkpointing.serialization import write_checkpoint
from ddp_sgd.checkpointing.store import CheckpointFolder, Header, SkippedSteps


def header(step=1, **changes):
    """Where a run of 100 samples per epoch, ten a step, stood."""
    epoch, position = divmod(10 * step, 100)
    return Header(
        **{
            "step": step,
            "epoch": epoch,
            "position": position,
            "samples": 10 * step,
            "scored_at": 0,
            "scores": {},
            "skipped": SkippedSteps(),
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
    """Weights and momentum buffers that are all of one value."""
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
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, bit // 8)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)


def names(folder):
    """Names of everything in a folder."""
    return {path.name for path in folder.iterdir()}


@contextmanager
def small_disk(path, size):
    """A disk of its own; skips the test where there can be none."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        import pytest

        pytest.skip("NOT SHOWN: a full disk; only root may mount one")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(disk, leaving=0):
    """Fill a disk up to the last block, or to those that so many bytes need."""
    space = os.statvfs(disk)
    blocks = space.f_bavail + -leaving // space.f_frsize
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(blocks * space.f_frsize))
    return ballast


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
