"""A command seen from outside: the CPU time and the memory of its processes, all measured alike."""

import subprocess
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT

_PAUSE_S = 0.01
_PAUSES_A_LOOK = 10
"""The CPU clocks are read at every pause, processes and memory are looked up less often."""
_LIMIT_S = 600.0


class Watch:
    """Runs a command to its end, from ``start`` to ``end``, and looks at its processes meanwhile.

    Without a launcher the command is the rank; a launcher's children are the ranks. What ranks
    start themselves, such as the process in which ``ddp_sgd`` has W&B, counts apart.

    Args:
        command: The command.
        environ: Its environment.
        log: File for what it prints.
        ranks: Ranks; several are started by the command.

    Raises:
        RuntimeError: The command fails, or takes too long.
    """

    def __init__(
        self, command: list[str], environ: dict[str, str], log: Path, *, ranks: int
    ) -> None:
        self._ranks = ranks
        self._depth_of_ranks = 1 if ranks > 1 else 0
        self._depth: dict[int, int] = {}
        self._spent: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self._peak: dict[int, int] = {}
        with log.open("wb") as output:
            self.start = time.time()
            process = subprocess.Popen(
                command, env=environ, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                self._look_on(process)
            finally:
                process.terminate()  # a launcher takes its ranks along
                process.wait(timeout=60)
            self.end = time.time()
        if process.returncode != 0:
            text = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text}")

    def rank_cpu_s(self, start: float, end: float) -> float:
        """CPU time of a rank between two instants, in seconds, as a mean over ranks."""
        started = [pid for pid, depth in self._depth.items() if depth == self._depth_of_ranks]
        # A launcher may have other children, for moments.
        spent = sorted((self._cpu_s(pid, start, end) for pid in started), reverse=True)
        return sum(spent[: self._ranks]) / self._ranks

    def other_cpu_s(self, start: float, end: float) -> float:
        """CPU time of all processes that ranks started, between two instants, in seconds."""
        others = [pid for pid, depth in self._depth.items() if depth > self._depth_of_ranks]
        return sum(self._cpu_s(pid, start, end) for pid in others)

    def peak_mb(self) -> float:
        """Most memory that a rank had, in MB."""
        return max(self._peak.values()) / 1e6

    def _cpu_s(self, pid: int, start: float, end: float) -> float:
        if pid not in self._spent:
            return 0.0
        at_start, at_end = np.interp([start, end], *zip(*self._spent[pid], strict=True))
        return float(at_end - at_start)

    def _look_on(self, process: subprocess.Popen[bytes]) -> None:
        for turn in range(int(_LIMIT_S / _PAUSE_S)):
            if process.poll() is not None:
                return
            if turn % _PAUSES_A_LOOK == 0:
                self._look_up(process.pid)
            for pid in self._depth:
                with suppress(OSError):  # it is gone
                    clock = (
                        ~pid << 3
                    ) | 2  # its CPU time, as clock_getcpuclockid(3) has it on Linux
                    self._spent[pid].append((time.time(), time.clock_gettime(clock)))
            time.sleep(_PAUSE_S)
        raise RuntimeError(f"{process.args} takes longer than {_LIMIT_S:g} s")

    def _look_up(self, root: int) -> None:
        """Find new processes, and read how much memory those of interest have had."""
        found = [(root, 0)]
        for pid, depth in found:
            self._depth.setdefault(pid, depth)
            with suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if depth == self._depth_of_ranks and "VmHWM:" in status:
                    self._peak[pid] = 1024 * int(status.split("VmHWM:")[1].split()[0])
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    children = (thread / "children").read_text().split()
                    found += [(int(child), depth + 1) for child in children]
