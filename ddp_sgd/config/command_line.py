"""Command line and environment parsed into a validated configuration, without slow imports."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ddp_sgd.config.faults import explain_faults, nearest, show
from ddp_sgd.config.keys import OWN_OPTIONS, Option, all_keys
from ddp_sgd.config.reference import help_text
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import expand_home
from ddp_sgd.config.sources import Sources, gather, lay_over
from ddp_sgd.config.yaml_io import write_yaml
from ddp_sgd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """What the user asked a command for.

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
        return _checked(lay_over(Sources(dict(basis)), self.given), tuple(self.options))


def read_command_line(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    program: str,
    about: str,
    options: Sequence[Option] = (),
    argument: str | None = None,
) -> CommandLine:
    """Read the arguments of a command and the configuration that they describe.

    Args:
        argv: Arguments without the name of the program.
        environ: Environment variables.
        program: How the command is started, such as ``python -m ddp_sgd.train``.
        about: What the command does, for ``--help``.
        options: Options of this command, besides those of every command.
        argument: Name of the one argument that stands alone, such as ``CHECKPOINT``; the
            configuration then depends on it, and is not printed here. None: there is none.

    Raises:
        ConfigError: An argument, a variable, a file or the configuration as a whole is at fault.
    """
    known = {option.name: option for option in (*OWN_OPTIONS, *options)}
    done_with = ("config", "help") if argument else ("config", "help", "print_config")
    if "--help" in argv or "-h" in argv:
        width = max(60, min(100, shutil.get_terminal_size().columns))
        usage = f"{program} {argument}" if argument else program
        text = help_text(usage, about, tuple(known.values()), width=width)
        return CommandLine(config=RunConfig(), options={}, text=text)
    found = _sort(argv, known, may_stand_alone=argument is not None)
    if argument and not found.alone:
        raise ConfigError(
            f"{argument} is not given; write {program} {argument}, or --help to see more."
        )
    sources = gather(found.files, environ, found.overrides)
    config = _checked(sources, tuple(known))
    return CommandLine(
        config=config,
        options=found.options(*done_with),
        argument=found.alone,
        given=Sources(_given(sources.values, sources.origins), sources.origins),
        text=dump_yaml(config) if found.values["print_config"] and not argument else None,
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


def _checked(sources: Sources, options: Sequence[str]) -> RunConfig:
    try:
        return RunConfig.model_validate(sources.values)
    except ValidationError as error:
        raise explain_faults(error, sources.values, sources.origins, options) from None


class _Sorted:
    """The arguments of a command, each with its kind."""

    def __init__(self, known: Mapping[str, Option]) -> None:
        self.values = {option.name: option.default for option in known.values()}
        self.files: list[str] = []
        self.overrides: list[tuple[str, str]] = []
        self.alone = ""

    def options(self, *done_with: str) -> dict[str, Any]:
        """Leave out what is done with once the command line is read."""
        return {name: value for name, value in self.values.items() if name not in done_with}


def _sort(argv: Sequence[str], known: Mapping[str, Option], *, may_stand_alone: bool) -> _Sorted:
    found = _Sorted(known)
    for name, value in _pairs(argv, known):
        if name is None:
            if not may_stand_alone or found.alone or value.startswith("-"):
                raise _stray(value)
            found.alone = value
        elif name == "config":
            found.files.append(_path_of_file(value))
        elif name in known:
            found.values[name] = known[name].read(value)
        else:
            found.overrides.append((name, value))
    return found


def _path_of_file(path: str) -> str:
    try:
        return expand_home(path)
    except ValueError as error:
        raise ConfigError(f"--config is {show(path)}; {error}.") from error


def _pairs(argv: Sequence[str], known: Mapping[str, Option]) -> Iterator[tuple[str | None, str]]:
    """Names without dashes and their values as text, from both ways of writing them.

    The name of an argument that stands alone is None.
    """
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            yield None, argument
            continue
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
