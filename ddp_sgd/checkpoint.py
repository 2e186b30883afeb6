"""Command: list, verify, export, average and compare checkpoints.

Usage: ``python -m ddp_sgd.checkpoint ls runs/digits``. Listing and verifying need no torch.
"""

import argparse
import difflib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ddp_sgd.checkpointing.inspection import (
    epochs_of,
    fault_at,
    files_to_verify,
    list_checkpoints,
    listing_lines,
)
from ddp_sgd.cli import exit_code_of
from ddp_sgd.console import Parser, deliver
from ddp_sgd.errors import ConfigError, DataError, ExitCode

_PROGRAM = "python -m ddp_sgd.checkpoint"
_CHECKPOINT = "a checkpoint, a link to one, or a run folder, which stands for its newest whole one"
_DIFFERENT = 1
"""What ``diff`` returns for checkpoints that differ, as diff(1) does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Work on checkpoints, and return the exit code of the contract.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    return exit_code_of(lambda: _run(argv), debug="--debug" in argv)


def _run(argv: Sequence[str]) -> int:
    parser = Parser(prog=_PROGRAM, description="Work on checkpoints.", allow_abbrev=False)
    commands = _add_commands(parser)
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose {', '.join(commands)}."
        raise ConfigError(f"unknown command {argv[0]}; {remedy}")
    try:
        asked = parser.parse_args(argv)
    except SystemExit:  # after --help
        deliver("")
        return ExitCode.DONE
    return int(asked.work(asked))


def _add_commands(parser: Parser) -> Mapping[str, Parser]:
    below = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, work: Callable[[argparse.Namespace], int], about: str) -> Parser:
        command = below.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.add_argument("--debug", action="store_true", help="print tracebacks as well")
        command.set_defaults(work=work)
        return command

    ls = add("ls", _ls, "List the checkpoints of a run, without reading them.")
    ls.add_argument("folder", type=Path, metavar="RUN", help="a run folder, or its checkpoints")

    about = "Compare every byte with what was written; exits 65 unless all are whole."
    verify = add("verify", _verify, about)
    paths = "checkpoints, or folders, which stand for all in them"
    verify.add_argument("paths", type=Path, nargs="+", metavar="PATH", help=paths)

    about = "Write the weights as safetensors, and the configuration as YAML beside them."
    export = add("export", _export, about)
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    export.add_argument("output", type=Path, metavar="OUT.safetensors", help="where to")
    export.add_argument("--force", action="store_true", help="replace files that exist")

    about = "Average the weights of checkpoints into a checkpoint of its own, without momentum."
    average = add("average", _average, about)
    paths = "checkpoints, or run folders, which stand for all whole ones in them"
    average.add_argument("paths", type=Path, nargs="+", metavar="RUN_OR_CHECKPOINT", help=paths)
    average.add_argument("--last", type=int, metavar="K", help="the newest K of these only")
    output = "folder to make; give it to evaluate, or as --resume=FOLDER"
    average.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=output)

    diff = add("diff", _diff, "Compare two checkpoints; exits 1 if they differ.")
    diff.add_argument("first", type=Path, metavar="A", help=_CHECKPOINT)
    diff.add_argument("second", type=Path, metavar="B", help=_CHECKPOINT)
    return below.choices


def _ls(asked: argparse.Namespace) -> int:
    found = list_checkpoints(asked.folder)
    if not found:
        _print(f"{asked.folder} holds no checkpoints")
        return ExitCode.DONE
    for line in listing_lines(found, now=time.time()):
        _print(line)
    return ExitCode.DONE


def _verify(asked: argparse.Namespace) -> int:
    files = [file for path in asked.paths for file in files_to_verify(path)]
    damaged = 0
    for file in files:
        fault = fault_at(file)
        damaged += fault is not None
        _print(f"{file} {fault or 'is whole'}")
    if damaged or not files:
        state = f"{damaged} of {len(files)} damaged" if files else "no checkpoint at all"
        raise DataError(
            f"{' '.join(map(str, asked.paths))} has {state}; go on from one that is whole."
        )
    return ExitCode.DONE


def _export(asked: argparse.Namespace) -> int:
    from ddp_sgd.checkpointing.convert import export_weights, refuse_overwriting
    from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
    from ddp_sgd.engine.result import weights_digest

    refuse_overwriting(asked.output, force=asked.force)
    file, manifest = find_checkpoint(asked.checkpoint)
    weights = read_tensors(file)["model"]
    model: Any = SimpleNamespace(state_dict=lambda: weights)  # all that the digest reads
    tied = export_weights(weights, manifest.header, asked.output, digest=weights_digest(model))
    equal = "".join(f"; {name} is tied to {kept}" for name, kept in tied.items())
    _print(f"{asked.output}: weights of step {manifest.header.step} from {file}{equal}")
    return ExitCode.DONE


def _average(asked: argparse.Namespace) -> int:
    from ddp_sgd.checkpointing.convert import choose_checkpoints, write_average

    chosen = choose_checkpoints(asked.paths, last=asked.last)
    written = write_average(chosen, asked.output)
    for file, manifest in chosen:
        _print(f"  {file} (step {manifest.header.step}, epoch {epochs_of(manifest.header):.4g})")
    _print(f"{written}: the mean of these {len(chosen)}")
    return ExitCode.DONE


def _diff(asked: argparse.Namespace) -> int:
    from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
    from ddp_sgd.tree import compare_plain, compare_trees, difference_lines

    (one, first), (other, second) = (find_checkpoint(path) for path in (asked.first, asked.second))
    settings = compare_plain(_settings(first.header), _settings(second.header))
    a, b = read_tensors(one), read_tensors(other)
    weights = compare_trees(a["model"], b["model"])
    momentum = compare_trees(_momentum(a), _momentum(b))
    for line in (*settings, *difference_lines(weights), *difference_lines(momentum)):
        _print(line)
    parts = (("settings", settings), ("weights", weights), ("momentum", momentum))
    _print(
        "; ".join(
            f"{name}: {f'{len(found)} differ' if found else 'equal'}" for name, found in parts
        )
    )
    return _DIFFERENT if settings or weights or momentum else ExitCode.DONE


def _momentum(content: Mapping[str, Any]) -> dict[str, Any]:
    buffers = content["optimizer"]["momentum_buffer"]
    return {f"momentum of {name}": buffer for name, buffer in buffers.items()}


def _settings(header: Any) -> dict[str, Any]:
    names = ("step", "samples", "world_size", "loss", "config")
    return {name: getattr(header, name) for name in names}


def _print(line: str) -> None:
    deliver(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
