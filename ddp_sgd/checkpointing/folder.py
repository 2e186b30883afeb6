"""The folder of a run's checkpoints: which there are, which are whole, which may go. No torch.

The ledger of what was saved is the manifests themselves, so nothing is forgotten over a resume.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddp_sgd.checkpointing.manifest import Header, Manifest, read_manifest
from ddp_sgd.errors import DataError

FOLDER_NAME = "checkpoints"
UNFINISHED = ".new"
"""Ending of files that are being written."""

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

    def manifests(self) -> list[Manifest]:
        """Read the manifests whose file is there, the oldest checkpoint first."""
        return _in_order([entry for entry in map(_manifest_of, self._files()) if entry])

    def name_for(self, header: Header) -> str:
        """Choose the name of a file, in the way that never replaces another checkpoint.

        Steps may come twice, where a resume with another global batch counted them anew.
        """
        number, name = 1, f"step-{header.step:08d}.pt"
        while os.path.lexists(self.path / name):
            number += 1
            name = f"step-{header.step:08d}.{number}.pt"
        return name

    def choose(self) -> Choice:
        """Find the newest checkpoint whose bytes are those that were written."""
        entries = self.manifests()
        listed = {entry.file for entry in entries}
        orphans = {file.name for file in self._files()} - listed
        damaged: list[str] = []
        chosen = None
        for entry in reversed(entries):
            if (fault := self.fault_of(entry)) is None:
                chosen = entry
                break
            damaged.append(f"{entry.file} {fault}")
        oldest = _place(chosen.file) if chosen else (-1, 0)
        unlisted = sorted((name for name in orphans if _place(name) > oldest), key=_place)
        lines = [*(f"{name} has no valid manifest" for name in reversed(unlisted)), *damaged]
        return Choice(chosen, tuple(lines))

    def fault_of(self, entry: Manifest) -> str | None:
        """Say what is wrong with a checkpoint; None if its bytes are those that were written."""
        return fault_of(self.path / entry.file, entry)

    def set_aside(self, *, after_samples: int) -> None:
        """Rename what claims to be newer, so that it is neither chosen nor counted again."""
        for file in self._files():
            entry = _manifest_of(file)
            if entry is None or entry.header.samples > after_samples:
                with suppress(OSError):
                    file.replace(file.with_suffix(".pt.damaged"))
                    file.with_suffix(".json").replace(file.with_suffix(".json.damaged"))

    def clean_up(self) -> None:
        """Remove what saves that were cut short left behind."""
        for file in [*self.path.glob(f".*{UNFINISHED}"), *self.path.glob("step-*.json")]:
            with suppress(OSError):
                if file.suffix == UNFINISHED or not file.with_suffix(".pt").exists():
                    file.unlink()

    def settle(self, *, keep: int, written: Manifest | None = None) -> None:
        """Point ``last`` and ``best`` at their files, then remove what is neither new nor best.

        The folder is read the first time; a run has it for itself, and knows what it wrote since.

        Args:
            keep: Newest checkpoints that stay, at least 1; the best stays beside them.
            written: What was written since the last time; None reads the folder.
        """
        if written is None or self._settled is None:
            entries = self.manifests()
        else:
            entries = _in_order([*self._settled, written])
        scored = [entry for entry in entries if entry.header.is_scored]
        best = max(scored, key=lambda entry: goodness(entry.header.scores), default=None)
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
            return [file for file in self.path.iterdir() if _SAVED.fullmatch(file.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:  # to begin anew would be wrong: there may be checkpoints
            raise DataError(
                f"{self.path} cannot be read: {error.strerror or error}; give this user the right "
                "to, or look at its disk."
            ) from error

    def _point(self, name: str, entry: Manifest) -> None:
        """Replace a link at once; file systems without links do without."""
        new = self.path / f".{name}{UNFINISHED}"
        with suppress(OSError):
            new.unlink(missing_ok=True)
            new.symlink_to(entry.file)
            new.replace(self.path / name)


def _in_order(entries: list[Manifest]) -> list[Manifest]:
    return sorted(entries, key=lambda entry: (entry.header.samples, entry.time))


def _manifest_of(file: Path) -> Manifest | None:
    """Read the manifest beside a file; None if it is not that of this file."""
    entry = read_manifest(file.with_suffix(".json"))
    return entry if entry and entry.file == file.name and file.is_file() else None


def _place(name: str) -> tuple[int, int]:
    """Order names by their numbers, where there are no samples to go by."""
    match = _SAVED.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)


def fault_of(file: Path, entry: Manifest) -> str | None:
    """Compare a file with its manifest; None if it is what was written."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != entry.size_bytes:
                return f"has {size} bytes instead of {entry.size_bytes}"
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                return "is damaged: its SHA-256 is not that of the manifest"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def goodness(scores: Mapping[str, float | int]) -> float:
    """Order evaluations: by accuracy where there is one, else by the loss."""
    value = scores.get("eval/accuracy", -scores.get("eval/loss", math.inf))
    return value if math.isfinite(value) else -math.inf
