"""Export of weights to safetensors, with the configuration beside them."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ddp_sgd.checkpointing.listing import epochs_of
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.config.yaml_text import write_yaml
from ddp_sgd.errors import ConfigError, DataError, OutputError
from ddp_sgd.files import sync_file, sync_folder

ENDING = ".safetensors"


def refuse_overwriting(output: Path, *, force: bool) -> None:
    """Look at the names before anything slow is done.

    Args:
        output: Where the weights go.
        force: Whether files that exist may be replaced.

    Raises:
        ConfigError: It has another ending.
        OutputError: It, or the configuration beside it, exists.
    """
    if output.suffix != ENDING:
        raise ConfigError(f"{output} is no name for weights; write {output.stem}{ENDING}.")
    for path in (output, output.with_suffix(".yaml")):
        if path.exists() and not force:
            raise OutputError(f"{path} is there already; choose another name, or add --force.")


def export_weights(
    weights: Mapping[str, Any], header: Header, output: Path, *, digest: str
) -> dict[str, str]:
    """Write weights and buffers as safetensors, and the configuration as YAML.

    The metadata hold ``step``, ``epoch``, ``samples``, ``run_id``, ``weights_digest``, ``config``
    (YAML), and ``tied``: names that are left out, as JSON, each with the name of its equal. That is
    how ``safetensors.torch.load_model`` expects tied weights.

    Args:
        weights: Name to tensor.
        header: Where the run stood.
        output: Where to; files are replaced whole.
        digest: SHA-256 of the weights.

    Returns:
        The names that are left out, each with that of its equal.

    Raises:
        ConfigError: The package safetensors is missing.
        DataError: Something is no tensor, or of a type that the format does not know.
        OutputError: It cannot be written.
    """
    save_file = _safetensors()
    tensors, tied = untie(weights)
    config = write_yaml(header.config)
    metadata = {
        "format": "pt",
        "step": str(header.step),
        "epoch": repr(epochs_of(header)),
        "samples": str(header.samples),
        "run_id": header.run_id,
        "weights_digest": digest,
        "config": config,
        "tied": json.dumps(tied),
    }
    _replace(output, lambda new: save_file(tensors, new, metadata=metadata))
    _replace(output.with_suffix(".yaml"), lambda new: new.write_text(config))
    return tied


def untie(weights: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Keep one name of tensors that are one and the same; give views memory of their own.

    Returns:
        Contiguous tensors that share nothing, and the names left out, each with that of its equal.

    Raises:
        DataError: Something is no tensor.
    """
    names: dict[Any, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    taken: set[int] = set()
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise DataError(
                f"{name} is a {type(value).__name__}, and safetensors holds tensors only; use the "
                "checkpoint itself, torch.load(..., weights_only=True) reads it."
            )
        key = value.data_ptr(), value.dtype, value.shape, value.stride()
        if value.numel() and key in names:
            tied[name] = names[key]
            continue
        names[key] = name
        memory = value.untyped_storage()
        is_shared = memory.data_ptr() in taken or memory.nbytes() != value.nbytes
        taken.add(memory.data_ptr())
        whole = value.contiguous()
        tensors[name] = whole.clone() if is_shared else whole
    return tensors, tied


def _safetensors() -> Any:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ConfigError("safetensors is not installed; pip install 'ddp_sgd[export]'.") from error
    return save_file


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, and put it there once it is on the disk."""
    from safetensors import SafetensorError

    new = path.with_name(f".{path.name}.new")
    try:
        write(new)
        sync_file(new)
        new.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written: {reason}; choose another place.") from error
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the weights are of a kind that safetensors does not know: {error}; use the "
            "checkpoint itself, torch.load(..., weights_only=True) reads it."
        ) from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)
