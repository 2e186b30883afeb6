"""Who takes part, and how each is started."""

import os
from dataclasses import dataclass

from benchmarks.harness import python_command, rank_environment
from benchmarks.peers.task import Task


@dataclass(frozen=True, slots=True)
class Contestant:
    """Somebody who does the work."""

    title: str
    module: str  # ddp_sgd.train, or the loop of contestants.py that is given the task
    is_framework: bool = False
    # Whether it reads the samples in the order of ddp_sgd and counts the last batch of an epoch by
    # its samples, so that its weights must be nearly equal.
    takes_our_steps: bool = False
    is_bare: bool = False  # does the arithmetic only, on one rank, for the MLP
    options: tuple[str, ...] = ()  # with more options ddp_sgd does the MLP only

    @property
    def is_ours(self) -> bool:
        """Whether it is ``ddp_sgd``, by its command."""
        return self.module == "ddp_sgd.train"

    def takes_part(self, workload: str, ranks: int) -> bool:
        """Whether it does a workload on this many ranks."""
        if self.is_bare:
            return workload == "mlp" and ranks == 1
        return workload == "mlp" or not self.options or not self.is_ours

    def command(self, task: Task) -> list[str]:
        """Give the command: Python for one rank, torchrun for several."""
        if self.is_ours:
            words = (self.module, *task.ddp_sgd_options())
        else:
            words = ("benchmarks.peers.contestants", self.module, str(task.write()))
        return python_command("-m", *words, *self.options, ranks=task.ranks)

    def environment(self, task: Task) -> dict[str, str]:
        """Give the environment: one thread a rank, no accelerator, and who a lone rank is."""
        chosen = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if task.ranks == 1 and self.module == "tutorial":
            chosen |= rank_environment()
        return os.environ | chosen


OURS, RARELY, FLAT = "ddp_sgd", "rarely", "flat"
TUTORIAL, BARE = "tutorial", "bare"

CONTESTANTS = {
    OURS: Contestant("**ddp_sgd**", "ddp_sgd.train", takes_our_steps=True),
    RARELY: Contestant(
        "ddp_sgd, `--checkpoint.every_epochs=20`",
        "ddp_sgd.train",
        takes_our_steps=True,
        options=("--checkpoint.every_epochs=20",),
    ),
    FLAT: Contestant("flat buffers, no DDP", "flat", takes_our_steps=True),
    TUTORIAL: Contestant("DDP loop of the tutorials", "tutorial"),
    "accelerate": Contestant("accelerate", "accelerate", is_framework=True),
    "fabric": Contestant("Lightning Fabric", "fabric", is_framework=True),
    "trainer": Contestant("Lightning Trainer, defaults", "trainer", is_framework=True),
    "stripped": Contestant(
        "Lightning Trainer, barebones", "trainer", is_framework=True, options=("--barebones",)
    ),
    "ignite": Contestant("PyTorch-Ignite", "ignite", is_framework=True),
    BARE: Contestant("forward, backward, fused step only", "bare", is_bare=True),
}
