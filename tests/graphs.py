"""Runs with captured steps, and what takes the place of CUDA graphs on the CPU."""

import json

from torch import nn

from ddp_sgd.config import RunConfig
from ddp_sgd.engine.fit import fit


class Again:
    """A graph that calls the function again: with the memory, and all that Python holds, of now."""

    def capture(self, body):
        self.replay = body

    def run_eagerly(self, body):
        body()


class StopAt:
    """A stop request after some looks, which are one per step."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def reason(self):
        self.looks -= 1
        return "enough" if self.looks < 0 else None


class Terms:
    """Two numbers by name, with units of their own, of which there may be none."""

    def __init__(self, main="most"):
        self.main = main

    def __call__(self, outputs, targets):
        each = nn.functional.cross_entropy(outputs, targets, reduction="none")
        is_rare = targets == 3
        return {self.main: each.mean(), "rare": (each * is_rare).sum() / is_rare.sum()}

    def units(self, targets):
        return {self.main: len(targets), "rare": (targets == 3).sum()}


def train_captured(folder, runtime, model, samples, *, captured, stop=None, loss=None, **sections):
    """Train for three epochs, with captured steps or eager ones."""
    compute = {"cuda_graphs": captured, **sections.pop("compute", {})}
    config = {
        "output_dir": str(folder),
        "epochs": 3,
        "wandb": {"mode": "disabled"},
        "compute": compute,
        **sections,
    }
    config = RunConfig.model_validate(config)
    data = {"train_set": samples, "eval_set": samples}
    return fit(config, runtime, model=model, loss=loss, stop=stop, **data)


def measured(folder):
    """Give what the rows of training of a run have in common with those of another."""
    lines = (folder / "digits" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith("train/")}
        for row in rows
    ]
