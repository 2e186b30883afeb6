"""Command: list, verify, export, average and compare checkpoints.

Usage: ``python -m ddp_sgd.checkpoint ls runs/digits``. Listing and verifying need no torch.
"""

import argparse
import difflib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ddp_sgd.checkpointing.store import SET_ASIDE, CheckpointFolder, Manifest, fault_of, manifest_of
from ddp_sgd.cli import exit_code_of
from ddp_sgd.console import Parser, deliver
from ddp_sgd.errors import ConfigError, DataError, ExitCode
from ddp_sgd.scores import choosing_score
from ddp_sgd.text import columns

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
        _print(f"  {file} (step {manifest.header.step}, epoch {manifest.header.epochs:.4g})")
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


_HEAD = ("checkpoint", "step", "epoch", "samples", "ranks", "MB", "age", "score", "")
_NAME = re.compile(rf".*\.pt({re.escape(SET_ASIDE)}(\.\d+)?)?")
_AGES = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A file among checkpoints.

    Args:
        file: Where it is.
        size_bytes: Its length.
        manifest: Its manifest; None if it has no valid one.
        remark: ``last``, ``best``, or what is wrong as far as it shows without reading the file.
    """

    file: Path
    size_bytes: int
    manifest: Manifest | None
    remark: str


def list_checkpoints(path: Path) -> list[Listed]:
    """Look at the names, sizes and manifests of a folder; files are not read.

    Args:
        path: A run folder, or its folder of checkpoints.

    Returns:
        The oldest checkpoint first, then what has no manifest.

    Raises:
        DataError: It is no folder that can be read.
    """
    folder = CheckpointFolder.at(path).path
    try:
        files = sorted(file for file in folder.iterdir() if _NAME.fullmatch(file.name))
    except OSError as error:
        raise DataError(
            f"{path} is no folder that can be read ({error.strerror}); name a run folder."
        ) from error
    marks = _marks(folder)
    found = [_look_at(file, marks) for file in files if not file.is_symlink()]
    return sorted(found, key=_place)


def listing_lines(found: Sequence[Listed], *, now: float) -> list[str]:
    """Show checkpoints as a table.

    Args:
        found: From ``list_checkpoints``.
        now: Unix time in seconds, which ages refer to.
    """
    rows = [_HEAD, *(tuple(_cells(entry, now)) for entry in found)]
    return columns(rows, left=(0, len(_HEAD) - 1))


def files_to_verify(path: Path) -> list[Path]:
    """Name the checkpoints that a path stands for: itself, or all in a folder."""
    if not path.is_dir():
        return [path]
    return [entry.file for entry in list_checkpoints(path) if entry.file.suffix == ".pt"]


def fault_at(path: Path) -> str | None:
    """Compare every byte of a checkpoint with its manifest; None if it is whole."""
    file = path.resolve()
    try:
        if not file.is_file():
            return "is not there"
        manifest = manifest_of(file)
        if manifest is None:
            return f"has no valid manifest {file.with_suffix('.json').name} beside it"
        return fault_of(file, manifest)
    except OSError as error:
        return _cannot_be_read(error)


def _marks(folder: Path) -> Mapping[str, list[str]]:
    marks: dict[str, list[str]] = {}
    for name in ("last", "best"):
        with suppress(OSError):
            marks.setdefault((folder / name).readlink().name, []).append(name)
    return marks


def _look_at(file: Path, marks: Mapping[str, list[str]]) -> Listed:
    size = file.stat().st_size
    words = list(marks.get(file.name, ()))
    manifest = None
    try:
        manifest = manifest_of(file)
        if file.suffix != ".pt":
            words.append("set aside")
        elif manifest is None:
            words.append("no valid manifest")
        elif size != manifest.size_bytes:
            words.append(f"damaged: {size} bytes instead of {manifest.size_bytes}")
    except OSError as error:
        words.append(_cannot_be_read(error))
    return Listed(file=file, size_bytes=size, manifest=manifest, remark=" ".join(words))


def _cannot_be_read(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _place(entry: Listed) -> tuple[bool, int, str]:
    samples = entry.manifest.header.samples if entry.manifest else 0
    return entry.manifest is None, samples, entry.file.name


def _cells(entry: Listed, now: float) -> Iterator[str]:
    yield entry.file.name
    size = f"{entry.size_bytes / 1e6:.2f}"
    if entry.manifest is None:
        yield from ("-", "-", "-", "-", size, "-", "-", entry.remark)
        return
    header = entry.manifest.header
    yield str(header.step)
    yield f"{header.epochs:.4g}"
    yield f"{header.samples:,}"
    yield str(header.world_size)
    yield size
    yield _age(now - entry.manifest.time)
    yield _score(header.scores) if header.is_scored else "-"
    yield entry.remark


def _age(seconds: float) -> str:
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def _score(scores: Mapping[str, float | int]) -> str:
    name = choosing_score(scores)
    if name.endswith("/accuracy"):
        return f"{100 * scores[name]:.2f} %"
    return f"loss {scores.get(name, float('nan')):.4f}"


if __name__ == "__main__":
    sys.exit(main())
