"""Listing and verification of checkpoints for the command line. No torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddp_sgd.checkpointing.store import (
    FOLDER_NAME,
    SET_ASIDE,
    CheckpointFolder,
    Header,
    Manifest,
    fault_of,
    manifest_of,
)
from ddp_sgd.errors import DataError
from ddp_sgd.text import columns

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


def checkpoint_folder(path: Path) -> CheckpointFolder:
    """Find the checkpoints of a run folder, or take a folder of checkpoints as it is."""
    inner = path / FOLDER_NAME
    return CheckpointFolder(inner if inner.is_dir() else path)


def list_checkpoints(path: Path) -> list[Listed]:
    """Look at the names, sizes and manifests of a folder; files are not read.

    Args:
        path: A run folder, or its folder of checkpoints.

    Returns:
        The oldest checkpoint first, then what has no manifest.

    Raises:
        DataError: It is no folder that can be read.
    """
    folder = checkpoint_folder(path).path
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


def epochs_of(header: Header) -> float:
    """Passes over the data, a real number."""
    return float(header.epoch + header.position / header.plan["samples_per_epoch"])


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
    yield f"{epochs_of(header):.4g}"
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
    if "eval/accuracy" in scores:
        return f"{100 * scores['eval/accuracy']:.2f} %"
    return f"loss {scores.get('eval/loss', float('nan')):.4f}"
