"""The run, described: models, and the way from files, environment and command line to them."""

from ddp_sgd.config.command_line import CommandLine, dump_yaml, load_config, read_command_line
from ddp_sgd.config.options import Option
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import (
    Component,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    RuntimeConfig,
    ScheduleConfig,
    WandbConfig,
)

__all__ = [
    "CommandLine",
    "Component",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "OptimConfig",
    "Option",
    "ParallelConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "WandbConfig",
    "dump_yaml",
    "load_config",
    "read_command_line",
]
