"""From command line and environment to a checked configuration, without slow imports."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ddp_sgd.config.faults import explain_faults, nearest, show
from ddp_sgd.config.fields import all_keys
from ddp_sgd.config.options import OWN_OPTIONS, Option
from ddp_sgd.config.reference import help_text
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sources import Sources, gather
from ddp_sgd.config.yaml_text import write_yaml
from ddp_sgd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """What the user asked a command for.

    Args:
        config: The resolved configuration.
        options: Values of the command's own options by name, ``debug`` included.
        text: What the command prints before it exits with 0, instead of running; None to run.
    """

    config: RunConfig
    options: Mapping[str, Any]
    text: str | None = None


def read_command_line(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    program: str,
    about: str,
    options: Sequence[Option] = (),
) -> CommandLine:
    """Read the arguments of a command and the configuration that they describe.

    Args:
        argv: Arguments without the name of the program.
        environ: Environment variables.
        program: How the command is started, such as ``python -m ddp_sgd.train``.
        about: What the command does, for ``--help``.
        options: Options of this command, besides those of every command.

    Raises:
        ConfigError: An argument, a variable, a file or the configuration as a whole is at fault.
    """
    known = {option.name: option for option in (*OWN_OPTIONS, *options)}
    values = {option.name: option.default for option in known.values()}
    if "--help" in argv or "-h" in argv:
        width = max(60, min(100, shutil.get_terminal_size().columns))
        text = help_text(program, about, tuple(known.values()), width=width)
        return CommandLine(config=RunConfig(), options=_of_command(values), text=text)
    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    for name, value in _pairs(argv, known):
        if name == "config":
            files.append(value)
        elif name in known:
            values[name] = known[name].read(value)
        else:
            overrides.append((name, value))
    config = _checked(gather(files, environ, overrides), tuple(known))
    resolved = dump_yaml(config) if values["print_config"] else None
    return CommandLine(config=config, options=_of_command(values), text=resolved)


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


def _checked(sources: Sources, options: Sequence[str]) -> RunConfig:
    try:
        return RunConfig.model_validate(sources.values)
    except ValidationError as error:
        raise explain_faults(error, sources.values, sources.origins, options) from None


def _pairs(argv: Sequence[str], known: Mapping[str, Option]) -> Iterator[tuple[str, str]]:
    """Names without dashes and their values as text, from both ways of writing them."""
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise _stray(argument)
        name, equals, value = argument[2:].partition("=")
        if value or (equals and name != "config"):
            yield name, value
        elif name in known and known[name].kind is bool:
            yield name, "true"
        elif not equals and rest and not rest[0].startswith("--"):
            yield name, rest.pop(0)
        else:
            raise _without_value(name, known)


def _stray(argument: str) -> ConfigError:
    name = argument.lstrip("-")
    if name.endswith((".yaml", ".yml")):
        remedy = f"write --config={name}"
    elif "=" in name:
        remedy = f"write --{name}"
    else:
        remedy = "write --key=value, or --help to see the keys"
    return ConfigError(f"argument {show(argument)} stands alone; {remedy}.")


def _without_value(name: str, known: Mapping[str, Option]) -> ConfigError:
    if name in known:
        return ConfigError(f"--{name} has no value; write --{name}={known[name].example}.")
    key = all_keys().get(name)
    if key is None:
        near = nearest(name, known)
        remedy = f"did you mean --{near.removeprefix('--')}?" if near else "see --help."
        return ConfigError(f"unknown option --{name}; {remedy}")
    return ConfigError(f"--{name} has no value; write --{key.setting}.")


def _of_command(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is done with once the command line is read."""
    return {
        name: value
        for name, value in values.items()
        if name not in ("config", "help", "print_config")
    }
