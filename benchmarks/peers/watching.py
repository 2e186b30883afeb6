"""A command seen from outside: the CPU time and the memory of its processes, all measured alike."""

import bisect
import subprocess
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

_PAUSE_S = 0.01
_PAUSES_A_LOOK = 10
"""The CPU clocks are read at every pause, processes and memory are looked up less often."""
_LIMIT_S = 600.0
ROOT = Path(__file__).resolve().parents[2]


class Watch:
    """Runs a command to its end, and looks at its processes meanwhile.

    Without a launcher the command is the rank; a launcher's children are the ranks. What ranks
    start themselves, such as the process in which ``ddp_sgd`` has W&B, counts apart.

    Args:
        command: The command.
        environ: Its environment.
        log: File for what it prints.
        ranks: Ranks; several are started by the command.

    Attributes:
        start: Unix time at which it was started.
        end: Unix time at which it had ended.

    Raises:
        RuntimeError: The command fails, or takes too long.
    """

    def __init__(
        self, command: list[str], environ: dict[str, str], log: Path, *, ranks: int
    ) -> None:
        self._ranks = ranks
        self._depth_of_ranks = 1 if ranks > 1 else 0
        self._depth: dict[int, int] = {}
        self._spent: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
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
        return max(
            peak / 1e6
            for pid, peak in self._peak.items()
            if self._depth[pid] == self._depth_of_ranks
        )

    def _cpu_s(self, pid: int, start: float, end: float) -> float:
        times, spent = self._spent[pid]
        return _between(times, spent, end) - _between(times, spent, start) if times else 0.0

    def _look_on(self, process: subprocess.Popen[bytes]) -> None:
        for turn in range(int(_LIMIT_S / _PAUSE_S)):
            if process.poll() is not None:
                return
            if turn % _PAUSES_A_LOOK == 0:
                self._look_up(process.pid)
            for pid in self._depth:
                with suppress(OSError):  # it is gone
                    spent = time.clock_gettime(_cpu_clock(pid))
                    self._spent[pid][0].append(time.time())
                    self._spent[pid][1].append(spent)
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


def _cpu_clock(pid: int) -> int:
    """Number of the clock of a process's CPU time, as clock_getcpuclockid(3) makes it on Linux."""
    return (~pid << 3) | 2


def _between(times: list[float], values: list[float], at: float) -> float:
    """Read a straight line between two samples; the first or last value outside of them."""
    place = bisect.bisect(times, at)
    if place in (0, len(times)):
        return values[min(place, len(values) - 1)]
    before, after = times[place - 1], times[place]
    share = (at - before) / (after - before)
    return values[place - 1] + share * (values[place] - values[place - 1])
