"""What every contestant is given, and what it leaves behind."""

import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset


class Clock:
    """Marks the end of each step.

    Attributes:
        times: Unix times in seconds.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        """Mark the end of a step; takes a tenth of a microsecond."""
        self.times.append(time.time())


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The work, the same for all contestants.

    Args:
        model: ``class_path`` and ``init_args`` of the network.
        data: A ``.npz`` file with x_train (float32) and y_train (int64).
        order: A ``.npy`` file with the order of ``ddp_sgd``: int64 of shape (epochs, samples). It
            is there for loops that are to take the very same steps.
        batch_size: Samples of one rank in a step.
        epochs: Passes over the data.
        lr: Learning rate, constant.
        momentum: Momentum.
        seed: Seed of the weights.
        ranks: Processes.
        row_steps: Steps between rows of the journal; None for the default.
        output: Folder for what the contestant leaves.
    """

    model: dict[str, Any]
    data: str
    order: str
    batch_size: int
    epochs: int
    lr: float
    momentum: float
    seed: int
    ranks: int
    row_steps: int | None
    output: str

    def write(self) -> Path:
        """Write the task down, in its folder."""
        path = Path(self.output) / "task.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    def build_model(self) -> "nn.Module":
        """Build the network, with the weights that all contestants begin with."""
        import torch

        torch.manual_seed(self.seed)
        module, _, name = self.model["class_path"].rpartition(".")
        return getattr(importlib.import_module(module), name)(**self.model["init_args"])

    def read_tensors(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Read inputs and targets."""
        import torch

        arrays = np.load(self.data)
        return torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])

    def read_dataset(self) -> "TensorDataset":
        """Read inputs and targets as a data set for a DataLoader."""
        from torch.utils.data import TensorDataset

        return TensorDataset(*self.read_tensors())

    def read_order(self) -> "torch.Tensor":
        """Read which samples come when: int64 of shape (epochs, samples)."""
        import torch

        return torch.from_numpy(np.load(self.order))

    def finish(self, model: "nn.Module", clock: Clock) -> None:
        """Leave weights and times behind; rank 0 calls this."""
        import torch

        torch.save(model.state_dict(), Path(self.output) / "weights.pt")
        (Path(self.output) / "times.json").write_text(json.dumps(clock.times))


def read_task() -> Task:
    """Read the task that the command line names, before there is a process group."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    if task.ranks > 1:
        # Its functions keep the group that they find as a default argument, and DDP imports it
        # late: the group's threads then live on after it was destroyed, and a rank may abort at
        # its exit. This takes 10 ms, of all alike.
        import torch.distributed.nn  # noqa: F401
    return task


def leave_group() -> None:
    """Leave the other ranks, if there are any, once rank 0 has finished."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
