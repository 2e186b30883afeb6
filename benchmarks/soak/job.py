"""A run under a launcher: started, watched through its journal, reached by signals."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from launching import LOCAL, Launch, kill

from ddp_sgd.data import Digits

INTERVAL = 100
"""Steps between checkpoints."""
ROWS = 5
"""Steps between rows of the journal."""
_TOO_LONG_S = 300.0


class SpoiltDigits(Digits):
    """Digits read one by one, each spoilt with a small chance.

    The chance is drawn from the numbers that are seeded by (seed, epoch, index), so that what is
    spoilt does not depend on ranks, restarts or time.

    Args:
        chance: Share of reads that give NaN, in [0, 1].
    """

    def __init__(self, chance: float = 0.0) -> None:
        super().__init__()
        self._chance = chance

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        pixels, digit = super().__getitem__(index)
        pixels = torch.as_tensor(pixels)
        return torch.where(torch.rand(()) < self._chance, torch.nan, pixels), digit


class Job:
    """One run of two ranks, started again by torchrun, or by ``start`` when that has ended too.

    Args:
        home: Folder that is made for it.
        steps: Optimizer steps, a multiple of 23, which an epoch has.
        spoilt: Share of reads that give NaN.
    """

    def __init__(self, home: Path, steps: int, spoilt: float) -> None:
        home.mkdir()
        self.folder = home / "runs" / "digits"
        self.bomb = home / "bomb"
        self._home = home
        self._options = [
            f"--epochs={steps // 23}",
            "--data.train.class_path=benchmarks.soak.job.SpoiltDigits",
            f"--data.train.init_args={{chance: {spoilt}}}",
            "--model.init_args.hidden=[256, 256]",
            "--eval.every_epochs=20",
            f"--log.every_steps={ROWS}",
            f"--checkpoint={{every_steps: {INTERVAL}, every_epochs: null}}",
            "--runtime.hang_s=5.0",
            "--runtime.timeout_s=60",
        ]

    def start(self) -> None:
        """Start the launcher, with more restarts than there will be faults."""
        words = ("--nproc=2", "--max-restarts=1000", *self._options)
        self._launch = Launch(self._home, LOCAL, *words)

    @property
    def launcher(self) -> int:
        """Process number of the launch script."""
        return self._launch.script.pid

    def ended(self) -> int | None:
        """Exit code of the launcher; None while it runs."""
        return self._launch.script.poll()

    def signal_rank(self, number: int, signal: int) -> None:
        """Send a signal to a rank, if there is one now."""
        if (process := self._launch.ranks.get(number)) is not None:
            kill(process, signal)

    def rows(self) -> list[dict[str, Any]]:
        """The journal as far as it is whole."""
        return [json.loads(line) for line in self._lines()]

    def last_row(self) -> dict[str, Any]:
        """The newest row; one of step -1 if there is none."""
        lines = self._lines()
        return json.loads(lines[-1]) if lines else {"step": -1, "time": 0.0, "event": ""}

    def _lines(self) -> list[bytes]:
        try:
            return (self.folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            return []

    def wait_for(self, what: str, met: Any) -> None:
        """Look again and again until something holds.

        Raises:
            TimeoutError: It took too long.
        """
        deadline = time.monotonic() + _TOO_LONG_S
        while not met():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {_TOO_LONG_S:g} s; {self.last_row()}")
            time.sleep(0.005)

    def wait_for_progress(self, since: float, *, resumed: bool = False) -> dict[str, Any]:
        """Wait for a training row that is newer than an instant; starts the launcher if needed.

        Args:
            since: Unix time in seconds.
            resumed: Whether the row must be of a new attempt: a frozen one may wake up once more.
        """

        def progressed() -> bool:
            if self.ended() is not None and self.result().get("status") != "finished":
                self.start()
            row = self.last_row()
            alive = row["event"] == "train" and row["time"] > since
            return self.is_finished() or (alive and (not resumed or self._resumed_since(since)))

        self.wait_for("the run comes back", progressed)
        return self.last_row()

    def _resumed_since(self, instant: float) -> bool:
        return any(row["event"] == "resume" and row["time"] > instant for row in self.rows())

    def result(self) -> dict[str, Any]:
        """Content of result.json; empty if there is none."""
        try:
            return json.loads((self.folder / "result.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def is_finished(self) -> bool:
        """Whether the launcher ended with a finished run."""
        return self.ended() is not None and self.result().get("status") == "finished"
