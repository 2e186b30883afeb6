"""Command: print the plan of a run for any number of ranks, without starting one."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from ddp_sgd.cli import run_command
from ddp_sgd.config import CommandLine, Component, RunConfig
from ddp_sgd.console import deliver
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.instantiate import instantiate
from ddp_sgd.optim.schedule import build_schedule
from ddp_sgd.plan import OrderFacts, Plan, make_plan
from ddp_sgd.report.curve import curve
from ddp_sgd.report.plan_table import plan_table, update_words
from ddp_sgd.scaling import Network, Workload, scaling_table

_RANGES = {
    "step_ms": (1e-6, 1e9, 100.0),
    "bandwidth_gbit": (1e-6, 1e6, 10.0),
    "latency_us": (0.0, 1e9, 10.0),
    "gradient_mb": (1e-5, 1e9, 100.0),
    "ranks_per_host": (1, 1_000_000, 8),
    "local_bandwidth_gbit": (1e-6, 1e6, 200.0),
}
"""The least, the most, and one to show."""
_NEEDS = {
    "step_ms": ("bandwidth_gbit", "latency_us"),
    "bandwidth_gbit": ("step_ms",),
    "latency_us": ("step_ms",),
    "gradient_mb": ("step_ms",),
    "ranks_per_host": ("step_ms", "local_bandwidth_gbit"),
    "local_bandwidth_gbit": ("step_ms", "ranks_per_host"),
}
"""Options that an option means nothing without."""
_MIB = 2**20


def _add_options(parser: ArgumentParser) -> None:
    add = partial(parser.add_argument, type=int, metavar="N")
    add("--world_size", default=1, help="ranks to plan for, at least 1 (default: 1)")
    add(
        "--samples",
        help="training samples, at least 1; left out, the length of data.train, which is built for "
        "it",
    )
    add("--ranks_per_host", help="ranks on one host; needs --local_bandwidth_gbit")
    add = partial(parser.add_argument, type=float, metavar="X")
    add(
        "--step_ms",
        help="time of a step of one rank alone, in ms, all micro-batches, such as time/step_ms in "
        "the journal of a run on one rank; predicts steps, epochs and efficiency for more ranks; "
        "needs --bandwidth_gbit and --latency_us",
    )
    add("--bandwidth_gbit", help="bandwidth of the link that leaves a host, one way, in Gbit/s")
    add("--latency_us", help="latency of one message between ranks, in microseconds")
    add(
        "--gradient_mb",
        help="size of all gradients, in MiB; left out, that of the model, which is built for it",
    )
    add(
        "--local_bandwidth_gbit",
        help="bandwidth between ranks of one host, one way, in Gbit/s; needs --ranks_per_host",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of a run as a table, with the curve of its rate.

    Args:
        argv: Arguments of the command; None reads those of the process.

    Returns:
        The exit code.
    """
    return run_command(
        explain,
        argv,
        program="python -m ddp_sgd.explain",
        about="Print the plan of a run for any number of ranks, without starting one.",
        add_options=_add_options,
    )


def explain(command_line: CommandLine) -> int:
    """Print the plan that a command line describes, and what it costs if a step is given.

    Args:
        command_line: The configuration, and the options of this command.

    Returns:
        The exit code.

    Raises:
        ConfigError: An option is out of range or lacks another one, or the configuration does not
            fit the data.
        DataError: The training data cannot be read, or has no length.
    """
    config, options = command_line.config, command_line.options
    world_size, samples = options["world_size"], options["samples"]
    _check(options)
    if samples is None:
        samples = _length(config.data.train)

    facts_of_order = _facts_of_order(config, samples)

    def plan_for(ranks: int) -> Plan:
        return make_plan(config, samples=samples, world_size=ranks, facts_of_order=facts_of_order)

    plan = plan_for(world_size)
    schedule = build_schedule(config.schedule, plan)
    table = plan_table(
        plan,
        schedule,
        config.schedule.milestones,
        compute=config.compute,
        data=config.data,
        update=update_words(config),
        evaluation=config.eval,
    )
    parts = [table, curve(plan, schedule)]
    if options["step_ms"] is not None:
        network = Network(
            bandwidth_gbit=options["bandwidth_gbit"],
            latency_us=options["latency_us"],
            ranks_per_host=options["ranks_per_host"] or 1,
            local_bandwidth_gbit=options["local_bandwidth_gbit"],
        )
        parts.append(scaling_table(plan_for, world_size, _workload(config, options), network))
    deliver("\n\n".join(parts) + "\n")
    return 0


def _facts_of_order(config: RunConfig, samples: int) -> Callable[[int], OrderFacts] | None:
    """Return what tells what a function of the user's reads, for a global batch."""
    if isinstance(config.data.order, str):
        return None
    from ddp_sgd.data.order import build_order
    from ddp_sgd.engine.reading import ready_order

    order = ready_order(config.data.order)
    return cache(lambda g: build_order(order, g, samples=samples, seed=config.seed).facts)


def _check(options: Mapping[str, Any]) -> None:
    for name in ("world_size", "samples"):
        if options[name] is not None and options[name] < 1:
            raise ConfigError(f"--{name} is {options[name]}; choose a number that is at least 1.")
    given = {name: options[name] for name in _RANGES if options[name] is not None}
    for name, value in given.items():
        least, most, example = _RANGES[name]
        if not least <= value <= most:
            raise ConfigError(
                f"--{name} is {value}; choose a number in [{least:g}, {most:g}], such as "
                f"{example:g}."
            )
    for name, value in given.items():
        for other in _NEEDS[name]:
            if other not in given:
                raise ConfigError(
                    f"--{name} is {value:g} without --{other}; add one, such as "
                    f"--{other}={_RANGES[other][2]:g}, or leave out --{name}."
                )


def _workload(config: RunConfig, options: Mapping[str, Any]) -> Workload:
    gradient_mb, parallel = options["gradient_mb"], config.parallel
    gradient_bytes = _gradient_bytes(config) if gradient_mb is None else round(gradient_mb * _MIB)
    in_one = parallel.replica == "flat"
    return Workload(
        compute_s=options["step_ms"] / 1e3,
        micro_batches=config.data.accumulate,
        gradient_bytes=gradient_bytes,
        bucket_bytes=gradient_bytes if in_one else max(1, int(parallel.bucket_mb * _MIB)),
    )


def _gradient_bytes(config: RunConfig) -> int:
    from ddp_sgd.engine.components import ready_model

    sizes = [
        p.nbytes for p in ready_model(config.model, config.seed).parameters() if p.requires_grad
    ]
    if not sizes:
        raise ConfigError(
            f"model is {config.model.class_path}, which has nothing to train; name another one, or "
            "give --gradient_mb."
        )
    return sum(sizes)


def _length(train: Component) -> int:
    data_set = instantiate(train, "data.train", failure=DataError)
    try:
        return len(data_set)
    except TypeError as error:
        raise DataError(
            f"data.train is {train.class_path}, which has no length; name a map-style data set, "
            "or give --samples."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
