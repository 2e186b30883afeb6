"""What is done to a run. Each fault returns when it is done; the run has to come back by itself."""

import os
import pickle
import random
import signal
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.soak.job import Job

Fault = Callable[[Job, random.Random], None]


def kill_a_rank(job: Job, chance: random.Random) -> None:
    """End a rank without a word, at any moment."""
    _signal(job.rank(chance.randrange(2)), signal.SIGKILL)


def kill_during_a_save(job: Job, chance: random.Random) -> None:
    """End rank 0 while a checkpoint is being written."""
    folder = job.folder / "checkpoints"

    def is_saving() -> bool:
        return any(folder.glob(".step-*.new")) or job.ended() is not None

    rank = job.rank(0)
    job.wait_for("a save", is_saving)
    time.sleep(chance.uniform(0.0, 0.01))
    _signal(rank, signal.SIGKILL)


def stop_the_launcher(job: Job, chance: random.Random) -> None:  # noqa: ARG001
    """Ask the launcher to stop, as a scheduler does; somebody starts it again."""
    _signal(job.launcher, signal.SIGTERM)
    job.wait_for("the launcher ends", lambda: job.ended() is not None)


def freeze_a_rank(job: Job, chance: random.Random) -> None:
    """Stop a rank in its tracks: it is there, and does nothing."""
    _signal(job.rank(chance.randrange(2)), signal.SIGSTOP)


def fill_the_disk(job: Job, chance: random.Random) -> None:
    """Leave so little room that no checkpoint fits, until the run has met that."""
    filler = job.folder.parent / "filler"
    seen = sum("error" in row for row in job.rows())
    free = os.statvfs(job.folder)
    room = free.f_bavail * free.f_frsize
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, room - chance.randrange(300_000, 600_000)))

    def was_met() -> bool:
        return job.ended() is not None or sum("error" in row for row in job.rows()) > seen

    try:
        job.wait_for("a save meets the full disk", was_met)
    finally:
        filler.unlink()


def truncate(job: Job, chance: random.Random) -> None:
    """Cut the newest checkpoint short, then kill a rank."""
    _damage(job, chance, lambda text: text[: chance.randrange(1, len(text))])


def empty(job: Job, chance: random.Random) -> None:
    """Empty the newest checkpoint, then kill a rank."""
    _damage(job, chance, lambda _: b"")


def flip_a_bit(job: Job, chance: random.Random) -> None:
    """Flip one bit of the newest checkpoint, then kill a rank."""

    def flip(text: bytes) -> bytes:
        place = chance.randrange(len(text))
        return text[:place] + bytes([text[place] ^ 1 << chance.randrange(8)]) + text[place + 1 :]

    _damage(job, chance, flip)


def plant_a_bomb(job: Job, chance: random.Random) -> None:
    """Put a pickle that runs a command in the place of the newest checkpoint, then kill a rank."""
    _damage(job, chance, lambda _: _bomb(job.folder.parent / "bomb"))


FAULTS: dict[str, tuple[Fault, int]] = {
    "kill -9 of a rank": (kill_a_rank, 30),
    "kill -9 during a save": (kill_during_a_save, 15),
    "SIGTERM to the launcher": (stop_the_launcher, 10),
    "SIGSTOP of a rank": (freeze_a_rank, 10),
    "disk full": (fill_the_disk, 7),
    "newest checkpoint truncated": (truncate, 7),
    "newest checkpoint emptied": (empty, 7),
    "one bit of the newest checkpoint flipped": (flip_a_bit, 7),
    "newest checkpoint a pickle bomb": (plant_a_bomb, 7),
}
"""Each fault by name, with its weight in the draw."""


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._mark}",)


def _bomb(mark: Path) -> bytes:
    """Make a file of torch's format whose pickle leaves a mark when it is run."""
    path = mark.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": _Bomb(mark)}))
        archive.writestr("archive/version", "3\n")
    text = path.read_bytes()
    path.unlink()
    return text


def _damage(job: Job, chance: random.Random, harm: Callable[[bytes], bytes]) -> None:
    rank = job.rank(chance.randrange(2))
    newest = max((job.folder / "checkpoints").glob("step-*.pt"), default=None)
    if newest is not None:
        newest.write_bytes(harm(newest.read_bytes()))
    _signal(rank, signal.SIGKILL)


def _signal(process: int | None, number: signal.Signals) -> None:
    if process is not None:
        with suppress(ProcessLookupError):
            os.kill(process, number)
