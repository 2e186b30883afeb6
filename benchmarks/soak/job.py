"""A run under a launcher: started, watched through its journal, reached by signals."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 100
"""Steps between checkpoints."""
ROWS = 5
"""Steps between rows of the journal."""
HANG_S = 5.0
_TOO_LONG_S = 300.0


class Job:
    """One run of two ranks, started again by torchrun, or by ``start`` when that has ended too.

    Args:
        output_dir: Folder of run folders.
        steps: Optimizer steps, a multiple of 23, which an epoch has.
        spoilt: Share of reads that give NaN.
        python: Interpreter that has ddp_sgd.
    """

    def __init__(self, output_dir: Path, steps: int, spoilt: float, python: str) -> None:
        self.folder = output_dir / "soak"
        self._mark = uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._environ = os.environ | {
            "SOAK_MARK": self._mark,
            "PYTHON": python,
            "OMP_NUM_THREADS": "1",
        }
        self._options = [
            "--name=soak",
            f"--output_dir={output_dir}",
            f"--epochs={steps // 23}",
            "--data.train.class_path=benchmarks.soak.data.SpoiltDigits",
            "--data.train.init_args={chance: " + str(spoilt) + "}",
            "--model.init_args.hidden=[256, 256]",
            "--eval.every_epochs=20",
            f"--log.every_steps={ROWS}",
            f"--checkpoint={{every_steps: {INTERVAL}, every_epochs: null}}",
            f"--runtime.hang_s={HANG_S}",
            "--runtime.timeout_s=60",
            "--wandb.mode=disabled",
        ]

    def start(self) -> None:
        """Start the launcher, with more restarts than there will be faults."""
        command = ["launch/local.sh", "--nproc=2", "--max-restarts=1000", *self._options]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def launcher(self) -> int:
        """Process number of the launch script."""
        if self._process is None:
            raise RuntimeError("the job was not started")
        return self._process.pid

    def ended(self) -> int | None:
        """Exit code of the launcher; None while it runs."""
        return self._process.poll() if self._process else None

    def rank(self, number: int) -> int | None:
        """Process number of a rank; None while there is none."""
        wanted = {f"SOAK_MARK={self._mark}".encode(), f"LOCAL_RANK={number}".encode()}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ = set((entry / "environ").read_bytes().split(b"\0"))
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if wanted <= environ and stat[0] != "Z":
                    return int(entry.name)
        return None

    def rows(self) -> list[dict[str, Any]]:
        """The journal as far as it is whole."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
        return [json.loads(line) for line in lines]

    def last_row(self) -> dict[str, Any]:
        """The newest row; one of step -1 if there is none."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
                lines = stream.read().split(b"\n")[:-1]
            return json.loads(lines[-1]) if lines else {"step": -1, "time": 0.0, "event": ""}
        except (OSError, ValueError):
            return {"step": -1, "time": 0.0, "event": ""}

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

    def wait_for_life(self, since: float, *, resumed: bool = False) -> dict[str, Any]:
        """Wait for a training row that is newer than an instant; starts the launcher if needed.

        Args:
            since: Unix time in seconds.
            resumed: Whether the row must be that of a new life: one that froze may wake once more.
        """

        def lives() -> bool:
            if self.ended() is not None and self.result().get("status") != "finished":
                self.start()
            row = self.last_row()
            alive = row["event"] == "train" and row["time"] > since
            return self.is_finished() or (alive and (not resumed or self._resumed_since(since)))

        self.wait_for("the run comes back", lives)
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
