"""The result: the headline table, then all figures of each workload."""

from collections.abc import Callable, Iterator
from statistics import median

from benchmarks import harness
from benchmarks.peers.lineup import CONTESTANTS, FLAT, OURS, RARELY, TUTORIAL
from benchmarks.peers.measuring import Record
from benchmarks.peers.task import WORKLOADS

OTHER_WORK = "Other work"
"""Marks what was not the same work."""
SAME_STEPS = 0.01
"""How far the loss may lie from ours, as a factor, after the same steps: their sums are rounded
differently, and training lets such differences grow.
"""


def tolerance(record: Record) -> float | None:
    """How far a final loss may lie from ours; None: anywhere."""
    who = CONTESTANTS[record.contestant]
    if who.is_bare:
        return None
    return SAME_STEPS * record.loss if who.takes_our_steps else WORKLOADS[record.workload].tolerance


def differences(records: list[Record]) -> list[str]:
    """List the runs that did other work than ``ddp_sgd`` did in the same round."""
    ours = {
        (each.workload, each.ranks, each.round): each for each in records if each.contestant == OURS
    }
    found = []
    for each in records:
        own = ours.get((each.workload, each.ranks, each.round))
        if own is None:
            continue
        where = f"{each.contestant}, {each.workload}, {each.ranks} ranks, round {each.round}"
        if each.steps != own.steps:
            found.append(f"{where}: {each.steps} steps, not {own.steps}")
        allowed = tolerance(each)
        if allowed is not None and abs(each.loss - own.loss) > allowed:
            found.append(f"{where}: loss {each.loss:.5f}, not {own.loss:.5f} +- {allowed:.2g}")
    return found


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

    def values(self, name: str, figure: str) -> list[float]:
        """Return a figure of a contestant in each round."""
        return [getattr(record, figure) for record in self.rounds(name)]

    @property
    def where(self) -> str:
        """Workload and ranks, for people."""
        title = WORKLOADS[self.workload].title.split()[0]
        return f"{title}, {self.ranks} rank{'s' * (self.ranks > 1)}"

    def ratios(self, name: str, other: str | None, figure: str) -> list[float]:
        """Return a figure of a contestant, divided by that of another in the same round."""
        own, others = self._records.get(name, {}), self._records.get(other or "", {})
        pairs = [(own[number], others[number]) for number in own if number in others]
        return [getattr(one, figure) / getattr(two, figure) for one, two in pairs]

    def best_framework(self, figure: str, *, of: Callable[..., str] = max) -> str | None:
        """Return the framework with the best median; None if none was measured.

        Args:
            figure: What is compared: an attribute of ``Record``.
            of: ``max`` or ``min``.
        """
        names = [name for name in self.contestants if CONTESTANTS[name].is_framework]
        return of(names, key=lambda name: median(self.values(name, figure))) if names else None


def report(records: list[Record]) -> Iterator[str]:
    """Write all tables."""
    summaries = _summaries(records)
    yield headline(summaries)
    for summary in summaries:
        yield from _details(summary)
    other_work = differences(records)
    yield from (f"**{OTHER_WORK}: {line}.**" for line in other_work)
    if not other_work:
        yield (
            "Every contestant took the same number of steps in every round, and ended at the loss "
            "of `ddp_sgd` within what is allowed."
        )


def _summaries(records: list[Record]) -> list[Summary]:
    summaries = [Summary(records, workload, ranks) for workload in WORKLOADS for ranks in (1, 2)]
    return [summary for summary in summaries if summary.contestants]


def headline(summaries: list[Summary]) -> str:
    """Write the headline table: speed, the first step and memory, each beside the others."""
    rare, speed = CONTESTANTS[RARELY].title, "steps_per_s"
    pairs = [("speed", OURS, name) for name, who in CONTESTANTS.items() if not who.is_ours]
    pairs += [("speed", OURS, None), (rare, RARELY, None), (rare, RARELY, FLAT)]
    rows: list[list[object]] = [
        [f"{CONTESTANTS[name].title}, steps / s", *(case.values(name, speed) for case in summaries)]
        for name in (OURS, RARELY)
    ]
    for text, name, other in pairs:
        whom = CONTESTANTS[other].title if other else "the fastest framework"
        others = [other or case.best_framework(speed) for case in summaries]
        ratios = (case.ratios(name, o, speed) for case, o in zip(summaries, others, strict=True))
        rows.append([f"{text} / {whom}", *ratios])
    for text, figure in (("first step, s", "first_step_s"), ("MB per rank", "peak_mb")):
        for name in (OURS, None, TUTORIAL):
            who = CONTESTANTS[name].title if name else "the best framework"
            names = [name or case.best_framework(figure, of=min) or "" for case in summaries]
            values = (case.values(n, figure) for case, n in zip(summaries, names, strict=True))
            rows.append([f"{text}: {who}", *values])
    return harness.markdown_table(" | ".join(("", *(case.where for case in summaries))), rows)


def _details(summary: Summary) -> Iterator[str]:
    """Yield the heading and the table of a workload on a number of ranks."""
    title = WORKLOADS[summary.workload].title
    yield f"## {title}; {summary.ranks} rank{'s' * (summary.ranks > 1)}"
    headings = "contestant | steps / s | of the tutorials' loop | of the fastest framework"
    headings += " | of the flat loop | CPU of a rank, us / step | of its helpers | first step, s"
    headings += " | whole, s | MB per rank | steps | loss (may differ by) | n"
    speed, others = "steps_per_s", (TUTORIAL, summary.best_framework("steps_per_s"), FLAT)
    figures = ("cpu_us", "other_cpu_us", "first_step_s", "whole_s", "peak_mb")
    rows = []
    for name in summary.contestants:
        last, allowed = summary.rounds(name)[-1], tolerance(summary.rounds(name)[-1])
        row = [CONTESTANTS[name].title, summary.values(name, speed)]
        row += [summary.ratios(name, other, speed) for other in others]
        row += [summary.values(name, figure) for figure in figures]
        row += [last.steps, f"{last.loss:.5f} ({'any' if allowed is None else f'{allowed:.2g}'})"]
        rows.append([*row, len(summary.rounds(name))])
    yield harness.markdown_table(headings, rows)
