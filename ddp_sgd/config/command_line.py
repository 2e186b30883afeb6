"""Command line and environment parsed into a validated configuration, without slow imports."""

import argparse
import os
import shutil
import textwrap
from argparse import RawDescriptionHelpFormatter as HelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ValidationError

from ddp_sgd.config.faults import explain_faults, nearest, show
from ddp_sgd.config.keys import all_keys, keys_text
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import expand_home
from ddp_sgd.config.sources import Sources, gather, lay_over
from ddp_sgd.config.yaml_io import write_yaml
from ddp_sgd.console import Parser
from ddp_sgd.errors import ConfigError

_KEYS = "keys"
_EXAMPLES = (
    "--config=configs/digits.yaml --optim.lr=0.1",
    "--epochs=5 --data.batch_size=64 --optim.nesterov=true",
    "--model='{class_path: my_package.Net, init_args: {width: 32}}'",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """Parsed command line of a command.

    Args:
        config: The resolved configuration.
        options: Values of the command's own options by name, ``debug`` included; and
            ``print_config``, where the configuration depends on an argument.
        argument: The argument that stands alone; empty if the command takes none.
        given: What files, environment and flags have set, without the defaults.
        text: What the command prints before it exits with 0, instead of running; None to run.
    """

    config: RunConfig
    options: Mapping[str, Any]
    argument: str = ""
    given: Sources = field(default_factory=Sources)
    text: str | None = None

    def over(self, basis: Mapping[str, Any]) -> RunConfig:
        """Resolve the configuration again, over another one in the place of the defaults.

        Args:
            basis: Resolved configuration as plain data, such as that of a saved run.

        Raises:
            ConfigError: What was given does not fit.
        """
        return _checked(lay_over(Sources(dict(basis)), self.given), self.options)


def read_command_line(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    program: str,
    about: str,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    argument: str | None = None,
) -> CommandLine:
    """Read the arguments of a command and the configuration that they describe.

    Args:
        argv: Arguments without the name of the program.
        environ: Environment variables.
        program: How the command is started, such as ``python -m ddp_sgd.train``.
        about: What the command does, for ``--help``.
        add_options: Adds the options of this command to its parser, besides those of every command.
        argument: Name of the one argument that stands alone, such as ``CHECKPOINT``; the
            configuration then depends on it, and is not printed here. None: there is none.

    Raises:
        ConfigError: An argument, a variable, a file or the configuration as a whole is at fault.
    """
    width = max(60, min(100, shutil.get_terminal_size().columns))
    parser = _build_parser(program, about, argument, width)
    if add_options:
        add_options(parser)
    if "--help" in argv or "-h" in argv:
        parser.epilog = keys_text(width=width)
        return CommandLine(config=RunConfig(), options={}, text=parser.format_help())
    options, overrides = _parse(parser, argv)
    names = tuple(options)
    sources = gather(options.pop("config"), environ, overrides)
    alone = options.pop(argument) if argument else ""
    config = _checked(sources, names)
    prints_config = not argument and options.pop("print_config")
    return CommandLine(
        config=config,
        options=options,
        argument=alone,
        given=Sources(_given(sources.values, sources.origins), sources.origins),
        text=dump_yaml(config) if prints_config else None,
    )


def load_config(argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> RunConfig:
    """Resolve a configuration in Python, as a command would.

    Args:
        argv: Arguments such as ``["--config=configs/digits.yaml", "--epochs=3"]``.
        environ: Environment variables; None takes those of the process.

    Raises:
        ConfigError: An argument, a variable, a file or the configuration as a whole is at fault.

    Example:
        >>> load_config(["--optim.lr=0.1"], environ={}).optim.lr
        0.1
    """
    environ = os.environ if environ is None else environ
    line = read_command_line(argv, environ, program="load_config", about="")
    if line.text is not None:
        raise ConfigError("--help and --print_config print a text; give them to a command instead.")
    return line.config


def dump_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML; saved and given as ``--config``, it resolves to the same.

    Raises:
        ConfigError: An init_args holds something else than plain data.
    """
    return write_yaml(config.model_dump(mode="python"))


def _checked(sources: Sources, options: Iterable[str]) -> RunConfig:
    try:
        return RunConfig.model_validate(sources.values)
    except ValidationError as error:
        raise explain_faults(error, sources.values, sources.origins, options) from None


def _build_parser(program: str, about: str, argument: str | None, width: int) -> Parser:
    usage = f"{program} {argument}" if argument else program
    examples = "\n".join(f"  {usage} {example}" for example in _EXAMPLES)
    parser = Parser(
        prog=program,
        usage=f"{usage} [--config FILE]... [--key=value]...",
        description=f"{textwrap.fill(about, width)}\n\nexamples:\n{examples}",
        formatter_class=partial(HelpFormatter, max_help_position=6, width=width),
        allow_abbrev=False,
        exit_on_error=False,
    )
    if argument:
        parser.add_argument(argument, help=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        action="append",
        type=_path_of_file,
        default=[],
        metavar="FILE",
        help="YAML file; give it again for another file on top of it",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print the resolved configuration as YAML and exit",
    )
    parser.add_argument(
        "--debug", action="store_true", help="print the traceback of an error as well"
    )
    return parser


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Values of the options by name, and the keys that are given with their text, in order."""
    options = vars(parser.parse_known_args([""])[0])  # each has a default
    words = [word for word in argv if word.startswith("--") and word != "--"]
    keys = {word[2:].partition("=")[0] for word in words} - options.keys() - {"help"}
    for key in keys:
        # Any name may be a key, below init_args of a component; what is none is found later.
        parser.add_argument(f"--{key}", dest=_KEYS, action="append", type=partial(_pair, key))
    try:
        found, strays = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = str(error.argument_name).removeprefix("--")
        if name in keys:
            raise _without_value(name, options) from None
        parser.error(str(error))
    if strays:
        raise _stray(strays[0])
    given = vars(found)
    return given, given.pop(_KEYS, [])


def _path_of_file(path: str) -> str:
    if not path:
        raise ConfigError("--config is empty; write --config=configs/digits.yaml.")
    try:
        return expand_home(path)
    except ValueError as error:
        raise ConfigError(f"--config is {show(path)}; {error}.") from error


def _pair(key: str, text: str) -> tuple[str, str]:
    return key, text


def _stray(argument: str) -> ConfigError:
    name = argument.lstrip("-")
    if name.endswith((".yaml", ".yml")):
        remedy = f"write --config={name}"
    elif "=" in name:
        remedy = f"write --{name}"
    else:
        remedy = "write --key=value, or --help to see the keys"
    return ConfigError(f"argument {show(argument)} stands alone; {remedy}.")


def _without_value(name: str, options: Iterable[str]) -> ConfigError:
    if key := all_keys().get(name):
        return ConfigError(f"--{name} has no value; write --{key.setting}.")
    near = nearest(name, options)
    remedy = f"did you mean --{near.removeprefix('--')}?" if near else "see --help."
    return ConfigError(f"unknown option --{name}; {remedy}")


def _given(values: Mapping[str, Any], origins: Mapping[str, str], path: str = "") -> dict[str, Any]:
    """Keep what a source has set: a default has no origin."""
    kept = {}
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        if here in origins:
            kept[key] = value
        elif isinstance(value, Mapping) and (below := _given(value, origins, here)):
            kept[key] = below
    return kept
