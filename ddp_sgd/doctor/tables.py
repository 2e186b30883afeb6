"""Tables of facts and timings."""

from collections.abc import Mapping, Sequence

from ddp_sgd.doctor.facts import Answers, Clock, Facts
from ddp_sgd.doctor.links import PAIR_BYTES, SIZES, Link, Timing
from ddp_sgd.rank_differences import number_spans, tell_apart
from ddp_sgd.text import columns

_MOST_LINKS = 16
"""Pairs of hosts that are shown; of more, the slowest."""
_HEAD = (
    "ranks",
    "host",
    "device",
    "backend",
    "address",
    "python",
    "torch",
    "CPUs",
    "threads",
    "folder",
    "free disk",
    "clock",
)


def facts_table(answers: Answers) -> list[str]:
    """Show what ranks are; those of a host that are alike share a line.

    Args:
        answers: Of the ranks that came; rank 0 is among them.
    """
    facts, clocks, shares = answers
    by_row: dict[tuple[str, ...], list[int]] = {}
    for rank, each in sorted(facts.items()):
        row = (*_cells(each), _folder(rank, shares))
        by_row.setdefault(row, []).append(rank)
    rows = [
        (
            ",".join(number_spans(ranks)),
            *row,
            _room([facts[rank].free_bytes for rank in ranks]),
            _clock(ranks, clocks),
        )
        for row, ranks in by_row.items()
    ]
    others = {
        name: version
        for name, version in facts[0].versions.items()
        if name not in ("python", "torch")
    }
    return [
        *columns([_HEAD, *rows], left=range(len(_HEAD))),
        "",
        f"rank 0 has {', '.join(f'{name} {version}' for name, version in others.items())}",
        f"MASTER_ADDR is {_endpoints(facts)}",
        f"output_dir is {facts[0].folder}",
    ]


def timing_table(timings: Sequence[Timing], world_size: int) -> list[str]:
    """Show the all-reduces of all ranks; nothing if there are none."""
    if not timings:
        return []
    rows = [
        (
            _size(each.num_bytes),
            _milliseconds(each.seconds),
            _rate(each.bus_bandwidth(world_size)),
            str(each.rounds),
        )
        for each in timings
    ]
    head = (f"all-reduce of {world_size} ranks", "median time", "bus bandwidth", "rounds")
    left_out = [_size(size) for size in SIZES[len(timings) :]]
    note = [f"{', '.join(left_out)} would take too long here"] if left_out else []
    return ["", *columns([head, *rows], left=range(len(head))), *note]


def link_table(links: Sequence[Link], num_left_out: int) -> list[str]:
    """Show the pairs of hosts, or the slowest of many; nothing if there are none.

    Args:
        links: Pairs that were timed.
        num_left_out: Pairs for which there was no time.
    """
    shown = sorted(links, key=lambda link: -link.seconds)[:_MOST_LINKS]
    rows = [
        (
            " - ".join(link.hosts),
            _milliseconds(link.latency_s),
            _milliseconds(link.seconds),
            _rate(PAIR_BYTES / link.seconds),
        )
        for link in shown
    ]
    head = ("pair of hosts, slowest first", "4 B", _size(PAIR_BYTES), "bus bandwidth")
    table = ["", *columns([head, *rows], left=range(len(head)))] if rows else []
    if len(links) > len(shown):
        table.append(f"and {len(links) - len(shown)} faster pairs")
    if num_left_out:
        table.append(f"{num_left_out} pairs were left out, since the time for them was over")
    return table


def _cells(facts: Facts) -> tuple[str, ...]:
    interface = f" ({facts.interface})" if facts.interface else ""
    return (
        facts.host,
        facts.device,
        facts.backend,
        f"{facts.address or 'none'}{interface}",
        facts.versions.get("python", "?"),
        facts.versions.get("torch", "?"),
        str(facts.cpus),
        str(facts.threads),
    )


def _endpoints(facts: Mapping[int, Facts]) -> str:
    meanings = {
        rank: f"{each.master} ({each.master_addresses[0] if each.master_addresses else 'unknown'})"
        for rank, each in facts.items()
    }
    hosts = [facts[rank].host if rank in facts else "" for rank in range(max(facts) + 1)]
    return tell_apart(meanings, hosts) or meanings[0]


def _folder(rank: int, shares: Mapping[int, bool]) -> str:
    if rank == 0:
        return "rank 0's"
    return {True: "rank 0's", False: "its own", None: "?"}[shares.get(rank)]


def _room(free: Sequence[int | None]) -> str:
    """Show the least: ranks of a host look at a disk one after the other."""
    known = [each for each in free if each is not None]
    return f"{min(known) / 1e9:.1f} GB" if known else "?"


def _clock(ranks: Sequence[int], clocks: Mapping[int, Clock]) -> str:
    """Show the clock of a host by the rank whose answer came fastest."""
    if ranks[0] == 0:
        return "0"
    known = [clocks[rank] for rank in ranks if rank in clocks]
    if not known:
        return "?"
    best = min(known, key=lambda clock: clock.within_s)
    return f"{best.ahead_s * 1e3:+.2f} ms +- {best.within_s * 1e3:.2f}"


def _size(num_bytes: int) -> str:
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes // unit} {name}"
    return f"{num_bytes} B"


def _rate(bytes_per_s: float) -> str:
    for unit, name in ((1e9, "GB/s"), (1e6, "MB/s")):
        if bytes_per_s >= unit:
            return f"{bytes_per_s / unit:.3g} {name}"
    return f"{bytes_per_s / 1e3:.3g} kB/s"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
