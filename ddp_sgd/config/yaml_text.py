"""YAML reader and writer: core schema of YAML 1.2, no tags, no duplicate keys, limited size."""

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ddp_sgd.config.yaml_events import DocumentBuilder, is_null, plain_scalar
from ddp_sgd.errors import ConfigError

MAX_BYTES = 2**20

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"  # YAML 1.2, section 5.1
)


def read_yaml(text: str, where: str) -> Any:
    """Read one YAML document into plain data: mappings with text keys, lists, and scalars.

    Only ``true`` and ``false`` are booleans, and only what looks like a number is one: ``on``,
    ``1:30`` and dates are text, ``010`` is ten, ``1e-3`` a thousandth.

    Args:
        text: The document, at most 1 MiB.
        where: What the text came from, for messages: a file, a variable, or a flag.

    Returns:
        The data; None if the document is empty.

    Raises:
        ConfigError: The text is not YAML, or uses what a configuration does not need: tags,
            duplicate keys, keys that are not text, several documents, nesting below 64 levels, more
            than 100,000 nodes.
    """
    text = text.removeprefix("\ufeff")
    _check_characters(text, where)
    try:
        return DocumentBuilder(where).build(yaml.parse(text, Loader=_PARSER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # Unclosed brackets are noticed past the end of the text.
        line = min(mark.line, text.count("\n")) + 1 if mark else 1
        raise ConfigError(
            f"{where} line {line} is not YAML ({error.problem or error.context}); check its "
            "brackets, quotes, colons and indentation."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML ({error}); save it as UTF-8 text.") from None


def read_value(text: str, where: str) -> Any:
    """Read the YAML of one value, as flags and variables have it, without cutting it.

    Text that YAML would shorten is taken as it is: comments belong into files, so that the ``#`` of
    ``/x/run #3`` is a part of the path.

    Args:
        text: The value, at most 1 MiB.
        where: The flag or variable, for messages.

    Raises:
        ConfigError: See ``read_yaml``.
    """
    text = text.removeprefix("\ufeff")
    value = read_yaml(text, where)
    return text if _is_shortened(text, value) else value


def read_words(text: str, where: str, *, may_be_null: bool) -> str | None:
    """Read a value that is text: its words as they are, but for quotes around the whole.

    Args:
        text: The value, at most 1 MiB; in quotes it is read as YAML reads a quoted scalar.
        where: The flag or variable, for messages.
        may_be_null: Whether what YAML has for null is None: ``null``, ``~``, and nothing at all.

    Raises:
        ConfigError: The text is too long, or holds a character that YAML has no place for.
    """
    _check_characters(text, where)
    if may_be_null and is_null(text):
        return None
    quoted = _unquoted(text)
    return text if quoted is None else quoted


def read_yaml_file(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one mapping; an empty file is an empty mapping.

    Args:
        path: The file, or a pipe; its name stands in messages as it is given here.

    Raises:
        ConfigError: The file is missing, unreadable, not UTF-8, not YAML, or holds something else
            than a mapping.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; {_remedy_for_missing(Path(path))}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a YAML file in it.") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line} is not UTF-8; save the file as UTF-8.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}); name a readable file.") from None
    data = read_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} line 1 is a {'list' if isinstance(data, list) else 'single value'}, not a "
            "mapping; write lines of the form `key: value`."
        )
    return data


def write_yaml(data: Any, *, on_one_line: bool = False) -> str:
    """Write plain data as YAML that ``read_yaml`` reads back as it was.

    Args:
        data: Mappings, lists and scalars.
        on_one_line: Write mappings in braces, as for a command line, instead of one key a line.

    Raises:
        ConfigError: The data holds an object that YAML has no word for.
    """
    try:
        return yaml.dump(
            data,
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=math.inf,
            default_flow_style=on_one_line,
        )
    except yaml.representer.RepresenterError as error:
        kind = type(error.args[-1]).__name__
        raise ConfigError(
            f"the configuration holds an object of type {kind}; use text, numbers, lists and "
            "mappings only."
        ) from None


def _check_characters(text: str, where: str) -> None:
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where} is larger than 1 MiB; keep data out of the configuration.")
    if forbidden := _FORBIDDEN.search(text):
        line = text.count("\n", 0, forbidden.start()) + 1
        raise ConfigError(
            f"{where} line {line} holds the character {forbidden.group()!a}; remove it, "
            "or save the text as UTF-8."
        )


def _is_shortened(text: str, value: Any) -> bool:
    """Whether YAML took a part of a value for a comment, an anchor or the mark of a document."""
    words = text.strip()
    tokens = _tokens(text)
    end = tokens[-1].end_mark.index if tokens else 0
    if "\n" not in words and text[end:].strip():
        return True
    scalars = [token for token in tokens if isinstance(token, yaml.ScalarToken)]
    if isinstance(value, dict | list) or len(scalars) != 1:
        return False
    return bool(scalars[0].plain and scalars[0].value != words)


def _unquoted(text: str) -> str | None:
    """Text of a quoted scalar; None if the quotes are not around the whole."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        tokens = _tokens(text)
    except yaml.YAMLError:
        return None
    is_whole = len(tokens) == 1 and isinstance(tokens[0], yaml.ScalarToken)
    return tokens[0].value if is_whole else None


def _tokens(text: str) -> list[Any]:
    """Tokens that have characters: not the ends of a stream or a block."""
    return [
        token
        for token in yaml.scan(text, Loader=_PARSER)
        if token.end_mark.index > token.start_mark.index
    ]


def _remedy_for_missing(path: Path) -> str:
    """Name a neighbour with a similar name, if there is one."""
    try:
        neighbours = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    except OSError:
        return "name a YAML file that does."
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"did you mean {path.with_name(near[0])}?" if near else "name a YAML file that does."


class _Dumper(yaml.SafeDumper):
    """Writes what ``read_yaml`` reads: text in quotes where it would read as something else."""

    def ignore_aliases(self, _data: Any) -> bool:
        """Write equal objects twice: people read this."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        is_plain = text.isprintable() and isinstance(plain_scalar(text), str)
    except ValueError:
        is_plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


def _represent_list(dumper: yaml.SafeDumper, items: Iterable[Any]) -> yaml.SequenceNode:
    values = list(items)
    is_short = not any(isinstance(value, dict | list | tuple) for value in values)
    on_one_line = is_short or bool(dumper.default_flow_style)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=on_one_line)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)
