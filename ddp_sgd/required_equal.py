"""Versions and settings that must be equal on all ranks."""

import json
import platform
import sys
from collections.abc import Mapping
from operator import itemgetter

import numpy as np
import torch

from ddp_sgd.config import RunConfig, leaves
from ddp_sgd.config.places import without_places

_MAY_DIFFER = ("output_dir", "wandb", "runtime.device", "runtime.backend", "data.workers")
"""Keys that a host may have of its own: what rank 0 alone writes, where a rank computes, and how
many processes read; a backend that does not fit the others' fails when the ranks join.
"""

_OF_DATA_SETS = tuple(
    f"data.{name}.{key}" for name in ("train", "eval") for key in ("args", "init_args")
)


def read_versions() -> dict[str, str]:
    """Give the versions of what a run is made of; those of CUDA and NCCL only with a GPU."""
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


def settings_that_agree(config: RunConfig) -> dict[str, str]:
    """Give the keys of the configuration that have to be the same on every rank, with their values.

    A host may keep its copy of the data where it likes: absolute paths in the arguments of data
    sets are left out, since the data are compared themselves.

    Args:
        config: Description of the run.

    Returns:
        Dotted keys with their values in JSON.
    """
    return {
        key: json.dumps(without_places(key, value))
        for key, value in sorted(leaves(config.model_dump(mode="json")), key=itemgetter(0))
        if not any(key == name or key.startswith(f"{name}.") for name in _MAY_DIFFER)
    }
