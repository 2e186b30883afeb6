"""Configuration: typed sections, and loading from files, environment and command line."""

from ddp_sgd.config.command_line import CommandLine, dump_yaml, load_config, read_command_line
from ddp_sgd.config.component import Component
from ddp_sgd.config.schema import ComputeConfig, ParallelConfig, RunConfig, RuntimeConfig
from ddp_sgd.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ScheduleConfig,
    WandbConfig,
)
from ddp_sgd.config.sources import changes_that_matter, leaves, rank_batch
from ddp_sgd.config.yaml_io import read_yaml_file

__all__ = [
    "CheckpointConfig",
    "CommandLine",
    "Component",
    "ComputeConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "WandbConfig",
    "changes_that_matter",
    "dump_yaml",
    "leaves",
    "load_config",
    "rank_batch",
    "read_command_line",
    "read_yaml_file",
]
