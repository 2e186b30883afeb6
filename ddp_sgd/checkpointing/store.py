"""Checkpoint folder: list, choose the newest whole one, keep the last few; manifests. No torch.

The manifest of ``step-00000045.pt`` is ``step-00000045.json`` beside it, with size, digest and
header. A file without one is no checkpoint. The ledger of what was saved is the manifests
themselves, so nothing is forgotten over a resume.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddp_sgd.errors import DataError
from ddp_sgd.files import is_file, is_missing, is_taken, retry, unreadable
from ddp_sgd.scores import goodness

FORMAT = 1
"""Version of what a checkpoint holds; a reader refuses others."""


class SkippedSteps(NamedTuple):
    """Steps of a run that were skipped, since their gradient was not finite."""

    total: int = 0
    in_a_row: int = 0
    longest_row: int = 0

    def after(self, *, is_finite: bool) -> "SkippedSteps":
        """Count one more step, which was skipped unless its gradient is finite."""
        if is_finite:
            return self._replace(in_a_row=0)
        in_a_row = self.in_a_row + 1
        return SkippedSteps(self.total + 1, in_a_row, max(self.longest_row, in_a_row))


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Where a run stood, and what it was.

    Args:
        step: Optimizer steps taken.
        epoch: Number of the epoch that the next step belongs to, from 0.
        position: Samples of that epoch that were trained, in [0, samples of an epoch).
        samples: Samples that the run trained.
        scored_at: Step of the last evaluation.
        scores: The last evaluation, by name.
        skipped: Steps without a finite gradient.
        world_size: Ranks.
        run_id: Identity of the run, also in W&B.
        loss: What the loss is: its class, and the shapes of what it holds.
        plan: The run's arithmetic, by name.
        config: Resolved configuration, as plain data.
        versions: Releases of python, torch and ddp_sgd, and the name of the order of samples.
    """

    step: int
    epoch: int
    position: int
    samples: int
    scored_at: int
    scores: dict[str, float | int]
    skipped: SkippedSteps
    world_size: int
    run_id: str
    loss: str
    plan: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def epochs(self) -> float:
        """Passes over the data, a real number."""
        return float(self.epoch + self.position / self.plan["samples_per_epoch"])

    @property
    def is_scored(self) -> bool:
        """Whether the scores are those of the weights that are saved."""
        return self.scored_at == self.step and bool(self.scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint that was written whole.

    Args:
        file: Name of the file with the tensors, in the same folder.
        size_bytes: Its length.
        sha256: Its SHA-256, in hexadecimal.
        time: When it was written, unix time in seconds.
        header: Where the run stood.
    """

    file: str
    size_bytes: int
    sha256: str
    time: float
    header: Header

    def to_text(self) -> str:
        """Return the manifest as JSON that carries its own checksum."""
        header = {name: getattr(self.header, name) for name in Header.__slots__}
        content = {name: getattr(self, name) for name in self.__slots__} | {"header": header}
        check = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        outer = {"format": FORMAT, "check": check, **content}
        return _in_lines(outer, header=_in_lines(header)) + "\n"


def _in_lines(content: dict[str, Any], **written: str) -> str:
    """Give every key a line of its own; with an indent ``json.dumps`` takes ten times as long."""
    texts = {key: json.dumps(value) for key, value in content.items()} | written
    lines = [f'"{key}": {text}' for key, text in texts.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest; None if it is missing, damaged, or of another format.

    Raises:
        OSError: It cannot be read; its content may be valid.
    """
    try:
        text = retry(path.read_bytes)
    except OSError as error:
        if is_missing(error):
            return None
        raise
    try:
        content = json.loads(text)
        del content["format"], content["check"]
        header = content.pop("header")
        header["skipped"] = SkippedSteps(*header["skipped"])
        manifest = Manifest(header=Header(**header), **content)
        # Byte by byte: the last digit of a float can change without a change of the number.
        return manifest if manifest.to_text().encode() == text else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


FOLDER_NAME = "checkpoints"
UNFINISHED = ".new"
"""Ending of files that are being written."""
SET_ASIDE = ".damaged"
"""Ending of files that a resume could not use; a second one of the same name ends in .damaged.2."""

_SAVED = re.compile(r"step-(\d{8,})(?:\.(\d+))?\.pt")


@dataclass(frozen=True, slots=True)
class Choice:
    """The newest checkpoint that is whole.

    Args:
        manifest: Its manifest; None if there is no such checkpoint.
        passed_over: What is wrong with newer ones, one line each.
    """

    manifest: Manifest | None
    passed_over: tuple[str, ...] = ()


class CheckpointFolder:
    """Checkpoints in one folder, in the order of the samples that they have seen.

    Args:
        path: The folder; it need not exist until something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settled: list[Manifest] | None = None
        self._best: Manifest | None = None

    @classmethod
    def at(cls, path: Path) -> "CheckpointFolder":
        """Find the checkpoints of a run folder, or take a folder of checkpoints as it is."""
        inner = path / FOLDER_NAME
        return cls(inner if inner.is_dir() else path)

    def manifests(self) -> list[Manifest]:
        """Read the manifests whose file is there, the oldest checkpoint first.

        Raises:
            DataError: One cannot be read.
        """
        entries, failures = self._read_manifests()
        for file, error in failures.items():
            raise _unreadable(file.with_suffix(".json"), error) from error
        return entries

    def name_for(self, header: Header) -> str:
        """Choose the name of a file, in the way that never replaces another checkpoint.

        Steps may come twice, where a resume with another global batch counted them again.

        Raises:
            OSError: It cannot be checked whether a name is free.
        """
        number, name = 1, f"step-{header.step:08d}.pt"
        while is_taken(self.path / name):
            number += 1
            name = f"step-{header.step:08d}.{number}.pt"
        return name

    def choose(self) -> Choice:
        """Find the newest checkpoint whose bytes are those that were written.

        One that is damaged is passed over. One that cannot be read may be whole: to go on from an
        older one would train its steps a second time, and leave two continuations of one run.

        Raises:
            DataError: A newer one cannot be read.
        """
        entries, failures = self._read_manifests()
        listed = {entry.file for entry in entries}
        orphans = {file.name for file in self._files() if file not in failures} - listed
        damaged: list[str] = []
        chosen = None
        for entry in reversed(entries):
            if (fault := self.fault_of(entry)) is None:
                chosen = entry
                break
            damaged.append(f"{entry.file} {fault}")
        oldest = _place(chosen.file) if chosen else (-1, 0)
        for file, error in failures.items():
            if _place(file.name) > oldest:
                raise _unreadable(file.with_suffix(".json"), error) from error
        unlisted = sorted((name for name in orphans if _place(name) > oldest), key=_place)
        lines = [*(f"{name} has no valid manifest" for name in reversed(unlisted)), *damaged]
        return Choice(chosen, tuple(lines))

    def fault_of(self, entry: Manifest) -> str | None:
        """Describe what is wrong with a checkpoint; None if its bytes are those written.

        Raises:
            DataError: It cannot be read.
        """
        file = self.path / entry.file
        try:
            return fault_of(file, entry)
        except OSError as error:
            raise _unreadable(file, error) from error

    def set_aside(self, *, after_samples: int) -> None:
        """Rename what claims to be newer, so that it is neither chosen nor counted again.

        What cannot be read, and so cannot be judged, keeps its name.
        """
        for file in self._files():
            with suppress(OSError):
                entry = manifest_of(file)
                if entry is None or entry.header.samples > after_samples:
                    self._set_aside(file)

    def _set_aside(self, file: Path) -> None:
        """Rename a checkpoint and its manifest, to names that end alike and that nothing has."""
        pair = (file, file.with_suffix(".json"))
        number, ending = 1, SET_ASIDE
        while any(is_taken(path.with_name(f"{path.name}{ending}")) for path in pair):
            number += 1
            ending = f"{SET_ASIDE}.{number}"
        for path in pair:
            path.rename(path.with_name(f"{path.name}{ending}"))

    def clean_up(self) -> None:
        """Remove what saves that were cut short left behind."""
        for file in [*self.path.glob(f".*{UNFINISHED}"), *self.path.glob("step-*.json")]:
            with suppress(OSError):
                if file.suffix == UNFINISHED or not is_taken(file.with_suffix(".pt")):
                    file.unlink()

    def settle(self, *, keep: int, written: Manifest | None = None) -> None:
        """Point ``last`` and ``best`` at their files, then remove what is neither new nor best.

        The folder is read the first time; a run has it for itself, and knows what it wrote since.

        Args:
            keep: Newest checkpoints that stay, at least 1; the best stays beside them.
            written: What was written since the last time; None reads the folder.
        """
        if written is None or self._settled is None:
            entries, _ = self._read_manifests()  # what cannot be read stays as it is
        else:
            entries = _in_order([*self._settled, written])
        best = best_of(entries)
        self._point("last", entries[-1])
        if best is not None and best is not self._best:
            self._point("best", best)
        self._best, self._settled = best, entries[-keep:]
        for entry in entries[:-keep]:
            if entry is best:
                self._settled.insert(0, entry)
                continue
            file = self.path / entry.file
            # The manifest last: of one without a file, clean_up knows that it may go.
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        try:
            files = retry(lambda: list(self.path.iterdir()))
            return [file for file in files if _SAVED.fullmatch(file.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:  # to begin at step 0 would be wrong: there may be checkpoints
            raise unreadable(self.path, error, "name another folder") from error

    def _read_manifests(self) -> tuple[list[Manifest], dict[Path, OSError]]:
        """Read the manifests whose file is there; gives them in order, and what cannot be read."""
        entries, failures = [], {}
        for file in self._files():
            try:
                entry = manifest_of(file)
            except OSError as error:
                failures[file] = error
                continue
            if entry:
                entries.append(entry)
        return _in_order(entries), failures

    def _point(self, name: str, entry: Manifest) -> None:
        """Replace a link at once; file systems without links do without.

        A file of that name is none of ours.
        """
        link, new = self.path / name, self.path / f".{name}{UNFINISHED}"
        with suppress(OSError):
            if is_taken(link) and not link.is_symlink():
                return
            new.unlink(missing_ok=True)
            new.symlink_to(entry.file)
            new.replace(link)


def _in_order(entries: list[Manifest]) -> list[Manifest]:
    return sorted(entries, key=lambda entry: (entry.header.samples, entry.time))


def manifest_of(file: Path) -> Manifest | None:
    """Read the manifest beside a file; None if it is not that of this file.

    Raises:
        OSError: It may be, but cannot be read.
    """
    entry = read_manifest(file.with_suffix(".json"))
    return entry if entry and entry.file == file.name and is_file(file) else None


def _unreadable(file: Path, error: OSError) -> DataError:
    """Return the error of a checkpoint, or its manifest, that cannot be read."""
    other = file.with_suffix({".pt": ".json", ".json": ".pt"}[file.suffix]).name
    otherwise = f"move it and {other} out of the folder to go on from an older checkpoint"
    return unreadable(file, error, otherwise)


def _place(name: str) -> tuple[int, int]:
    """Order names by their numbers, where there are no samples to go by."""
    match = _SAVED.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)


def fault_of(file: Path, entry: Manifest) -> str | None:
    """Compare a file with its manifest; None if it is what was written.

    Raises:
        OSError: It cannot be read; its content may be valid.
    """
    try:
        size, digest = retry(lambda: _size_and_digest(file, entry.size_bytes))
    except OSError as error:
        if is_missing(error):
            return f"cannot be read: {error.strerror}"
        raise
    if size != entry.size_bytes:
        return f"has {size} bytes instead of {entry.size_bytes}"
    if digest != entry.sha256:
        return "is damaged: its SHA-256 is not that of the manifest"
    return None


def _size_and_digest(file: Path, expected: int) -> tuple[int, str]:
    """Read a file, unless its length is not the one that is expected."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.file_digest(stream, "sha256").hexdigest() if size == expected else ""
    return size, digest


def best_of(entries: Sequence[Manifest]) -> Manifest | None:
    """Choose the checkpoint with the best scores, the oldest of equal ones; None: none is scored.

    Args:
        entries: Checkpoints of a run, the oldest first.
    """
    scored = [entry for entry in entries if entry.header.is_scored]
    return max(scored, key=lambda entry: goodness(entry.header.scores), default=None)
