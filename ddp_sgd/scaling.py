"""Scaling model and table: step time on any number of ranks, by a ring all-reduce. No torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ddp_sgd.plan import Plan
from ddp_sgd.text import columns

_BACKWARD_SHARE = 2 / 3
"""Part of the compute that the backward pass takes: two products of matrices against one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Links between ranks that stand in a ring, those of one host next to each other.

    Args:
        bandwidth_gbit: Of the link that leaves a host, one way, in Gbit/s, above 0.
        latency_us: From the send of a message of a few bytes to its use, in microseconds, at least
            0.
        ranks_per_host: Ranks on each host, at least 1.
        local_bandwidth_gbit: Between two ranks of one host, one way, in Gbit/s, above 0; None: that
            of the link that leaves a host.
    """

    bandwidth_gbit: float
    latency_us: float
    ranks_per_host: int = 1
    local_bandwidth_gbit: float | None = None

    def all_reduce_s(self, num_bytes: int, world_size: int) -> float:
        """Time of a ring all-reduce of n bytes over W ranks, in seconds.

        ``2 (W - 1) (latency + n / (W bandwidth))``: each rank passes a W-th of the message to the
        next W - 1 times until the sums are complete, and as often until everybody has them. All
        wait for the slowest link of the ring; a ring over hosts leaves each host once, so that its
        ranks do not share the link.

        Args:
            num_bytes: Size of the message, n.
            world_size: Ranks, W, at least 1.

        Source:
            Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of
            workstations, section 3.
        """
        gbit = self.bandwidth_gbit
        if world_size <= self.ranks_per_host and self.local_bandwidth_gbit is not None:
            gbit = self.local_bandwidth_gbit
        piece_s = num_bytes / world_size / (gbit * 1e9 / 8)
        return 2 * (world_size - 1) * (self.latency_us / 1e6 + piece_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one rank does in a step.

    Args:
        compute_s: Time of the step of a rank that is alone, all micro-batches, in seconds, above 0.
        micro_batches: Passes that the compute is made of, at least 1; only the last one's backward
            pass runs while gradients are reduced.
        gradient_bytes: Size of all gradients, at least 1.
        bucket_bytes: Size of the pieces in which they are reduced, at least 1.
    """

    compute_s: float
    micro_batches: int
    gradient_bytes: int
    bucket_bytes: int

    @property
    def buckets(self) -> int:
        """Pieces in which the gradients are reduced."""
        return -(-self.gradient_bytes // self.bucket_bytes)

    @property
    def overlap_s(self) -> float:
        """Time during which gradients are reduced as they come, in seconds; 0 in one bucket."""
        if self.buckets == 1:
            return 0.0
        return self.compute_s * _BACKWARD_SHARE / self.micro_batches


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step of W ranks.

    Args:
        compute_s: Time that a rank computes, in seconds.
        waiting_s: Time that it waits for gradients after its backward pass, in seconds.
    """

    compute_s: float
    waiting_s: float

    @property
    def step_s(self) -> float:
        """Time of the step, in seconds."""
        return self.compute_s + self.waiting_s

    @property
    def efficiency(self) -> float:
        """Step of a rank that is alone / step of W ranks, in (0, 1]."""
        return self.compute_s / self.step_s


def predict_step(workload: Workload, network: Network, world_size: int) -> StepTime:
    """Work out a step of W equal ranks.

    Gradients come evenly over the last backward pass. A bucket is reduced as soon as its gradients
    are there and the bucket before is done; the step is over when the last one is. Nothing else
    costs time: no rank is slower than another, and reducing takes no compute away.

    Args:
        workload: What each rank does.
        network: What is between them.
        world_size: Ranks, W, at least 1.

    Source:
        Overlap by buckets: Li et al. 2020, PyTorch Distributed, arXiv:2006.15704, section 3.2.
    """
    if world_size == 1:
        return StepTime(workload.compute_s, 0.0)
    full, rest = divmod(workload.gradient_bytes, workload.bucket_bytes)
    bucket_s = network.all_reduce_s(workload.bucket_bytes, world_size)
    begin_s = workload.compute_s - workload.overlap_s
    ready_every_s = workload.overlap_s * workload.bucket_bytes / workload.gradient_bytes
    # Equal buckets wait either for the first of them alone, or each for its own gradients.
    done_s = begin_s
    if full:
        slower_s = max(bucket_s, ready_every_s)
        done_s += ready_every_s + (full - 1) * slower_s + bucket_s
    if rest:
        done_s = max(done_s, workload.compute_s) + network.all_reduce_s(rest, world_size)
    return StepTime(workload.compute_s, max(0.0, done_s - workload.compute_s))


_HEAD = ("ranks", "step", "waiting", "efficiency", "samples/s", "an epoch", "the run")
_MIB = 2**20
_UNITS = (("h", 3600, 6000), ("min", 60, 100), ("s", 1, 1), ("ms", 1e-3, 0))
"""Name, length in seconds, and from how many seconds on a time is written in it."""


def scaling_table(
    plan_for: Callable[[int], Plan], world_size: int, workload: Workload, network: Network
) -> str:
    """Show step, epoch and run for 1, 2, 4, ... ranks and for those that are requested.

    A shorter step at the end of an epoch counts as a full one. Evaluation and saves are left out.

    Args:
        plan_for: Gives the plan for a number of ranks.
        world_size: Ranks of the last row, at least 1.
        workload: What each rank does in a step.
        network: What is between the ranks.

    Returns:
        Text of several lines, without a newline at the end.
    """
    rows = [_HEAD]
    for ranks in _doubling(world_size):
        plan, step = plan_for(ranks), predict_step(workload, network, ranks)
        epoch_s = plan.steps_per_epoch * step.step_s
        rows.append(
            (
                f"{ranks:,}",
                _time(step.step_s),
                _time(step.waiting_s),
                f"{100 * step.efficiency:.1f} %",
                f"{plan.samples_per_epoch / epoch_s:,.0f}",
                _time(epoch_s),
                _time(plan.total_steps * step.step_s),
            )
        )
    lines = ["Scaling on paper", *_assumptions(workload, network), "", *columns(rows, left=())]
    return "\n".join([lines[0], *(f"  {line}".rstrip() for line in lines[1:])])


def _assumptions(workload: Workload, network: Network) -> Iterator[str]:
    micro_batches = workload.micro_batches
    yield f"compute    {_time(workload.compute_s)} per step of one rank alone" + (
        f", in {micro_batches:,} micro-batches" if micro_batches > 1 else ""
    )
    size = f"{workload.gradient_bytes / _MIB:.4g} MiB"
    if workload.buckets == 1:
        yield f"gradients  {size} in one bucket, reduced after the backward pass"
    else:
        yield (
            f"gradients  {size} in {workload.buckets:,} buckets, reduced during "
            f"{_time(workload.overlap_s)} of backward pass"
        )
    local = network.local_bandwidth_gbit
    yield f"ring       {network.bandwidth_gbit:g} Gbit/s, {network.latency_us:g} us per message" + (
        f"; up to {network.ranks_per_host:,} ranks on one host: {local:g} Gbit/s" if local else ""
    )


def _doubling(world_size: int) -> list[int]:
    """Powers of two below a number, and the number."""
    return [2**power for power in range((world_size - 1).bit_length())] + [world_size]


def _time(seconds: float) -> str:
    """Write a time with three digits."""
    value, unit = next(
        (seconds / length, unit) for unit, length, least in _UNITS if seconds >= least
    )
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"
