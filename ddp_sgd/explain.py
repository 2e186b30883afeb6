"""The command that prints the plan of a run for any number of ranks, without starting one."""

import sys
from collections.abc import Sequence

from ddp_sgd.building import build
from ddp_sgd.command import run_command
from ddp_sgd.config import CommandLine, Component, Option
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.optim.schedule import build_schedule
from ddp_sgd.plan import make_plan
from ddp_sgd.report.curve import curve
from ddp_sgd.report.plan_table import plan_table

OPTIONS = (
    Option("world_size", int, "Ranks to plan for, at least 1.", 1),
    Option(
        "samples",
        int,
        "Training samples, at least 1; left out, the length of data.train, which is built for it.",
        None,
    ),
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
        options=OPTIONS,
    )


def explain(command_line: CommandLine) -> int:
    """Print the plan that a command line describes.

    Args:
        command_line: The configuration, and the options ``world_size`` and ``samples``.

    Returns:
        The exit code.

    Raises:
        ConfigError: An option is below 1, or the configuration does not fit the data.
        DataError: The training data cannot be read, or has no length.
    """
    config = command_line.config
    world_size, samples = command_line.options["world_size"], command_line.options["samples"]
    for name, value in (("world_size", world_size), ("samples", samples)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; choose a number that is at least 1.")
    if samples is None:
        samples = _length(config.data.train)
    plan = make_plan(config, samples=samples, world_size=world_size)
    schedule = build_schedule(config.schedule, plan)
    print(f"{plan_table(plan, schedule)}\n\n{curve(plan, schedule)}")  # noqa: T201
    return 0


def _length(train: Component) -> int:
    data_set = build(train, "data.train", failure=DataError)
    try:
        return len(data_set)
    except TypeError as error:
        raise DataError(
            f"data.train is {train.class_path}, which has no length; name a map-style data set, "
            "or give --samples."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
