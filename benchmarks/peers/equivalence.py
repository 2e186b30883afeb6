"""Whether all contestants did the same work: as many steps, to the same loss."""

from benchmarks.peers.lineup import CONTESTANTS, OURS
from benchmarks.peers.measuring import Record
from benchmarks.peers.workloads import WORKLOADS

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
