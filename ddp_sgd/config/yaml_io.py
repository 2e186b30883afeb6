"""YAML reader and writer: core schema of YAML 1.2, no tags, no duplicate keys, limited size."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ddp_sgd.errors import ConfigError

MAX_BYTES = 2**20
MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_DIGITS = 1_000  # Python refuses to show integers from 4,300 on

_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"  # YAML 1.2, section 5.1
)
_NULL = re.compile(r"~|null|Null|NULL|")
_CORE_SCHEMA: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (  # YAML 1.2, section 10.3
    (_NULL, lambda _: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text, base=8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text, base=16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda _: float("nan")),
)
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPEN = object()
"""What an anchor stands for until all of it has been read."""


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
        return _Loader(text, where).load()
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
    if may_be_null and _NULL.fullmatch(text.strip()):
        return None
    if _QUOTED.fullmatch(text):
        with suppress(ConfigError):  # such as an escape that YAML does not know
            return str(read_yaml(text, where))
    return text


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


class _Loader:
    """Loader of plain data that refuses what a configuration does not need; an alias is a copy.

    It reads the events of PyYAML's parser. ``yaml.SafeLoader`` itself does not fit: with libyaml it
    has no limit of depth, and without it refuses tabs that YAML allows.
    """

    def __init__(self, text: str, where: str) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=_PARSER)
        self._where = where
        self._nodes = 0
        self._anchors: dict[str, Any] = {}

    def load(self) -> Any:
        """Build the data of the document; None if there is none."""
        data = None
        starts = (event for event in self._events if isinstance(event, yaml.DocumentStartEvent))
        for number, start in enumerate(starts):
            if number > 0:
                what = "starts a second document"
                raise self._fault(start, what, "keep one document in one text")
            data = self._construct(next(self._events), 0)
        return data

    def _construct(self, event: Any, depth: int) -> Any:
        if tag := getattr(event, "tag", None):
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise self._fault(event, f"has the tag {shown}", "write plain data without tags")
        if isinstance(event, yaml.AliasEvent):
            return self._construct_alias(event, depth)
        self._count(event, depth)
        self._anchors[event.anchor] = _OPEN
        data: Any
        if isinstance(event, yaml.ScalarEvent):
            data = self._construct_scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            items = self._events_until(yaml.SequenceEndEvent)
            data = [self._construct(item, depth + 1) for item in items]
        else:
            data = self._construct_mapping(depth + 1)
        self._anchors[event.anchor] = data
        return data

    def _construct_scalar(self, event: Any) -> Any:
        text, is_plain = event.value, event.implicit[0]
        if is_plain and text == "<<":
            remedy = "write the keys out, or give several --config files"
            raise self._fault(event, "has the merge key <<", remedy)
        for pattern, convert in _CORE_SCHEMA if is_plain else ():
            if pattern.fullmatch(text):
                if len(text) > MAX_DIGITS:
                    what = f"holds a number of more than {MAX_DIGITS} digits"
                    raise self._fault(event, what, "shorten it")
                return convert(text)
        return text

    def _construct_mapping(self, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for event in self._events_until(yaml.MappingEndEvent):
            key = self._construct(event, depth)
            if not isinstance(key, str):
                shown = f" {key}" if isinstance(key, int | float) else ""
                remedy = 'put it in quotes, such as "1"'
                raise self._fault(event, f"has a key{shown} that is not text", remedy)
            if key in mapping:
                what = f"repeats the key {key} of line {lines[key]}"
                raise self._fault(event, what, "keep one of the two")
            lines[key] = event.start_mark.line + 1
            mapping[key] = self._construct(next(self._events), depth)
        return mapping

    def _construct_alias(self, event: Any, depth: int) -> Any:
        name = event.anchor
        if name not in self._anchors:
            raise self._fault(event, f"uses *{name}", f"define &{name} above it")
        if self._anchors[name] is _OPEN:
            raise self._fault(event, f"uses *{name} inside &{name}", "write the value out")

        def copied(data: Any, depth: int) -> Any:
            self._count(event, depth)
            if isinstance(data, list):
                return [copied(item, depth + 1) for item in data]
            if isinstance(data, dict):
                return {key: copied(item, depth + 1) for key, item in data.items()}
            return data

        return copied(self._anchors[name], depth)

    def _events_until(self, end: type) -> Iterator[Any]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _count(self, event: Any, depth: int) -> None:
        """Count one more value, in a number of lists and mappings."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            what = f"makes more than {MAX_NODES} values, aliases expanded"
            raise self._fault(event, what, "write less")
        if depth > MAX_DEPTH:
            raise self._fault(event, f"nests deeper than {MAX_DEPTH} levels", "flatten it")

    def _fault(self, event: Any, what: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self._where} line {event.start_mark.line + 1} {what}; {remedy}.")


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
    scanned: Iterable[Any] = yaml.scan(text, Loader=_PARSER)
    tokens = [token for token in scanned if token.end_mark.index > token.start_mark.index]
    end = tokens[-1].end_mark.index if tokens else 0
    if "\n" not in words and text[end:].strip():
        return True
    scalars = [token for token in tokens if isinstance(token, yaml.ScalarToken)]
    if isinstance(value, dict | list) or len(scalars) != 1:
        return False
    return bool(scalars[0].plain and scalars[0].value != words)


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
    is_plain = text.isprintable() and not any(
        pattern.fullmatch(text) for pattern, _ in _CORE_SCHEMA
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


def _represent_list(dumper: yaml.SafeDumper, items: Iterable[Any]) -> yaml.SequenceNode:
    values = list(items)
    is_short = not any(isinstance(value, dict | list | tuple) for value in values)
    on_one_line = is_short or bool(dumper.default_flow_style)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=on_one_line)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)
