"""Command: score a saved model on any number of ranks.

Usage: ``torchrun --nproc_per_node=4 -m ddp_sgd.evaluate runs/digits/checkpoints/best``.
"""

import json
import math
import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_sgd.checkpointing.inspection import epochs_of
from ddp_sgd.cli import run_command
from ddp_sgd.config import CommandLine, dump_yaml
from ddp_sgd.console import deliver
from ddp_sgd.distributed.bounded import leave
from ddp_sgd.distributed.environment import may_be_rank_0, only_on_rank, read_ranks

if TYPE_CHECKING:
    from ddp_sgd.distributed.runtime import Runtime


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build whatever the checkpoint names, which runs its code; without it, classes "
        "outside of ddp_sgd, torch, torchvision and timm must be named by the caller",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Score a saved model, and return the exit code of the contract.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
    """
    return run_command(
        evaluate,
        argv,
        program="python -m ddp_sgd.evaluate",
        about="Score a saved model. CHECKPOINT is a file, a link such as "
        "runs/digits/checkpoints/best, or a run folder, which stands for its newest whole "
        "checkpoint. Model, loss and data are those of the run, with the options that follow laid "
        "over them; runtime.* is of today alone.",
        add_options=_add_options,
        argument="CHECKPOINT",
    )


def evaluate(line: CommandLine) -> int:
    """Join the ranks that the environment names, and score.

    Args:
        line: The checkpoint, and what changes in its configuration.
    """
    with only_on_rank(this_one=may_be_rank_0(os.environ)):
        read_ranks(os.environ)
    from ddp_sgd.distributed.runtime import start_runtime

    place = line.config.runtime
    with start_runtime(
        backend=place.backend, device=place.device, timeout_s=place.timeout_s
    ) as runtime:
        lines = _work(line, runtime)
    if runtime.rank == 0:
        deliver("".join(f"{text}\n" for text in lines))
    return 0


def _work(line: CommandLine, runtime: "Runtime") -> list[str]:
    """Give what rank 0 prints."""
    from ddp_sgd.engine.rescoring import look_up, score_again
    from ddp_sgd.report.progress import last_line

    is_trusted = line.options["trust"] or line.options["print_config"]
    given = None if is_trusted else line.given.values
    saved = look_up(Path(line.argument), line.over, runtime, given)
    if line.options["print_config"]:
        return [dump_yaml(saved.config).rstrip("\n")]
    scores, digest = score_again(saved, runtime)
    header = saved.header
    plain = {name: _plain(value) for name, value in scores.items()}
    row = {
        "checkpoint": str(saved.file),
        "step": header.step,
        "epoch": epochs_of(header),
        "samples": header.samples,
        "world_size": runtime.world_size,
        "weights_digest": digest,
        **plain,
    }
    summary = last_line({"status": str(saved.file), "step": header.step, **plain})
    if header.is_scored and header.scores != scores:
        summary += f"; the run itself wrote eval/loss {header.scores['eval/loss']:.6g}"
    return [summary, json.dumps(row, allow_nan=False)]


def _plain(value: Any) -> Any:
    """Turn NaN and infinity into null, since JSON has no word for them."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    leave(main())
