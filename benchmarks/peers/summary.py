"""Figures of all rounds together: medians, and ratios that are taken round by round."""

from collections.abc import Callable
from statistics import median

from benchmarks.peers.lineup import CONTESTANTS
from benchmarks.peers.measuring import Record

Figure = Callable[[Record], float]


class Summary:
    """The records of a workload on a number of ranks.

    Args:
        records: All records, of other workloads too.
        workload: Key of the workload.
        ranks: Processes.
    """

    def __init__(self, records: list[Record], workload: str, ranks: int) -> None:
        self.workload = workload
        self.ranks = ranks
        self._records: dict[str, dict[int, Record]] = {}
        for record in records:
            if (record.workload, record.ranks) == (workload, ranks):
                self._records.setdefault(record.contestant, {})[record.round] = record

    @property
    def contestants(self) -> list[str]:
        """Who has been measured, in the order of the lineup."""
        return [name for name in CONTESTANTS if name in self._records]

    def rounds(self, name: str) -> list[Record]:
        """Return the records of a contestant."""
        return list(self._records.get(name, {}).values())

    def values(self, name: str, figure: Figure) -> list[float]:
        """Return a figure of a contestant in each round."""
        return [figure(record) for record in self.rounds(name)]

    def ratios(self, name: str, other: str | None, figure: Figure) -> list[float]:
        """Return a figure of a contestant, divided by that of another in the same round."""
        return self._paired(name, other, lambda a, b: figure(a) / figure(b))

    def differences(self, name: str, other: str | None, figure: Figure) -> list[float]:
        """Return a figure of a contestant, less that of another in the same round."""
        return self._paired(name, other, lambda a, b: figure(a) - figure(b))

    def best_framework(self, figure: Figure, *, of: Callable[..., str] = max) -> str | None:
        """Return the framework with the best median; None if none was measured.

        Args:
            figure: What is compared.
            of: ``max`` or ``min``.
        """
        names = [name for name in self.contestants if CONTESTANTS[name].is_framework]
        return of(names, key=lambda name: median(self.values(name, figure))) if names else None

    def _paired(
        self, name: str, other: str | None, compare: Callable[[Record, Record], float]
    ) -> list[float]:
        own, others = self._records.get(name, {}), self._records.get(other or "", {})
        return [compare(own[number], others[number]) for number in own if number in others]


def steps_per_s(record: Record) -> float:
    """Steps a second."""
    return record.steps_per_s


def cpu_us(record: Record) -> float:
    """CPU time of a rank for a step, in us."""
    return record.cpu_us


def first_step_s(record: Record) -> float:
    """Time to the first step, in seconds."""
    return record.first_step_s


def peak_mb(record: Record) -> float:
    """Most memory of a rank, in MB."""
    return record.peak_mb
