"""Checkpoint manifest: size, digest and header of a checkpoint, beside it as JSON. No torch.

The manifest of ``step-00000045.pt`` is ``step-00000045.json`` beside it. A file without one is no
checkpoint.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddp_sgd.files import is_missing, retry

FORMAT = 1
"""Version of what a checkpoint holds; a reader refuses others."""


class SkippedSteps(NamedTuple):
    """Steps of a run that were skipped, since their gradient was not finite.

    Args:
        total: All of them.
        in_a_row: Those in a row up to now.
        longest_row: The most that ever were in a row.
    """

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
        outer = {"format": FORMAT, "check": _check(content), **content}
        return _in_lines(_texts(outer) | {"header": _in_lines(_texts(header))}) + "\n"


def _texts(content: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in content.items()}


def _in_lines(texts: dict[str, str]) -> str:
    """Give every key a line of its own; with an indent ``json.dumps`` takes ten times as long."""
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


def _check(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
