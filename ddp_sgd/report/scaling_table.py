"""Scaling table: step time, efficiency and length of a run for more and more ranks."""

from collections.abc import Callable, Iterator

from ddp_sgd.plan import Plan
from ddp_sgd.scaling import Network, Workload, predict_step
from ddp_sgd.text import columns

_HEAD = ("ranks", "step", "waiting", "efficiency", "samples/s", "an epoch", "the run")
_MIB = 2**20
_UNITS = (("h", 3600, 6000), ("min", 60, 100), ("s", 1, 1), ("ms", 1e-3, 0))
"""Name, length in seconds, and from how many seconds on a time is written in it."""


def scaling_table(
    plan_for: Callable[[int], Plan], world_size: int, workload: Workload, network: Network
) -> str:
    """Show step, epoch and run for 1, 2, 4, ... ranks and for those that are asked for.

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
    yield f"compute    {_time(workload.compute_s)} a step of one rank alone" + (
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
    yield f"ring       {network.bandwidth_gbit:g} Gbit/s, {network.latency_us:g} us a message" + (
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
