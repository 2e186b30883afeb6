"""Time shares of a run: data, compute, waiting for other ranks, bookkeeping."""

from dataclasses import dataclass

from ddp_sgd.distributed.progress import ProgressTracker
from ddp_sgd.distributed.runtime import Runtime

_KINDS = ("data", "compute", "waiting", "bookkeeping")
_KIND_OF = {
    "reading data": "data",
    "synchronizing buffers": "waiting",
    "forward pass": "compute",
    "backward pass": "compute",
    "moving weights": "compute",
    "reducing gradients": "waiting",
    "averaging weights": "waiting",
    "sync": "bookkeeping",
    "saving": "bookkeeping",
}
"""Phases of training; evaluation is left out."""


def is_share(key: str) -> bool:
    """Whether a key of ``result.json`` comes from ``TimeShares.summary``."""
    return key.startswith("share/") or key == "slowest_rank"


@dataclass(frozen=True, slots=True)
class Spent:
    """Where time went, as a mean over ranks; all in seconds.

    Args:
        by_kind: Time by kind: ``data``, ``compute``, ``waiting`` and ``bookkeeping``.
        rendezvous_s: Time of each rank in the phase in which ranks wait for each other.
    """

    by_kind: dict[str, float]
    rendezvous_s: list[float]

    @property
    def elapsed_s(self) -> float:
        """All of it, above 0."""
        return max(sum(self.by_kind.values()), 1e-9)


class TimeShares:
    """Measures where the time goes, by durations of each rank: no two clocks are compared.

    Ranks leave the reduction of a step together. So who comes last waits least there, and has the
    shortest time in that phase: the slowest rank. Where the reduction is a phase of its own, that
    phase is waiting. Where it goes on during the backward pass, waiting is what a rank takes longer
    for that than the quickest one. On an accelerator these are times of the host, which waits for
    the device only at a sync.

    Args:
        progress: Measures phases.
        runtime: This process.
        meets_in: Phases in which ranks wait for each other.
    """

    def __init__(
        self, progress: ProgressTracker, runtime: Runtime, meets_in: tuple[str, ...]
    ) -> None:
        self._progress = progress
        self._runtime = runtime
        self._meets_in = meets_in
        self._before = progress.spent_s()
        self._total = Spent(dict.fromkeys(_KINDS, 0.0), [0.0] * runtime.world_size)

    def measure(self) -> list[float]:
        """Tell where this rank's time went since the last row, to be summed over ranks."""
        now = self._progress.spent_s()
        kinds = dict.fromkeys(_KINDS, 0.0)
        waiting = [0.0] * self._runtime.world_size
        for phase, kind in _KIND_OF.items():
            spent = now.get(phase, 0.0) - self._before.get(phase, 0.0)
            # Alone there is nobody to wait for: what a reduction does then is gather gradients.
            kinds["compute" if kind == "waiting" and self._runtime.alone else kind] += spent
            if phase in self._meets_in:
                waiting[self._runtime.rank] += spent
        return [*kinds.values(), *waiting]

    @staticmethod
    def own_elapsed_s(measured: list[float]) -> float:
        """All the time in what ``measure`` gave."""
        return sum(measured[: len(_KINDS)])

    def read(self, summed: list[float]) -> Spent:
        """Understand the sum over ranks of what ``measure`` gave."""
        kinds = {k: s / self._runtime.world_size for k, s in zip(_KINDS, summed, strict=False)}
        waiting = summed[len(_KINDS) :]
        if "backward pass" in self._meets_in:
            late = sum(waiting) / len(waiting) - min(waiting)
            kinds["waiting"] += late
            kinds["compute"] -= late
        return Spent(kinds, waiting)

    def close_row(self, spent: Spent) -> None:
        """Add what a row tells to the total of the run, and start the next row."""
        before = self._total
        self._total = Spent(
            {kind: before.by_kind[kind] + spent.by_kind[kind] for kind in _KINDS},
            [a + b for a, b in zip(before.rendezvous_s, spent.rendezvous_s, strict=True)],
        )
        self._before = self._progress.spent_s()

    def summary(self) -> dict[str, float | int]:
        """Sum up the run, this life of it.

        Returns:
            ``share/data``, ``share/compute``, ``share/waiting`` and ``share/bookkeeping`` of the
            time in training, each in [0, 1]. On several ranks also ``slowest_rank``, and
            ``share/lag``: the share of time that the others, on average, wait for it.
        """
        total = self._total
        row: dict[str, float | int] = {
            f"share/{kind}": seconds / total.elapsed_s for kind, seconds in total.by_kind.items()
        }
        others = self._runtime.world_size - 1
        if others:
            least = min(total.rendezvous_s)
            lag = (sum(total.rendezvous_s) - least) / others - least
            row |= {
                "slowest_rank": total.rendezvous_s.index(least),
                "share/lag": lag / total.elapsed_s,
            }
        return row
