"""Differences between ranks, in words. No torch.

Versions and settings that must be equal on all ranks.
"""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from ddp_sgd.config import leaves
from ddp_sgd.config.sources import without_places

_SHOWN = 3
"""Values, hosts and pieces of ranks that a sentence names before it counts the rest."""


def name_values(values: Mapping[int, str], hosts: Sequence[str]) -> str | None:
    """Name the ranks of each value, unless all have the same.

    Args:
        values: Value of each rank that has one.
        hosts: Name of the host of each rank, by rank.

    Returns:
        Words such as ``0.1 on ranks 0-1 (node1) and 0.2 on rank 2 (node2)``; None: all are equal.
    """
    owners: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        owners.setdefault(value, []).append(rank)
    if len(owners) < 2:
        return None
    # The value of most ranks comes first; of equally many, that of the lowest rank.
    ordered = sorted(owners.items(), key=lambda item: (-len(item[1]), item[1][0]))
    parts = [f"{value} on {name_ranks(ranks, hosts)}" for value, ranks in ordered[:_SHOWN]]
    if rest := sum(len(ranks) for _, ranks in ordered[_SHOWN:]):
        parts.append(f"others on {rest} more")
    return join_words(parts)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name ranks and their hosts, such as ``ranks 0-2 and 5 (node1, node2)``.

    Args:
        ranks: In rising order, at least one.
        hosts: Name of the host of each rank, by rank; empty where it is not known.
    """
    pieces = number_spans(ranks)
    shown = pieces[:_SHOWN] + ([f"{len(pieces) - _SHOWN} more"] if len(pieces) > _SHOWN else [])
    text = f"rank{'s' * (len(ranks) > 1)} {join_words(shown)}"
    names = list(dict.fromkeys(hosts[rank] for rank in ranks if hosts[rank]))
    if not names:
        return text
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{text} ({', '.join(names[:_SHOWN])}{more})"


def number_spans(ranks: Sequence[int]) -> list[str]:
    """Fold numbers in rising order into spans, such as ``0-3`` and ``7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ["-".join(map(str, span)) for span in spans]


def join_words(parts: Sequence[str]) -> str:
    """Join with commas, and ``and`` before the last."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


_MAY_DIFFER = ("output_dir", "wandb", "runtime.device", "runtime.backend", "data.workers")
"""Keys that a host may have of its own: what rank 0 alone writes, where a rank computes, and how
many processes read; a backend that does not fit the others' fails when the ranks join.
"""

_OF_DATA_SETS = tuple(
    f"data.{name}.{key}" for name in ("train", "eval") for key in ("args", "init_args")
)


def read_versions() -> dict[str, str]:
    """Give the versions of what a run is made of; those of CUDA and NCCL only with a GPU."""
    import torch  # the rest of this module is for commands without it

    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "ddp_sgd": sys.modules["ddp_sgd"].__version__,
        "numpy": str(np.__version__),
    }
    if torch.cuda.is_available():
        versions["cuda"] = str(torch.version.cuda)
        if torch.distributed.is_nccl_available():
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return versions


def vital_versions(versions: Mapping[str, str]) -> dict[str, str]:
    """Keep the versions that have to agree: ``torch``, ``ddp_sgd``, and Python's first two numbers.

    Others may differ: numpy, and the patch level of Python, read the same data alike.
    """
    kept = {name: versions[name] for name in ("torch", "ddp_sgd") if name in versions}
    if "python" in versions:
        kept["python"] = ".".join(versions["python"].split(".")[:2])
    return kept


def settings_that_agree(settings: Mapping[str, Any]) -> dict[str, str]:
    """Give the keys of the configuration that have to be the same on every rank, with their values.

    A host may keep its copy of the data where it likes: absolute paths in the arguments of data
    sets are left out, since the data are compared themselves.

    Args:
        settings: Description of the run, as plain data.

    Returns:
        Dotted keys with their values in JSON.
    """
    return {
        key: json.dumps(without_places(key, value))
        for key, value in sorted(leaves(settings), key=itemgetter(0))
        if not any(key == name or key.startswith(f"{name}.") for name in _MAY_DIFFER)
    }
