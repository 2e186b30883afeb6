"""Validation errors of a configuration, in one line that gives a remedy for each."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from ddp_sgd.config.component import COMPONENT_TAG, SETS_TAG, Component
from ddp_sgd.config.keys import Key, all_keys, find_key, keys_below, yaml_value
from ddp_sgd.errors import ConfigError

_SHOWN_CHARACTERS = 60
_NEAR = 0.6
_SHORT_NAMES = ("args", "call")  # as near to targets, large and scale as to what is meant


def explain_faults(
    error: ValidationError,
    values: Mapping[str, Any],
    origins: Mapping[str, str],
    options: Iterable[str] = (),
) -> ConfigError:
    """Turn what pydantic found into one error that lists every fault.

    Args:
        error: What pydantic found.
        values: The merged mapping that was checked.
        origins: Where each leaf came from, by dotted path. Files and variables are named in the
            message, flags of the command line are not, since the fault itself shows them.
        options: Names of the command's own options, which an unknown key may have been meant for.

    Returns:
        The error, with faults in the order of the models, joined by `` | ``.
    """
    kinds: dict[str, list[str]] = {}
    messages: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        path = _path(fault["loc"], values, fault["type"])
        is_in_list = any(isinstance(part, int) for part in fault["loc"])  # which the path is not
        is_unknown = fault["type"] == "extra_forbidden" and not is_in_list
        kinds.setdefault(path, []).append("unknown key" if is_unknown else fault["type"])
        if fault["type"] == "value_error":
            messages[path] = _message(path, values, str(fault["ctx"]["error"]))
    lines = []
    for path, found in kinds.items():
        if any(other.startswith(f"{path}.") for other in kinds):
            continue  # a union, one of whose members it nearly is
        if path in messages:
            origin = _origin(messages[path].partition(" ")[0], origins)
            lines.append(f"{messages[path].rstrip('.')}{origin}.")
        elif "unknown key" in found:
            remedy = _remedy_for_unknown(path, options)
            lines.append(f"unknown key {path}{_origin(path, origins)}; {remedy}")
        else:
            what, remedy = _wrong_value(path, _value_at(path, values), found)
            lines.append(_sentence(what, remedy, _origin(path, origins)))
    return ConfigError(" | ".join(lines))


def show(value: Any) -> str:
    """A value for a message: short, in Python's notation but for null, true and false."""
    if value is None or isinstance(value, bool):
        return yaml_value(value)
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def nearest(name: str, options: Iterable[str] = ()) -> str | None:
    """The key, or the option with its dashes, that an unknown name may have been meant for."""
    parent, _, leaf = name.rpartition(".")
    scores = {
        key.name: _likeness(leaf, key.leaf)
        - (0.1 if key.parent != parent else 0.0)
        - (0.25 if key.leaf in _SHORT_NAMES else 0.0)
        for key in all_keys().values()
        if key.leaf not in Component.model_fields or key.parent == parent
    }
    if not parent:
        scores |= {other: max(score, _likeness(name, other)) for other, score in scores.items()}
        scores |= {f"--{option}": _likeness(name, option) for option in options}
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] >= _NEAR else None


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _message(path: str, values: Mapping[str, Any], text: str) -> str:
    """Complete a validator's message: a section's is whole, a value's is only the remedy."""
    key = find_key(path)
    is_remedy = key is not None and key.kind == "value"
    return f"{path} is {show(_value_at(path, values))}; {text}" if is_remedy else text


def _path(location: tuple[int | str, ...], values: Mapping[str, Any], kind: str) -> str:
    """Dotted path of the key at fault, without list positions and the names of union members."""
    path: list[str] = []
    here: Any = values
    for number, part in enumerate(location, start=1):
        if part in (COMPONENT_TAG, SETS_TAG):
            continue
        is_key = isinstance(here, Mapping) and part in here
        is_missing_key = kind == "missing" and number == len(location)
        if isinstance(here, Mapping) and not is_key and number < len(location):
            continue  # the name of a union member
        if not is_key and not is_missing_key:
            break
        path.append(str(part))
        here = here[part] if is_key else None
    return ".".join(path)


def _value_at(path: str, values: Mapping[str, Any]) -> Any:
    here: Any = values
    for part in path.split("."):
        here = here.get(part)
    return here


def _origin(path: str, origins: Mapping[str, str]) -> str:
    """Where a key came from, as `` (set in FILE)``; nothing for a flag or a default."""
    below = (origin for leaf, origin in origins.items() if leaf.startswith(f"{path}."))
    origin = origins.get(path) or next(below, "")
    return "" if not origin or origin.startswith("--") else f" (set in {origin})"


def _sentence(what: str, remedy: str, origin: str) -> str:
    is_question = remedy.endswith("?")
    return f"{what}{origin}; {remedy}" if is_question else f"{what}; {remedy}{origin}."


def _remedy_for_unknown(path: str, options: Iterable[str]) -> str:
    parent, _, leaf = path.rpartition(".")
    near = nearest(path, options)
    holder = find_key(parent)
    if path in all_keys():
        section, _, key = path.partition(".")
        return f"nest it, as {section}: {{{key}: ...}}."
    if holder and holder.kind == "component" and (near is None or not near.startswith(parent)):
        return f"did you mean {parent}.init_args.{leaf}?"
    if near:
        return f"did you mean {near}?"
    keys = ", ".join(key.leaf for key in keys_below(parent))
    return f"the keys {f'of {parent}' if parent else 'at the top'} are {keys}."


def _wrong_value(path: str, value: Any, found: list[str]) -> tuple[str, str]:
    """What is wrong with the value of a known key, and what to do about it."""
    key = find_key(path)
    if key is None:
        return f"{path or 'the configuration'} cannot be read", "see --help for keys and values"
    if "missing" in found:
        return f"{path} is not set", f"choose {_choices(key)}"
    what = f"{path} is {show(value)}"
    if key.kind == "component" and isinstance(value, str):
        words = f"choose {' or '.join(key.names)}, or " if key.names else ""
        return what, f"{words}write {path}.class_path={value}"
    if key.kind != "value":
        return what, f"set its keys, such as {path}{key.setting.removeprefix(key.name)}"
    remedy = f"choose {_choices(key)}"
    if "finite_number" in found:
        remedy = remedy.replace("a number", "a finite number")
    if "string_type" in found and isinstance(value, int | float):
        remedy += f', or quote it to make it text: "{yaml_value(value)}"'
    if isinstance(value, str):
        near = difflib.get_close_matches(value, key.names, n=1, cutoff=0.5)
        remedy += f"; did you mean {near[0]}?" if near else ""
    return what, remedy


def _choices(key: Key) -> str:
    return f"{key.choices}, such as {key.example}" if key.example else key.choices
