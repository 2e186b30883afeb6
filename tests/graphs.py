"""Runs with captured steps, and what takes the place of CUDA graphs on the CPU."""

import json

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


def train_captured(folder, runtime, model, samples, *, captured, stop=None, **sections):
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
    return fit(config, runtime, model=model, train_set=samples, eval_set=samples, stop=stop)


def measured(folder):
    """Give what the rows of training of a run have in common with those of another."""
    lines = (folder / "digits" / "metrics.jsonl").read_text().splitlines()
    kept = ("step", "train/loss", "train/grad_norm", "train/lr", "train/skipped_steps")
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
    return [{key: row[key] for key in kept} for row in rows]
