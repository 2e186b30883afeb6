"""Averaging checkpoints: the mean of several, as a checkpoint of its own.

Export of weights to safetensors, with the configuration beside them.
"""

import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors, write_checkpoint
from ddp_sgd.checkpointing.store import CheckpointFolder, Header, Manifest
from ddp_sgd.config.yaml_io import write_yaml
from ddp_sgd.errors import ConfigError, DataError, OutputError
from ddp_sgd.files import sync_file, sync_folder
from ddp_sgd.tree import misfits

Found = tuple[Path, Manifest]


def choose_checkpoints(paths: Sequence[Path], *, last: int | None = None) -> list[Found]:
    """Find the checkpoints to average, each once.

    Args:
        paths: Checkpoints, links to such, and folders, which stand for all whole ones in them.
        last: How many of the newest to take; None takes all.

    Returns:
        Files and manifests, the oldest first.

    Raises:
        ConfigError: Fewer than two are requested, or named.
        DataError: A checkpoint that is named is damaged, or there are fewer than requested.
    """
    if last is not None and last < 2:
        raise ConfigError(f"--last is {last}; choose at least 2.")
    found: dict[Path, Manifest] = {}
    for path in paths:
        found |= _whole_in(path, last) if path.is_dir() else dict([find_checkpoint(path)])
    ordered = sorted(found.items(), key=lambda item: item[1].header.samples)
    if len(ordered) < (last or 2):
        raise DataError(
            f"{', '.join(map(str, paths))} holds {len(ordered)} whole checkpoints, while "
            f"{last or 2} are needed; raise checkpoint.keep in the next run, or name more."
        )
    return ordered[-last:] if last else ordered


def average_tensors(chosen: Sequence[Found]) -> dict[str, Any]:
    """Work out mean = (x_1 + ... + x_K) / K of each weight, in float64, one file at a time.

    What is not a floating-point number, such as a count of batches, is that of the newest. Tensors
    that are one and the same in the newest stay so.

    Args:
        chosen: Files and manifests, the oldest first.

    Returns:
        Content for a checkpoint: ``model``, and ``optimizer`` without momentum buffers, since those
        of different places do not fit the mean.

    Raises:
        DataError: A file cannot be read, or they are of different models.
    """
    newest = read_tensors(chosen[-1][0])["model"]
    sums: dict[Hashable, torch.Tensor] = {}
    for file, _ in chosen:
        _add(sums, _fitting(file, newest), newest)
    means = {key: total / len(chosen) for key, total in sums.items()}
    kept: dict[Hashable, torch.Tensor] = {}
    model = {}
    for name, value in newest.items():
        key = _identity(value)
        if key in means:
            value = kept.setdefault(key, means[key].to(value.dtype))  # noqa: PLW2901
        model[name] = value
    return {"model": model, "optimizer": {"momentum_buffer": {}}}


def write_average(chosen: Sequence[Found], output: Path) -> Path:
    """Average checkpoints into a folder of their own.

    The header is that of the newest, so that a run goes on from its place; without scores, since
    the mean was not scored.

    Args:
        chosen: Files and manifests, the oldest first.
        output: A folder that does not exist yet.

    Returns:
        The file.

    Raises:
        OutputError: The folder exists, or cannot be written.
        DataError: The checkpoints do not fit together.
    """
    header = replace(chosen[-1][1].header, scores={}, scored_at=-1)
    if os.path.lexists(output):
        raise OutputError(f"{output} is there already; choose another --output.")
    try:
        output.mkdir(parents=True)
        sync_folder(output.parent)
        content = {**average_tensors(chosen), "mean_of": [str(file) for file, _ in chosen]}
        manifest = write_checkpoint(CheckpointFolder(output), header, content, keep=1)
    except OSError as error:
        raise _unwritable(output, error) from error
    finally:
        with suppress(OSError):
            output.rmdir()  # which only works on a folder that stayed empty
    return output / manifest.file


def _whole_in(path: Path, most: int | None) -> dict[Path, Manifest]:
    """Verify the newest first, and no more than are needed."""
    folder = CheckpointFolder.at(path)
    whole: dict[Path, Manifest] = {}
    for manifest in reversed(folder.manifests()):
        if len(whole) == most:
            break
        if folder.fault_of(manifest) is None:
            whole[(folder.path / manifest.file).resolve()] = manifest
    return whole


def _fitting(file: Path, newest: Mapping[str, Any]) -> Mapping[str, Any]:
    weights: Mapping[str, Any] = read_tensors(file)["model"]
    if differences := misfits(weights, newest):
        raise DataError(
            f"{file} is of another model than the newest: {', '.join(differences[:4])}; name "
            "checkpoints of one run."
        )
    return weights


def _add(
    sums: dict[Hashable, torch.Tensor], weights: Mapping[str, Any], newest: Mapping[str, Any]
) -> None:
    added = set()
    for name, value in newest.items():
        key = _identity(value)
        if key is None or key in added:
            continue
        added.add(key)
        wide = torch.complex128 if value.is_complex() else torch.float64
        term = weights[name].to(wide)
        sums[key] = sums[key] + term if key in sums else term


def _identity(value: Any) -> Hashable | None:
    """Identify a floating-point tensor by its memory; None for anything else."""
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _unwritable(output: Path, error: OSError) -> OutputError:
    reason = error.strerror or error
    return OutputError(f"{output} cannot be written: {reason}; choose another --output.")


ENDING = ".safetensors"


def refuse_overwriting(output: Path, *, force: bool) -> None:
    """Look at the names before anything slow is done.

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
        "epoch": repr(header.epochs),
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
