"""Loading a checkpoint without running what it contains, by ``torch.load(weights_only=True)``.

State that could be written but not read back is refused.
"""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddp_sgd.checkpointing.manifest import FORMAT, Manifest, read_manifest
from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder, fault_of
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.files import is_missing, retry, unreadable
from ddp_sgd.text import first_line

_PLAIN = (torch.Tensor, nn.Parameter, int, float, bool, str, bytes, complex, type(None))
"""Classes that a reader accepts; one derived from them may run code of its own."""

_ANOTHER = "name another checkpoint"


def read_tensors(file: Path) -> dict[str, Any]:
    """Load a checkpoint onto the host.

    Args:
        file: A file that a run has written.

    Returns:
        ``model`` (name to tensor), ``optimizer`` (``momentum_buffer``: name to tensor), the header
        by name, ``data``, marks of the training data, if they could be read, and ``compression`` if
        the run's gradients left something to remember.

    Raises:
        DataError: It cannot be read, is no checkpoint, or holds more than tensors and plain data.
    """
    try:
        content = retry(lambda: _load(file))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file} holds more than tensors and plain data, and is not read; name a file that "
            "`python -m ddp_sgd.checkpoint verify` accepts."
        ) from error
    except Exception as error:  # of a damaged pickle comes any
        if isinstance(error, OSError) and not is_missing(error):
            raise unreadable(file, error, _ANOTHER) from error
        cause = first_line(error)
        raise DataError(
            f"{file} is no checkpoint that can be read: {cause}; name a file that "
            "`python -m ddp_sgd.checkpoint verify` accepts."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(
            f"{file} is no checkpoint of format {FORMAT}; name a file that ddp_sgd has written."
        )
    return content


def find_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """Find the checkpoint that a user names, and verify it.

    Args:
        path: A checkpoint, a link to one, a run folder or its checkpoints folder; of a folder it is
            the newest that is whole.

    Raises:
        DataError: There is none, or it is damaged.
    """
    try:
        return _find(path)
    except OSError as error:
        raise unreadable(path, error, _ANOTHER) from error


def _load(file: Path) -> Any:
    # weights_only is passed: an environment variable may turn torch's default off.
    return torch.load(file, map_location="cpu", weights_only=True)


def _find(path: Path) -> tuple[Path, Manifest]:
    if path.is_dir():
        inner = path / FOLDER_NAME
        folder = CheckpointFolder(inner if inner.is_dir() else path)
        chosen = folder.choose()
        if chosen.manifest is None:
            why = "; ".join(chosen.passed_over) or "nothing was saved in it"
            raise DataError(f"{path} holds no checkpoint that is whole ({why}); name another.")
        return folder.path / chosen.manifest.file, chosen.manifest
    file = Path(os.path.realpath(path))  # resolve() raises RuntimeError where links run in a circle
    if not file.is_file():
        raise DataError(f"{path} is not there; name a checkpoint or a run folder.")
    manifest = read_manifest(file.with_suffix(".json"))
    if manifest is None or manifest.file != file.name:
        raise DataError(
            f"{path} has no valid manifest {file.with_suffix('.json').name} beside it; "
            "name a checkpoint that was written whole."
        )
    if fault := fault_of(file, manifest):
        raise DataError(f"{path} {fault}; name another checkpoint.")
    return file, manifest


def refuse_foreign(tree: Any, path: str = "model") -> None:
    """Refuse state that could be written but not read back: reading runs no code.

    Args:
        tree: Tensors and plain data, nested.
        path: Where the tree is, for the error.

    Raises:
        ConfigError: It holds something else.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            refuse_foreign(key, f"{path}.{key}")
            refuse_foreign(value, f"{path}.{key}")
    elif type(tree) in (list, tuple, torch.Size):
        for number, value in enumerate(tree):
            refuse_foreign(value, f"{path}.{number}")
    elif type(tree) not in _PLAIN:
        raise ConfigError(
            f"the state {path} is a {type(tree).__name__}, which a checkpoint cannot hold; keep "
            "tensors and plain numbers, text, lists and mappings in the state of the model."
        )
    elif isinstance(tree, torch.Tensor) and tree.layout is not torch.strided:
        layout = str(tree.layout).removeprefix("torch.")
        raise ConfigError(
            f"the state {path} has the layout {layout}, which a checkpoint cannot hold; pass "
            "persistent=False to register_buffer, or make it dense with .to_dense()."
        )
