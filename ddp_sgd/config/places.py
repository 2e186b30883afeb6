"""Paths in components, which may differ between hosts without changing the data."""

from typing import Any

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
