"""Who takes part, and how each is started."""

import os
import socket
import sys
from dataclasses import dataclass

from benchmarks.peers.task import Task
from benchmarks.peers.workloads import ddp_sgd_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """Somebody who does the work.

    Args:
        title: Its name, for people.
        module: What is run; it is given a task.
        is_framework: Whether it is somebody else's framework.
        takes_our_steps: Whether it reads the samples in the order of ``ddp_sgd`` and counts the
            last batch of an epoch by its samples, so that its weights must be nearly equal.
        is_bare: Whether it does the arithmetic only, on one rank, for the MLP.
        options: More options of the command of ``ddp_sgd``, for the MLP.
    """

    title: str
    module: str
    is_framework: bool = False
    takes_our_steps: bool = False
    is_bare: bool = False
    options: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether it is ``ddp_sgd``, by its command."""
        return self.module == "ddp_sgd.train"

    def takes_part(self, workload: str, ranks: int) -> bool:
        """Whether it does a workload on this many ranks."""
        if self.is_bare:
            return workload == "mlp" and ranks == 1
        return workload == "mlp" or not self.options

    def command(self, task: Task) -> list[str]:
        """Give the command: Python for one rank, torchrun for several."""
        launcher = ["torch.distributed.run", f"--nproc_per_node={task.ranks}", "--standalone", "-m"]
        start = [sys.executable, "-m", *(launcher if task.ranks > 1 else [])]
        if self.is_ours:
            return [*start, self.module, *ddp_sgd_options(task), *self.options]
        return [*start, f"benchmarks.peers.contestants.{self.module}", str(task.write())]

    def environment(self, task: Task) -> dict[str, str]:
        """Give the environment: one thread a rank, no accelerator, and who a lone rank is."""
        chosen = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if task.ranks == 1 and self.module in ("tuned_ddp", "tutorial"):
            chosen |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            chosen |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        return os.environ | chosen


OURS, FLAT, TUTORIAL, BARE = "ddp_sgd", "flat", "tutorial", "bare"

CONTESTANTS = {
    OURS: Contestant(title="**ddp_sgd**", module="ddp_sgd.train", takes_our_steps=True),
    "rarely": Contestant(
        title="ddp_sgd, `--checkpoint.every_epochs=20`",
        module="ddp_sgd.train",
        takes_our_steps=True,
        options=("--checkpoint.every_epochs=20",),
    ),
    FLAT: Contestant(title="flat buffers, no DDP", module="flat", takes_our_steps=True),
    "tuned_ddp": Contestant(title="hand-tuned DDP loop", module="tuned_ddp", takes_our_steps=True),
    TUTORIAL: Contestant(title="DDP loop of the tutorials", module="tutorial"),
    "accelerate": Contestant(title="accelerate", module="hf_accelerate", is_framework=True),
    "fabric": Contestant(title="Lightning Fabric", module="fabric", is_framework=True),
    "trainer": Contestant(
        title="Lightning Trainer, defaults", module="lightning_trainer", is_framework=True
    ),
    "stripped": Contestant(
        title="Lightning Trainer, barebones", module="lightning_stripped", is_framework=True
    ),
    "ignite": Contestant(title="PyTorch-Ignite", module="ignite", is_framework=True),
    BARE: Contestant(title="forward, backward, fused step only", module="bare", is_bare=True),
}


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]
