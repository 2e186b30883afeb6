"""Scaling model: the time of a step on any number of ranks, by a ring all-reduce. No torch."""

from dataclasses import dataclass

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
