"""A short run whose checkpoints are all kept, and ways to spoil them."""

import hashlib
import os
import pickle
from dataclasses import replace

import torch

from ddp_sgd.checkpointing.store import read_manifest
from ddp_sgd.config import RunConfig
from ddp_sgd.engine.fit import fit

EPOCHS = 3


def describe(folder, **changes):
    digits = {"class_path": "ddp_sgd.data.Digits"}
    basis = {
        "name": "tiny",
        "epochs": EPOCHS,
        "model": {
            "class_path": "ddp_sgd.models.ConvNet",
            "init_args": {"widths": [4], "batch_norm": True},
        },
        "data": {
            "batch_size": 100,
            "train": digits | {"init_args": {"split": "train", "shape": "image"}},
            "eval": digits | {"init_args": {"split": "eval", "shape": "image"}},
        },
        "optim": {"lr": 0.1, "reference_batch": 200},
        "wandb": {"mode": "disabled"},
    }
    return RunConfig(output_dir=str(folder), **basis | changes)


def train(runtime, folder, changes=None):
    """Train the short run; to be called on ranks. Returns the digest of the weights."""
    return fit(describe(folder, **changes or {}), runtime).weights_digest


def files_of(run):
    """Checkpoints of a run, the oldest first."""
    return sorted((run / "checkpoints").glob("step-*.pt"))


def vouch_for(file):
    """Make the manifest say that a file is what was written."""
    manifest = read_manifest(file.with_suffix(".json"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    honest = replace(manifest, size_bytes=file.stat().st_size, sha256=digest)
    file.with_suffix(".json").write_text(honest.to_text())


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def plant_a_bomb(file, trace):
    """Replace a checkpoint by one that runs code when it is unpickled, with a valid manifest."""
    content = torch.load(file, weights_only=True)
    torch.save({**content, "bomb": Bomb(trace)}, file, pickle_module=pickle)
    vouch_for(file)
