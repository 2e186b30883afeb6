"""YAML constructor for the core schema of YAML 1.2, with limits on depth and size."""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from ddp_sgd.errors import ConfigError

MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_DIGITS = 1_000  # Python refuses to show integers from 4,300 on

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


def plain_scalar(text: str) -> Any:
    """Value of an unquoted scalar: None, a boolean, a number, or the text itself.

    Raises:
        ValueError: A number has more than 1,000 characters.
    """
    for pattern, convert in _CORE_SCHEMA:
        if pattern.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise ValueError(f"a number has {len(text)} characters")
            return convert(text)
    return text


def is_null(text: str) -> bool:
    """Whether an unquoted scalar is null: ``null``, ``~``, or nothing at all."""
    return _NULL.fullmatch(text.strip()) is not None


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not been read yet."""

    value: dict[str, Any] | list[Any]
    anchor: str | None
    nodes_before: int
    key: str | None = None
    key_lines: dict[str, int] = field(default_factory=dict)


class DocumentBuilder:
    """Plain data from the events of a document; a loop, so that no text is too deep for it.

    Args:
        where: What the text came from, for messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._root: Any = None
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int] | None] = {}  # None: not closed yet
        self._nodes = 0
        self._documents = 0

    def build(self, events: Iterable[Any]) -> Any:
        """Read all events.

        Raises:
            ConfigError: The events hold tags, duplicate keys, keys that are not text, a second
                document, or too much.
        """
        for event in events:
            line = event.start_mark.line + 1
            if tag := getattr(event, "tag", None):
                shown = tag.replace("tag:yaml.org,2002:", "!!")
                raise self._fault(line, f"has the tag {shown}", "write plain data without tags")
            match event:
                case yaml.ScalarEvent():
                    self._add_scalar(event, line)
                case yaml.AliasEvent():
                    self._add_alias(event.anchor, line)
                case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                    self._start(event, line)
                case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                    self._end(line)
                case yaml.DocumentStartEvent():
                    self._start_document(line)
        return self._root

    def _start_document(self, line: int) -> None:
        self._documents += 1
        if self._documents > 1:
            raise self._fault(line, "starts a second document", "keep one document in one text")

    def _add_scalar(self, event: Any, line: int) -> None:
        is_plain = event.implicit[0]
        try:
            value = plain_scalar(event.value) if is_plain else event.value
        except ValueError:
            raise self._fault(
                line, f"holds a number of more than {MAX_DIGITS} digits", "shorten it"
            ) from None
        if is_plain and value == "<<":
            raise self._fault(
                line, "has the merge key <<", "write the keys out, or give several --config files"
            )
        self._count(1, line)
        if event.anchor:
            self._anchors[event.anchor] = (value, 1)
        self._place(value, line)

    def _add_alias(self, anchor: str | None, line: int) -> None:
        if anchor is None or anchor not in self._anchors:
            raise self._fault(line, f"uses *{anchor}", f"define &{anchor} above it")
        target = self._anchors[anchor]
        if target is None:
            raise self._fault(line, f"uses *{anchor} inside &{anchor}", "write the value out")
        value, nodes = target
        self._count(nodes, line)
        self._place(copy.deepcopy(value), line)

    def _start(self, event: Any, line: int) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise self._fault(line, f"nests deeper than {MAX_DEPTH} levels", "flatten it")
        value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        self._require_text_key(value, line)
        self._open.append(_Open(value, event.anchor, self._nodes))
        self._count(1, line)
        if event.anchor:
            self._anchors[event.anchor] = None

    def _end(self, line: int) -> None:
        closed = self._open.pop()
        if closed.anchor:
            self._anchors[closed.anchor] = (closed.value, self._nodes - closed.nodes_before)
        self._place(closed.value, line)

    def _place(self, value: Any, line: int) -> None:
        if not self._open:
            self._root = value
            return
        parent = self._open[-1]
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is not None:
            parent.value[parent.key] = value
            parent.key = None
        else:
            self._require_text_key(value, line)
            if first := parent.key_lines.get(value):
                raise self._fault(
                    line, f"repeats the key {value} of line {first}", "keep one of the two"
                )
            parent.key_lines[value] = line
            parent.key = value

    def _require_text_key(self, value: Any, line: int) -> None:
        """Refuse a value that stands where a mapping wants its next key, unless it is text."""
        if not self._open or isinstance(value, str):
            return
        parent = self._open[-1]
        if isinstance(parent.value, dict) and parent.key is None:
            shown = f" {value}" if isinstance(value, int | float) else ""
            raise self._fault(
                line, f"has a key{shown} that is not text", 'put it in quotes, such as "1"'
            )

    def _count(self, nodes: int, line: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise self._fault(
                line, f"makes more than {MAX_NODES} values, aliases expanded", "write less"
            )

    def _fault(self, line: int, what: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self._where} line {line} {what}; {remedy}.")
