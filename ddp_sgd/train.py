"""Command: train a model, in one process, under torchrun or srun.

Usage: ``torchrun --nproc_per_node=4 -m ddp_sgd.train --config run.yaml --optim.lr=0.1``.
"""

import gc
import os
import sys
from collections.abc import Sequence

from ddp_sgd.cli import run_command
from ddp_sgd.config import CommandLine
from ddp_sgd.console import outlive_console
from ddp_sgd.distributed.environment import may_be_rank_0, only_on_rank, read_ranks
from ddp_sgd.distributed.process_exit import leave
from ddp_sgd.engine.triggers import leave_undisturbed, stop_on_signal
from ddp_sgd.host import batch_scheduling, keep_freed_memory
from ddp_sgd.instantiate import uncollected
from ddp_sgd.report.wandb_logger import start_ahead


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit code of the contract.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
    """
    return run_command(
        train,
        argv,
        program="python -m ddp_sgd.train",
        about="Train a PyTorch model by data-parallel SGD.",
    )


def train(line: CommandLine) -> int:
    """Join the ranks that the environment names, and fit."""
    config = line.config
    with only_on_rank(this_one=may_be_rank_0(os.environ)):
        read_ranks(os.environ)
    outlive_console()
    keep_freed_memory()
    # A signal that comes while torch is being imported would end the process: listen first.
    with stop_on_signal(owns_process=True) as stop, batch_scheduling():
        if may_be_rank_0(os.environ):
            start_ahead(config.wandb)
        is_first = "torch" not in sys.modules
        with only_on_rank(this_one=may_be_rank_0(os.environ)), stop.hold(), uncollected():
            from ddp_sgd.distributed.runtime import start_runtime
            from ddp_sgd.engine.fit import fit

        if is_first:
            gc.freeze()  # what torch is made of stays; no collection need look at it
        place = config.runtime
        with start_runtime(
            backend=place.backend, device=place.device, timeout_s=place.timeout_s
        ) as runtime:
            return fit(config, runtime, stop=stop).exit_code


if __name__ == "__main__":
    code = main()
    leave_undisturbed()
    leave(code)
