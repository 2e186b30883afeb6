"""Fingerprints of data sets and models, cheap to compare between ranks."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddp_sgd.data.fetcher import EVAL_EPOCH, Collate, Fetcher, Request, Unreadable
from ddp_sgd.tensor_bytes import bytes_of

_MAX_PARTS = 16
"""Tensors of a sample that are looked at."""
_TOLERANCE = 0.01
"""Largest difference of two means, in root mean squares: hosts with other CPUs or libraries may
decode a picture with other last bits, while two samples differ by more.
"""


class Mark(NamedTuple):
    """What is told of a part of a sample.

    Args:
        text: For people; equal texts mean equal parts, unless there is a mean.
        mean: Mean of the numbers; None: the text counts.
        size: Their root mean square.
    """

    text: str
    mean: float | None = None
    size: float = 0.0

    def agrees_with(self, other: "Mark") -> bool:
        """Whether two ranks have read the same, as far as a mean can tell."""
        if self.mean is None or other.mean is None or self.text == other.text:
            return self.text == other.text
        limit = _TOLERANCE * max(self.size, other.size)
        return all(
            math.isclose(a, b, rel_tol=0.0, abs_tol=limit)
            for a, b in ((self.mean, other.mean), (self.size, other.size))
        )


def mark_samples(
    dataset: Any, where: str, seed: int, collate: Collate | None = None
) -> dict[str, Mark]:
    """Read the first, the middle and the last sample, as an evaluation would.

    Shapes, number types and integer targets have to be equal; of pictures and floating-point
    numbers, the means. A sample that cannot be read has no mark: whoever needs it says why.

    Args:
        dataset: Map-style data set with at least one sample.
        where: Its key, for messages.
        seed: Seed of the run.
        collate: Function from a list of samples to a batch; None: torch's default_collate.

    Returns:
        Marks by what they are of, such as ``the shape of data.train[0]``.
    """
    marks = {}
    fetcher = Fetcher(dataset, where, seed, collate)
    for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        sample = fetcher.__getitems__(Request(EVAL_EPOCH, np.array([index])))
        if isinstance(sample, Unreadable):
            continue
        marks[f"the shape of {where}[{index}]"] = Mark(_describe(sample))
        for half, part in zip(("input", "target"), sample, strict=False):
            tensors = [each for each in _tensors(part) if each.numel()]
            for number, tensor in enumerate(islice(tensors, _MAX_PARTS)):
                name = half if len(tensors) == 1 else f"{half}, part {number},"
                mark = _mark(tensor, is_target=half == "target")
                if mark:
                    marks[f"the {name} of {where}[{index}]"] = mark
    return marks


def describe_model(model: nn.Module) -> dict[str, str]:
    """Give type, shape and memory layout of every parameter and buffer, in the model's order."""
    described = {}
    for kind, named in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in named:
            frozen = ", frozen" if kind == "parameter" and not tensor.requires_grad else ""
            described[f"{kind} {name}"] = f"{_describe(tensor)}{_layout(tensor)}{frozen}"
    return described


def describe_loss_tensors(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Give type, shape and a digest of every tensor in the state of a loss.

    Args:
        modules: The modules of the loss, by where they were found.
    """
    return {
        f"tensor {where}.{name}": f"{_describe(value)} ({_show(value)})"
        for where, module in modules.items()
        for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def _layout(tensor: torch.Tensor) -> str:
    """Describe the strides where they are not those of rows: ranks add up memory, not numbers."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_contiguous():
        return ""
    return f" with strides {tensor.stride()}"


def _describe(part: Any) -> str:
    """Describe a sample or a part of it; cut short where it is long, with a digest of the rest."""
    text = ", ".join(islice(_shapes(part), 1000))
    return text if len(text) <= 200 else f"{text[:160]}... ({_digest(text.encode())})"


def _shapes(part: Any) -> Iterator[str]:
    if isinstance(part, torch.Tensor):
        shape = "unknown" if is_lazy(part) else tuple(part.shape)
        yield f"{str(part.dtype).removeprefix('torch.')} of shape {shape}"
    elif isinstance(part, Mapping):
        for key, item in part.items():
            yield from (f"{key}: {shape}" for shape in _shapes(item))
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from _shapes(item)
    else:
        yield type(part).__name__


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        if not is_lazy(part):
            yield part
    elif isinstance(part, Mapping):
        for item in part.values():
            yield from _tensors(item)
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from _tensors(item)


def _mark(tensor: torch.Tensor, *, is_target: bool) -> Mark | None:
    """Mark by the mean what a decoder may have rounded, and by its bytes what is a number."""
    is_rounded = tensor.is_floating_point() or (tensor.dtype == torch.uint8 and not is_target)
    try:
        if not is_rounded:
            return Mark(_show(tensor))
        numbers = tensor.detach().double()
        mean, size = numbers.mean().item(), numbers.square().mean().sqrt().item()
    except (RuntimeError, TypeError, ValueError):  # sparse, quantized, or on no device
        return None
    return Mark(f"a mean of {mean:.6g} (root mean square {size:.6g})", mean, size)


def _show(tensor: torch.Tensor) -> str:
    if tensor.numel() == 1:
        return str(tensor.item())
    content = bytes_of(tensor.cpu()).numpy().tobytes()
    return f"{tensor.numel()} numbers with the digest {_digest(content)}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
