"""Configuration changes on a resume that would change the weights.

Paths in components, which may differ between hosts without changing the data.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.text import MASK, is_secret

_ARGUMENTS = tuple(
    f"data.{name}.{key}" for name in ("train", "eval") for key in ("args", "init_args")
)
_STARTS = ("/", "~", "file://")
"""Absolute paths, those below a home folder, and URLs of files. A relative path is a name that the
user chose: it leads to the same place wherever the folder of the job is.
"""
_PLACE = "a path of its own"


def without_places(key: str, value: Any) -> Any:
    """Replace the paths in an argument of a data set by words that are equal for all paths.

    Hosts may keep copies of the data at different places, and a job may have a scratch folder of
    its own; the samples are compared instead.

    Args:
        key: Dotted key of the argument; other keys than those of ``data.train`` and ``data.eval``
            keep their values.
        value: Plain data; paths are looked for at any depth.

    Example:
        >>> without_places("data.train.init_args.root", "/scratch/job1/images")
        'a path of its own'
        >>> without_places("data.train.init_args.split", "train")
        'train'
    """
    is_argument = any(key == start or key.startswith(f"{start}.") for start in _ARGUMENTS)
    return _without(value) if is_argument else value


def _without(value: Any) -> Any:
    if isinstance(value, str):
        return _PLACE if value.startswith(_STARTS) else value
    if isinstance(value, list):
        return [_without(item) for item in value]
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items()}
    return value


_MATTERS = (
    *("seed", "model", "loss", "data.train", "data.collate", "data.tail", "optim"),
    *("schedule", "parallel.compression", "parallel.local_sgd"),
)


def changes_that_matter(before: Mapping[str, Any], now: RunConfig) -> list[str]:
    """List the keys on which the weights depend and that were given another value.

    More epochs are no change: the run goes on. Nor are other micro-batches of the same total, since
    the steps stay the same. A data set at another place is none either: its samples are compared
    when it is read.

    Args:
        before: An earlier configuration, as plain data.
        now: The configuration of today.

    Returns:
        Lines such as ``optim.lr was 0.05, is 0.1``.
    """
    old, new = _settings(before), _settings(now.model_dump(mode="json"))
    default = {
        key: value
        for key, value in _settings(RunConfig().model_dump(mode="json")).items()
        if ".init_args." not in key  # those of the default class mean nothing to another one
    }
    changes = []
    for key in sorted(old.keys() | new.keys()):
        was, is_now = (values.get(key, default.get(key)) for values in (old, new))
        moved = without_places(key, was) == without_places(key, is_now)
        if was != is_now and not moved and key.startswith(_MATTERS):
            changes.append(
                f"{key} was {MASK}, is {MASK}"
                if is_secret(key)
                else f"{key} was {was}, is {is_now}"
            )
    if rank_batch(before) != rank_batch(now.model_dump()):
        was, is_now = rank_batch(before), rank_batch(now.model_dump())
        changes.append(f"data.batch_size x data.accumulate was {was}, is {is_now}")
    if now.epochs < before.get("epochs", 0):
        changes.append(f"epochs was {before['epochs']}, is {now.epochs}")
    return changes


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value; an empty mapping is as good as none."""
    return {key: value for key, value in leaves(config) if value != {}}


def rank_batch(config: Mapping[str, Any]) -> int:
    """Samples of one rank in one step that a configuration asks for."""
    data = config.get("data", {})
    return int(data.get("batch_size", 0)) * int(data.get("accumulate", 0))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings, each with its value.

    Args:
        value: Mappings within mappings; an empty one is a value.
        path: Key of the whole.
    """
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, item in value.items():
        yield from leaves(item, f"{path}.{key}" if path else str(key))
