"""What is done to a run. Each fault returns when it is done; the run has to come back by itself."""

import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from launching import kill
from saved_run import Bomb
from saving import flip

from benchmarks.soak.job import Job

Fault = Callable[[Job, random.Random], None]


def kill_a_rank(job: Job, chance: random.Random) -> None:
    """Kill a rank at any moment."""
    job.signal_rank(chance.randrange(2), signal.SIGKILL)


def kill_during_a_save(job: Job, chance: random.Random) -> None:
    """Kill rank 0 while a checkpoint is being written."""
    folder = job.folder / "checkpoints"
    job.wait_for("a save", lambda: any(folder.glob(".step-*.new")) or job.ended() is not None)
    time.sleep(chance.uniform(0.0, 0.01))
    job.signal_rank(0, signal.SIGKILL)


def stop_the_launcher(job: Job, chance: random.Random) -> None:  # noqa: ARG001
    """Ask the launcher to stop, as a scheduler does; somebody starts it again."""
    kill(job.launcher, signal.SIGTERM)
    job.wait_for("the launcher ends", lambda: job.ended() is not None)


def freeze_a_rank(job: Job, chance: random.Random) -> None:
    """Freeze a rank: it is there, and does nothing."""
    job.signal_rank(chance.randrange(2), signal.SIGSTOP)


def fill_the_disk(job: Job, chance: random.Random) -> None:
    """Leave so little room that no checkpoint fits, until the run has met that."""
    filler = job.folder.parent / "filler"
    seen = sum("error" in row for row in job.rows())
    left = chance.randrange(300_000, 600_000)

    def has_filled() -> bool:
        free = os.statvfs(job.folder)
        size = max(1, free.f_bavail * free.f_frsize - left)
        with filler.open("wb") as stream, suppress(OSError):  # a save may take room meanwhile
            os.posix_fallocate(stream.fileno(), 0, size)
            return True
        return False

    job.wait_for("the disk is full", has_filled)

    def was_met() -> bool:
        return job.ended() is not None or sum("error" in row for row in job.rows()) > seen

    try:
        job.wait_for("a save meets the full disk", was_met)
    finally:
        filler.unlink()


def truncate(job: Job, chance: random.Random) -> None:
    """Cut the newest checkpoint short, then kill a rank."""
    _damage(job, chance, lambda file, size: os.truncate(file, chance.randrange(1, size)))


def empty(job: Job, chance: random.Random) -> None:
    """Empty the newest checkpoint, then kill a rank."""
    _damage(job, chance, lambda file, _: file.write_bytes(b""))


def flip_a_bit(job: Job, chance: random.Random) -> None:
    """Flip one bit of the newest checkpoint, then kill a rank."""
    _damage(job, chance, lambda file, size: flip(file, chance.randrange(8 * size)))


def plant_a_bomb(job: Job, chance: random.Random) -> None:
    """Put a pickle that runs code in the place of the newest checkpoint, then kill a rank."""
    bomb = {"model": Bomb(job.bomb)}
    _damage(job, chance, lambda file, _: torch.save(bomb, file, pickle_module=pickle))


def _damage(job: Job, chance: random.Random, harm: Callable[[Path, int], object]) -> None:
    rank = chance.randrange(2)
    newest = max((job.folder / "checkpoints").glob("step-*.pt"), default=None)
    if newest is not None:
        harm(newest, newest.stat().st_size)
    job.signal_rank(rank, signal.SIGKILL)


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
