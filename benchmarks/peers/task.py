"""The three workloads, and what every contestant is given and leaves behind."""

import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

SEED = 0
MOMENTUM = 0.9


class Clock:
    """Marks the end of each step, in ``times``, as Unix times in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        """Mark the end of a step; takes a tenth of a microsecond."""
        self.times.append(time.time())


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A network, its data, and how long it is trained."""

    title: str
    model: dict[str, Any]  # class_path and init_args
    shape: tuple[int, ...] | None = None  # of one input; None takes the digits
    batch_size: int  # samples of one rank in a step
    steps_per_epoch: int = 0  # for made-up data; the digits are what they are
    epochs: int
    lr: float  # constant
    rounds: int  # measurements of each contestant
    scored: int  # samples on which the final loss is measured: the first ones
    # How far the final loss of another order of the samples may lie from that of ddp_sgd; it begins
    # at 2.3. Random orders gave differences of up to half of this.
    tolerance: float
    row_steps: int | None = None  # between rows of the journal of ddp_sgd; None for its default

    @contextmanager
    def prepared(self, ranks: int) -> "Iterator[Task]":
        """Keep data, and their order in ``ddp_sgd``, in the files of a temporary folder."""
        from ddp_sgd.data.sampler import TrainSampler

        inputs, targets = self._draw(ranks)
        sampler = TrainSampler(
            len(targets),
            global_batch=self.batch_size * ranks,
            batch_size=self.batch_size,
            rank=0,
            world_size=ranks,
            seed=SEED,
        )
        rows = []
        for epoch in range(self.epochs):
            sampler.set_epoch(epoch)
            rows.append(sampler.permutation())
        with TemporaryDirectory(prefix="peers-") as folder:
            np.savez(Path(folder) / "data.npz", x_train=inputs, y_train=targets)
            np.save(Path(folder) / "order.npy", np.stack(rows))
            yield Task(**asdict(self), ranks=ranks, folder=folder)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Workload):
    """The work, the same for all contestants."""

    ranks: int
    folder: str  # holds the data and their order
    output: str = ""  # folder for what the contestant leaves

    def write(self) -> Path:
        """Write the task down, in its folder."""
        path = Path(self.output) / "task.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    def build_model(self) -> "nn.Module":
        """Build the network, with the weights that all contestants begin with."""
        import torch

        from ddp_sgd.seeds import seed_for

        torch.manual_seed(seed_for("weights", SEED))
        module, _, name = self.model["class_path"].rpartition(".")
        return getattr(importlib.import_module(module), name)(**self.model["init_args"])

    def build_optimizer(self, model: "nn.Module") -> "torch.optim.Optimizer":
        """Build torch's SGD."""
        import torch

        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=MOMENTUM)

    @property
    def data_file(self) -> str:
        """A ``.npz`` file with x_train (float32) and y_train (int64)."""
        return str(Path(self.folder) / "data.npz")

    def read_tensors(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Read inputs and targets."""
        import torch

        arrays = np.load(self.data_file)
        return torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])

    def read_dataset(self) -> "TensorDataset":
        """Read inputs and targets as a data set for a DataLoader."""
        from torch.utils.data import TensorDataset

        return TensorDataset(*self.read_tensors())

    def build_loader(self) -> "DataLoader":
        """Build a shuffling DataLoader."""
        from torch.utils.data import DataLoader

        return DataLoader(self.read_dataset(), batch_size=self.batch_size, shuffle=True)

    def batches(self, rank: int) -> "Iterator[tuple[torch.Tensor, float]]":
        """Yield the very steps of ``ddp_sgd``: rows of a rank, and their share of the batch."""
        import torch

        for order in torch.from_numpy(np.load(Path(self.folder) / "order.npy")):
            for batch in order.split(self.batch_size * self.ranks):
                rows = batch[rank :: self.ranks]
                yield rows, len(rows) / len(batch)

    def finish(self, model: "nn.Module", clock: Clock) -> None:
        """Leave weights and times behind; rank 0 calls this."""
        import torch

        torch.save(model.state_dict(), Path(self.output) / "weights.pt")
        (Path(self.output) / "times.json").write_text(json.dumps(clock.times))

    def ddp_sgd_options(self) -> list[str]:
        """Give the command line with which ``ddp_sgd`` does the work; all else is its default."""
        data = {"class_path": "ddp_sgd.data.Arrays", "init_args": {"path": self.data_file}}
        rows = [] if self.row_steps is None else [f"--log.every_steps={self.row_steps}"]
        return [
            "--name=run",
            f"--output_dir={self.output}",
            f"--seed={SEED}",
            f"--epochs={self.epochs}",
            f"--model={json.dumps(self.model)}",
            f"--data.train={json.dumps(data)}",
            "--data.eval=null",
            f"--data.batch_size={self.batch_size}",
            f"--optim.lr={self.lr}",
            "--optim.scaling=none",
            f"--optim.momentum={MOMENTUM}",
            "--schedule={name: constant, warmup_epochs: 0.0}",
            "--wandb.mode=offline",
            *rows,
        ]


WORKLOADS = {
    "mlp": Workload(
        title="MLP 64-64-64-10 on the digits, 32 samples per rank",
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
        title="ConvNet 32-64 on images of 28 x 28, 64 samples per rank",
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
        title="ResNet-18 on images of 3 x 32 x 32, 32 samples per rank",
        model={"class_path": "benchmarks.peers.task.resnet18_for_32x32", "init_args": {}},
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


def resnet18_for_32x32() -> "nn.Module":
    """Build ResNet-18 with a first convolution of 3 x 3, stride 1, and no pooling after it.

    Source:
        He et al. 2016, arXiv:1512.03385, with the stem that is usual for CIFAR-10.
    """
    from torch import nn
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
