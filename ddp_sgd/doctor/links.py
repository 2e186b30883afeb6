"""Network links: timed all-reduces of all ranks and between pairs of hosts."""

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from ddp_sgd.distributed.runtime import Runtime

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
        """Return what each link carried, 2 (W - 1) / W of the message, in bytes a second.

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
    told = torch.tensor([*found, spent_s], device=runtime.device)
    dist.all_reduce(told)
    latency_s, seconds, spent_s = told.tolist()
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
