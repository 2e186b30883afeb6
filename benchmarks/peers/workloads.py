"""The three workloads, and the files from which all contestants read them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.task import Task
from ddp_sgd.seeds import seed_for

SEED = 0
MOMENTUM = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A network, its data, and how long it is trained.

    Args:
        title: What it is, for people.
        model: ``class_path`` and ``init_args``.
        shape: Of one input; None takes the digits.
        batch_size: Samples of one rank in a step.
        steps_per_epoch: For made-up data; the digits are what they are.
        epochs: Passes over the data.
        lr: Learning rate.
        rounds: Measurements of each contestant.
        scored: Samples on which the final loss is measured: the first ones.
        tolerance: How far the final loss of another order of the samples may lie from that of
            ``ddp_sgd``; it begins at 2.3. Random orders gave differences of up to half of this.
        row_steps: Steps between rows of the journal of ``ddp_sgd``; None for its default.
    """

    title: str
    model: dict[str, Any]
    shape: tuple[int, ...] | None = None
    batch_size: int
    steps_per_epoch: int = 0
    epochs: int
    lr: float
    rounds: int
    scored: int
    tolerance: float
    row_steps: int | None = None

    def prepare(self, folder: Path, ranks: int) -> Task:
        """Write data and order into a folder; the task has no place for its output yet."""
        inputs, targets = self._draw(ranks)
        np.savez(folder / "data.npz", x_train=inputs, y_train=targets)
        np.save(folder / "order.npy", self._order(len(targets), ranks))
        return Task(
            model=self.model,
            data=str(folder / "data.npz"),
            order=str(folder / "order.npy"),
            batch_size=self.batch_size,
            epochs=self.epochs,
            lr=self.lr,
            momentum=MOMENTUM,
            seed=seed_for("weights", SEED),
            ranks=ranks,
            row_steps=self.row_steps,
            output="",
        )

    def _draw(self, ranks: int) -> tuple[Any, Any]:
        """Take the digits, or make up images: one of ten textures of 4 x 4 pixels, under noise."""
        if self.shape is None:
            from ddp_sgd.data import Digits

            digits = Digits("train")
            return digits.inputs, digits.targets
        samples = self.batch_size * self.steps_per_epoch * ranks
        chance = np.random.default_rng(SEED)
        targets = chance.integers(10, size=samples)
        channels, height, width = self.shape
        textures = chance.standard_normal((10, channels, 4, 4), dtype=np.float32)
        patterns = np.tile(textures, (1, 1, height // 4, width // 4))
        noise = chance.standard_normal((samples, *self.shape), dtype=np.float32)
        return patterns[targets] + noise, targets

    def _order(self, samples: int, ranks: int) -> Any:
        from ddp_sgd.data.sampler import TrainSampler

        order = TrainSampler(
            samples,
            global_batch=self.batch_size * ranks,
            batch_size=self.batch_size,
            rank=0,
            world_size=ranks,
            seed=SEED,
        )
        rows = []
        for epoch in range(self.epochs):
            order.set_epoch(epoch)
            rows.append(order.permutation())
        return np.stack(rows)


WORKLOADS = {
    "mlp": Workload(
        title="MLP 64-64-64-10 on the digits, 32 samples a rank",
        model={
            "class_path": "ddp_sgd.models.MLP",
            "init_args": {"inputs": 64, "hidden": [64, 64], "classes": 10},
        },
        batch_size=32,
        epochs=120,
        lr=0.02,
        rounds=3,
        scored=1437,
        tolerance=0.08,
    ),
    "convnet": Workload(
        title="ConvNet 32-64 on images of 28 x 28, 64 samples a rank",
        model={"class_path": "ddp_sgd.models.ConvNet", "init_args": {}},
        shape=(1, 28, 28),
        batch_size=64,
        steps_per_epoch=75,
        epochs=2,
        lr=0.05,
        rounds=3,
        scored=1024,
        tolerance=0.05,
    ),
    "resnet": Workload(
        title="ResNet-18 on images of 3 x 32 x 32, 32 samples a rank",
        model={"class_path": "benchmarks.peers.networks.resnet18_for_32x32", "init_args": {}},
        shape=(3, 32, 32),
        batch_size=32,
        steps_per_epoch=14,
        epochs=1,
        lr=0.01,
        rounds=2,
        scored=128,
        tolerance=0.15,
        row_steps=1,
    ),
}


def ddp_sgd_options(task: Task) -> list[str]:
    """Give the command line with which ``ddp_sgd`` does a task; all else is its default."""
    data = {"class_path": "ddp_sgd.data.Arrays", "init_args": {"path": task.data}}
    rows = [] if task.row_steps is None else [f"--log.every_steps={task.row_steps}"]
    return [
        "--name=run",
        f"--output_dir={task.output}",
        f"--seed={SEED}",
        f"--epochs={task.epochs}",
        f"--model={json.dumps(task.model)}",
        f"--data.train={json.dumps(data)}",
        "--data.eval=null",
        f"--data.batch_size={task.batch_size}",
        f"--optim.lr={task.lr}",
        "--optim.scaling=none",
        f"--optim.momentum={task.momentum}",
        "--schedule={name: constant, warmup_epochs: 0.0}",
        "--wandb.mode=offline",
        *rows,
    ]
