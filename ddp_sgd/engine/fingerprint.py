"""Fingerprints of data sets and models, cheap to compare between ranks.

Fingerprint of the training data in a checkpoint: a resume with other samples is refused.

Data of the same length may be others behind a path that moved, behind the same path, or given in
Python.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.data.fetcher import EVAL_EPOCH, Collate, Fetcher, Request, Unreadable
from ddp_sgd.distributed.collectives import from_rank_0
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.resume import ResumePoint
from ddp_sgd.engine.train_state import State, Tree
from ddp_sgd.errors import RefusedError
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


Marks = Mapping[str, Mark]

KEY = "data"
"""Where the marks are in a checkpoint; those of earlier releases have none."""

_OF_TRAINING_DATA = " of data.train["
_SHOWN = 3


def with_marks(
    marks: Marks, state_dict: Callable[[State], tuple[Header, Tree]]
) -> Callable[[State], tuple[Header, Tree]]:
    """Add the marks of the training data to the state dict of a run.

    Args:
        marks: From ``require_consistency``; those of held-out data, which may change, are left out.
        state_dict: Gives header and content of a checkpoint.
    """
    packed = {name: tuple(mark) for name, mark in marks.items() if _OF_TRAINING_DATA in name}

    def state_dict_with_marks(state: State) -> tuple[Header, Tree]:
        header, tree = state_dict(state)
        return header, {**tree, KEY: packed} if packed else tree

    return state_dict_with_marks


def refuse_other_data(
    resume_point: ResumePoint,
    saved: Mapping[str, Any],
    marks: Marks,
    read_again: Callable[[], Marks],
) -> None:
    """Refuse to go on with other training data than those of the checkpoint.

    A difference counts if today's samples read alike twice: what a data set gives differently at
    each reading is no other data. A run that begins with the checkpoint of another one, by
    ``resume=PATH``, may have data of its own.

    Args:
        resume_point: What the run goes on from.
        saved: Content of the checkpoint.
        marks: Today's.
        read_again: Marks the same samples a second time; called where there is a difference.

    Raises:
        RefusedError: A sample is another one; the message names it.
    """
    if resume_point.header is None or resume_point.header.run_id != resume_point.run_id:
        return
    before = {name: Mark(*values) for name, values in (saved.get(KEY) or {}).items()}
    suspects = [
        name for name, mark in before.items() if name in marks and not mark.agrees_with(marks[name])
    ]
    second = read_again() if suspects else {}
    differences = [
        f"{name} was {before[name].text}, is {marks[name].text}"
        for name in suspects
        if name in second and second[name].agrees_with(marks[name])
    ]
    if differences:
        shown = ", ".join(differences[:_SHOWN]) + (", ..." if len(differences) > _SHOWN else "")
        raise RefusedError(
            f"data.train is not what the checkpoint of step {resume_point.header.step} was trained "
            f"on: {shown}; restore the data, choose another name, or set resume=never to "
            "begin at step 0."
        )


def refuse_data_of_another_run(
    resume_point: ResumePoint, read: Callable[[], Marks], runtime: Runtime
) -> None:
    """Refuse to give the result of a finished run for other data; equal on all ranks.

    Args:
        resume_point: What is left of the run; without a checkpoint nothing is compared.
        read: Marks the samples of today's data.
        runtime: This process.

    Raises:
        DataError: The checkpoint cannot be read.
        RefusedError: A sample is another one; the message names it.
    """
    saved = from_rank_0(
        read_tensors(resume_point.file).get(KEY) if resume_point.file else None, runtime
    )
    if saved:
        refuse_other_data(resume_point, {KEY: saved}, read(), read)
