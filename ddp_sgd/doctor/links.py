"""Network links: timed all-reduces of all ranks and between pairs of hosts, and their tables."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.doctor.facts import Answers, Clock, Facts
from ddp_sgd.rank_differences import name_values, number_spans
from ddp_sgd.text import columns

SIZES = (4, 4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20)
"""Bytes of the messages that all ranks reduce."""
PAIR_BYTES = 2**20
"""Bytes by which hosts are compared: enough for the bandwidth, few enough for a slow link."""
_ALL_RANKS_S = 8.0
_PAIRS_S = 10.0
"""Time that the all-reduces may take, in seconds; one that is under way is waited for."""
_SLOW_S = 0.05
"""Time of a message from which the next size is guessed, in seconds."""
_MOST_ROUNDS = 25
_EVERY_PAIR = 6
"""Hosts up to which each is paired with each."""


class Timing(NamedTuple):
    """An all-reduce of all ranks.

    Args:
        num_bytes: Size of the message.
        seconds: Median time.
        rounds: How often it was timed.
    """

    num_bytes: int
    seconds: float
    rounds: int

    def bus_bandwidth(self, world_size: int) -> float:
        """Return what each link carried, 2 (W - 1) / W of the message, in bytes per second.

        Source:
            https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
        """
        return self.num_bytes * 2 * (world_size - 1) / world_size / self.seconds


class Link(NamedTuple):
    """All-reduces between one rank of each of two hosts.

    Args:
        hosts: Their names.
        latency_s: Median time of a message of 4 bytes.
        seconds: Median time of one of ``PAIR_BYTES``.
    """

    hosts: tuple[str, str]
    latency_s: float
    seconds: float


def time_all_ranks(runtime: Runtime, budget_s: float = _ALL_RANKS_S) -> list[Timing]:
    """Time all-reduces of all ranks; every rank calls this.

    Args:
        runtime: This process, in a group.
        budget_s: Time that it may take, in seconds; larger messages that would take longer are
            left out.

    Returns:
        Timings of rank 0's clock, by rising size.
    """
    timings: list[Timing] = []
    left_s, guess_s = budget_s, 0.0
    for position, num_bytes in enumerate(SIZES):
        if 3 * guess_s > left_s:
            break
        share_s = left_s / (len(SIZES) - position)
        timing, trial_s = _time_size(num_bytes, share_s, runtime.device)
        timings.append(timing)
        left_s -= (timing.rounds + 2) * trial_s
        if trial_s > _SLOW_S and timing is not timings[0]:  # else it is all latency
            guess_s = trial_s * SIZES[min(position + 1, len(SIZES) - 1)] / num_bytes
    return timings


def time_pairs(
    runtime: Runtime, hosts: Sequence[str], budget_s: float = _PAIRS_S
) -> tuple[list[Link], int]:
    """Time pairs of hosts, one after the other; every rank calls this.

    Args:
        runtime: This process, in a group.
        hosts: Name of the host of each rank, by rank.
        budget_s: Time after which no further pair is begun, in seconds.

    Returns:
        The links, equal on all ranks, and how many pairs were left out for want of time.
    """
    links: list[Link] = []
    pairs = choose_pairs(hosts)
    left_s = budget_s
    for first, second in pairs:
        if left_s <= 0:
            break
        latency_s, seconds, spent_s = _time_pair(runtime, [first, second], left_s / 4)
        links.append(Link((hosts[first], hosts[second]), latency_s, seconds))
        left_s -= spent_s
    return links, len(pairs) - len(links)


def choose_pairs(hosts: Sequence[str]) -> list[tuple[int, int]]:
    """Choose pairs of ranks that stand for pairs of hosts: the lowest rank of each.

    Up to six hosts, each with each; of more, each with the next, in a ring, and each with that of
    rank 0.

    Args:
        hosts: Name of the host of each rank, by rank.
    """
    first_rank: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        first_rank.setdefault(host, rank)
    ranks = list(first_rank.values())
    if len(ranks) <= _EVERY_PAIR:
        return [(a, b) for i, a in enumerate(ranks) for b in ranks[i + 1 :]]
    ring = {tuple(sorted(pair)) for pair in zip(ranks, [*ranks[1:], ranks[0]], strict=True)}
    star = {(ranks[0], other) for other in ranks[1:]}
    return sorted((a, b) for a, b in ring | star)


def _time_pair(runtime: Runtime, pair: list[int], share_s: float) -> tuple[float, float, float]:
    """Time one pair; all ranks call this, and get the same three times in seconds."""
    began = time.perf_counter()
    group: dist.ProcessGroup = dist.new_group(pair)  # type: ignore[assignment]
    found = [0.0, 0.0]
    if runtime.rank in pair:
        found = [
            _time_size(size, share_s, runtime.device, group)[0].seconds for size in (4, PAIR_BYTES)
        ]
        dist.destroy_process_group(group)
    if runtime.rank != pair[0]:
        found = [0.0, 0.0]
    spent_s = time.perf_counter() - began if runtime.rank == pair[0] else 0.0
    measured = torch.tensor([*found, spent_s], device=runtime.device)
    dist.all_reduce(measured)
    latency_s, seconds, spent_s = measured.tolist()
    return latency_s, seconds, spent_s


def _time_size(
    num_bytes: int,
    share_s: float,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> tuple[Timing, float]:
    """Time one size, as often as fits into a share of time; the ranks agree on how often.

    Returns:
        The timing by this rank's clock, and how long a trial took on the slowest rank.
    """
    message = torch.zeros(num_bytes // 4, device=device)
    _reduce(message, group)  # connections are made with the first
    trial = torch.tensor([_reduce(message, group)], device=device)
    dist.all_reduce(trial, op=dist.ReduceOp.MAX, group=group)
    trial_s = trial.item()
    rounds = max(1, min(_MOST_ROUNDS, int(share_s / max(trial_s, 1e-9)) - 2))
    seconds = median(_reduce(message, group) for _ in range(rounds))
    return Timing(num_bytes, seconds, rounds), trial_s


def _reduce(message: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    """Return how long one all-reduce takes, in seconds."""
    began = time.perf_counter()
    dist.all_reduce(message, group=group)
    if message.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


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
    """Show what ranks are; those of a host that are alike share a line."""
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
    """Show the pairs of hosts, or the slowest of many; nothing if there are none."""
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
    return name_values(meanings, hosts) or meanings[0]


def _folder(rank: int, shares: Mapping[int, bool]) -> str:
    if rank == 0:
        return "rank 0's"
    return {True: "rank 0's", False: "its own", None: "?"}[shares.get(rank)]


def _room(free: Sequence[int | None]) -> str:
    """Show the least: ranks of a host look at a disk one after the other."""
    known = [each for each in free if each is not None]
    return f"{min(known) / 1e9:.1f} GB" if known else "?"


def _clock(ranks: Sequence[int], clocks: Mapping[int, Clock]) -> str:
    """Show the clock of a host by the rank whose reply came fastest."""
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
