"""Names of scores: ``eval/loss`` of one held-out set, ``eval/NAME/loss`` of several. No torch.

The best checkpoint is chosen by the only held-out set, or by the first of several.
"""

import math
from collections.abc import Mapping
from typing import Any


def prefix_of(key: str) -> str:
    """Return what the names of the scores of a data set begin with.

    Args:
        key: Its key in the configuration: ``data.eval``, ``data.eval.NAME`` or ``data.test``.

    Example:
        >>> prefix_of("data.eval.clean")
        'eval/clean'
    """
    return key.removeprefix("data.").replace(".", "/")


def scored_sets(row: Mapping[str, Any]) -> list[str]:
    """List the prefixes of the data sets that a row or a result has scores of, in order."""
    named = (key.rpartition("/") for key in row)
    return [
        prefix
        for prefix, _, leaf in named
        if leaf == "count" and (prefix in ("eval", "test") or prefix.startswith("eval/"))
    ]


def choosing_score(scores: Mapping[str, Any]) -> str:
    """Return the name of the score that chooses the best checkpoint.

    Args:
        scores: An evaluation by name, in the order of its sets, each with its loss first.

    Returns:
        The accuracy of the first set, such as ``eval/accuracy`` or ``eval/clean/accuracy``; its
        loss, where it has no accuracy.
    """
    first = next((key for key in scores if key.startswith("eval/")), "eval/loss")
    prefix = first.rpartition("/")[0]
    accuracy = f"{prefix}/accuracy"
    return accuracy if accuracy in scores else f"{prefix}/loss"


def goodness(scores: Mapping[str, float | int]) -> float:
    """Order evaluations: by accuracy where there is one, else by the loss."""
    name = choosing_score(scores)
    value = scores.get(name, math.nan)
    if name.endswith("/loss"):
        value = -value
    return value if math.isfinite(value) else -math.inf
