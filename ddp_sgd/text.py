"""Text formatting: aligned columns, the first line of an error, masked secrets. No torch.

Masked are the values of ``{env: NAME}``, and those of keys that name a secret.
"""

import os
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any


def columns(
    rows: Sequence[Sequence[str]], *, left: Container[int] = (0,), gap: str = "  "
) -> list[str]:
    """Align cells below each other.

    Args:
        rows: Cells, equally many in each row; the first row is usually the head.
        left: Numbers of the columns that begin at the left; the others end at the right.
        gap: What stands between two columns.

    Returns:
        A line for each row, without blanks at its end.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(gap.join(cells).rstrip())
    return lines


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; without a message, the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


MASK = "***"
_SHORTEST = 4
"""Characters of a value that is looked for in messages: shorter ones are parts of many words."""

_NAME = (
    r"(?:\w*_)?(?:token|passw(?:or)?d|pwd|passphrase|secret|api_?key|access_?key|private_?key"
    r"|credentials?|auth)"
)
_LEAF = re.compile(rf"^{_NAME}$", re.IGNORECASE)
_VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s,;|}\])'"]+)"""
_ASSIGNED = re.compile(rf"(\b{_NAME}['\"]?\s*[=:]\s*)(?!\{{env:){_VALUE}", re.IGNORECASE)
_TOLD = re.compile(rf"(\b{_NAME} is )('[^']*'|\"[^\"]*\")", re.IGNORECASE)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)

_known: dict[str, str] = {}
"""Values that the environment gave, each with what stands for it."""


def is_secret(key: str) -> bool:
    """Whether the name of a key, dotted or not, is that of a secret, such as ``api_key``."""
    return any(_LEAF.match(part) for part in key.split("."))


def mask(text: str) -> str:
    """Put ``***`` in the place of secrets in a message.

    A secret is a value that ``{env: NAME}`` has given, the value of a key that is named like one,
    and what stands before the ``@`` of a URL.
    """
    for value, stands_for in _known.items():
        text = text.replace(value, stands_for)
    text = _ASSIGNED.sub(rf"\1{MASK}", text)
    text = _TOLD.sub(rf"\1{MASK}", text)
    return _IN_URL.sub(rf"\1{MASK}@", text)


def env_name(value: Any) -> str | None:
    """Return NAME of the value ``{env: NAME}``; None for any other value."""
    if isinstance(value, Mapping) and list(value) == ["env"] and isinstance(value["env"], str):
        return value["env"]
    return None


def read_secret(name: str) -> str | None:
    """Return the value of an environment variable, and keep it out of messages from now on."""
    value = os.environ.get(name)
    if value and len(value) >= _SHORTEST:
        _known[value] = f"{{env: {name}}}"
    return value
