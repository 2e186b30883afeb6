"""Command line options that are not keys of the configuration."""

from dataclasses import dataclass
from typing import Any

from ddp_sgd.config.yaml_text import read_value
from ddp_sgd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command, given as ``--name=value`` or ``--name value``.

    Args:
        name: Name without dashes.
        kind: ``int``, ``float``, ``str``, or ``bool`` for a flag that stands alone.
        help: What it does, for ``--help``.
        default: Value where it is not given.
    """

    name: str
    kind: type
    help: str
    default: Any = None

    @property
    def choices(self) -> str:
        """What the option takes, in words."""
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        return words[self.kind]

    @property
    def example(self) -> str:
        """A value to show, as text."""
        if self is CONFIG:
            return "configs/digits.yaml"
        by_kind = {bool: "true", int: "1", float: "1.0", str: "TEXT"}[self.kind]
        return by_kind if self.default is None or self.kind is bool else str(self.default)

    def read(self, text: str) -> Any:
        """Value of the option.

        Raises:
            ConfigError: The text is not of the option's kind.
        """
        if self.kind is str:
            return text
        value = read_value(text, f"--{self.name}")
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        is_good = {
            bool: isinstance(value, bool),
            int: is_whole,
            float: is_whole or isinstance(value, float),
        }[self.kind]
        if not is_good:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise ConfigError(
                f"--{self.name} is {shown!r}; choose {self.choices}, such as {self.example}."
            )
        return self.kind(value)


CONFIG = Option("config", str, "YAML file; give it again for another file on top of it.")
HELP = Option("help", bool, "Print this text and exit.", default=False)
PRINT_CONFIG = Option(
    "print_config", bool, "Print the resolved configuration as YAML and exit.", default=False
)
DEBUG = Option("debug", bool, "Print the traceback of an error as well.", default=False)
OWN_OPTIONS = (CONFIG, HELP, PRINT_CONFIG, DEBUG)
