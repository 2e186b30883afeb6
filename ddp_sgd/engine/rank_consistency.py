"""Rank consistency: configuration, data and model of all ranks are compared before a run.

Fingerprints of data sets and models are cheap to compare, between ranks and with a checkpoint.
"""

import hashlib
import json
import math
import socket
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddp_sgd.data.fetcher import EVAL_EPOCH, Collate, Fetcher, Request, Unreadable
from ddp_sgd.data.selection import Selection
from ddp_sgd.distributed.collectives import from_rank_0, gather_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.components import Components
from ddp_sgd.engine.reading import Reading
from ddp_sgd.errors import ConfigError, DataError, UserError
from ddp_sgd.losses import loss_modules
from ddp_sgd.rank_differences import name_values, read_versions, settings_that_agree, vital_versions
from ddp_sgd.tree import bytes_of, leaves, tensors_in

_MAX_PARTS = 16
"""Tensors of a sample that are looked at."""


_TOLERANCE = 0.01
"""Largest difference of two means, in root mean squares: hosts with other CPUs or libraries may
decode a picture with other last bits, while two samples differ by more.
"""


class Mark(NamedTuple):
    """Description of a part of a sample.

    Args:
        text: For people; equal texts mean equal parts, unless there is a mean.
        mean: Mean of the numbers; None: the text counts.
        size: Their root mean square.
    """

    text: str
    mean: float | None = None
    size: float = 0.0

    def agrees_with(self, other: "Mark") -> bool:
        """Whether two ranks have read the same, as far as a mean shows."""
        if self.mean is None or other.mean is None or self.text == other.text:
            return self.text == other.text
        limit = _TOLERANCE * max(self.size, other.size)
        return all(
            math.isclose(a, b, rel_tol=0.0, abs_tol=limit)
            for a, b in ((self.mean, other.mean), (self.size, other.size))
        )


Marks = Mapping[str, Mark]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a run is, as recorded in its checkpoints.

    Args:
        run_id: Identity of the run.
        config: Description of the run, as plain data.
        loss: What the loss is, from ``describe_loss``.
        marks: Of the training data.
    """

    run_id: str
    config: Mapping[str, Any]
    loss: str
    marks: Marks


def mark_samples(
    dataset: Any,
    where: str,
    seed: int,
    collate: Collate | None = None,
    selection: Selection | None = None,
) -> dict[str, Mark]:
    """Read the first, the middle and the last sample, as an evaluation would.

    Shapes, number types and integer targets have to be equal; of pictures and floating-point
    numbers, the means. A sample that cannot be read has no mark: reading it later raises the error.

    Args:
        dataset: Map-style data set with at least one sample.
        where: Its key, for messages.
        seed: Seed of the run.
        collate: Function from a list of samples to a batch; None: torch's default_collate.
        selection: Chooses input and target of a sample; None: samples are pairs.

    Returns:
        Marks by what they are of, such as ``the shape of data.train[0]``.
    """
    marks = {}
    fetcher = Fetcher(dataset, where, seed, collate, selection)
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


def mark_training_set(train_set: Any, reading: Reading) -> Marks:
    """Mark some samples of a training set; see ``mark_samples``. None has no marks."""
    if train_set is None:
        return {}
    return _mark_set(train_set, "data.train", reading)


def _mark_set(dataset: Any, where: str, reading: Reading) -> dict[str, Mark]:
    return mark_samples(dataset, where, reading.seed, reading.collate, reading.selection)


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
    for path, leaf in leaves(part):
        names = "".join(f"{key}: " for key in path if not isinstance(key, int))
        if isinstance(leaf, torch.Tensor):
            shape = "unknown" if is_lazy(leaf) else tuple(leaf.shape)
            yield f"{names}{str(leaf.dtype).removeprefix('torch.')} of shape {shape}"
        else:
            yield f"{names}{type(leaf).__name__}"


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tensors_in(part) if not is_lazy(tensor))


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


_SHOWN = 3
"""Largest number of differences in one message."""
_NONE = Mark("")
_SAME_DATA = "give every rank the same data, in the same order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trait:
    """One thing that has to be the same on every rank, name by name.

    Args:
        values: What this rank has, in order.
        template: Description of a difference, with ``{name}`` in it.
        remedy: What the user can do.
        error: Class of the error.
    """

    values: dict[str, str]
    template: str
    remedy: str
    error: type[UserError] = ConfigError

    @property
    def digest(self) -> str:
        """Digest of the names and values, in their order."""
        return hashlib.sha256(json.dumps(list(self.values.items())).encode()).hexdigest()


class Brought(NamedTuple):
    """What a rank sends the others."""

    host: str
    digests: list[str]
    marks: dict[str, Mark]


def require_consistency(
    settings: Mapping[str, Any], components: Components, runtime: Runtime
) -> Marks:
    """Refuse to start if ranks differ in versions, configuration, model or data.

    Ranks send digests; only where these differ do they send what is behind them, and read the
    samples again: what a data set gives differently at a second reading is no difference.

    Returns:
        Marks of the training data that this rank has read.

    Raises:
        ConfigError: Versions, configurations or models differ; equal on all ranks.
        DataError: The data differ; equal on all ranks.
    """
    if runtime.alone:
        return mark_training_set(components.train_set, components.reading)
    traits = list_traits(settings, components)
    digests = [trait.digest for trait in traits]
    mine = Brought(socket.gethostname(), digests, read_marks(components))
    all_ranks = gather_over_ranks(mine, runtime)
    hosts = [brought.host for brought in all_ranks]
    for number, trait in enumerate(traits):
        if len({brought.digests[number] for brought in all_ranks}) > 1:
            raise trait.error(f"{_differences(trait, hosts, runtime)}; {trait.remedy}.")
    if suspects := _differing_marks([brought.marks for brought in all_ranks]):
        _judge_marks(suspects, mine.marks, read_marks(components), hosts, runtime)
    return {name: mark for name, mark in mine.marks.items() if " of data.train[" in name}


def list_traits(settings: Mapping[str, Any], components: Components) -> list[Trait]:
    """List what has to be the same on every rank; where one differs, so may those below it."""
    return [
        Trait(
            values=vital_versions(read_versions()),
            template="the version of {name} is",
            remedy="install the same packages on every host",
        ),
        Trait(
            values=settings_that_agree(settings),
            template="{name} is",
            remedy="start every rank with the same files, variables and options",
        ),
        Trait(
            values={name: _length(dataset) for name, dataset in _data_sets(components).items()},
            template="the length of {name} is",
            remedy=_SAME_DATA,
            error=DataError,
        ),
        Trait(
            values=describe_model(components.model),
            template="the model's {name} is",
            remedy="build the same model on every rank",
        ),
        Trait(
            values=describe_loss_tensors(loss_modules(components.loss, components.model)),
            template="the loss's {name} is",
            remedy="build the same loss on every rank, with the same class weights",
        ),
    ]


def _data_sets(components: Components) -> dict[str, Any]:
    eval_sets, test_sets = (
        sets or {where: None}
        for where, sets in (
            ("data.eval", components.eval_sets),
            ("data.test", components.test_sets),
        )
    )
    return {"data.train": components.train_set, **eval_sets, **test_sets}


def _length(dataset: Sized | None) -> str:
    return "none" if dataset is None else str(len(dataset))


def read_marks(components: Components) -> dict[str, Mark]:
    """Read some samples of each data set; see ``mark_samples``."""
    marks: dict[str, Mark] = {}
    reading = components.reading
    for name, dataset in _data_sets(components).items():
        if dataset is not None:
            marks |= _mark_set(dataset, name, reading)
    return marks


def _differences(trait: Trait, hosts: Sequence[str], runtime: Runtime) -> str:
    """Describe what differs from rank 0, on which ranks; all ranks call this and get the same."""
    of_rank_0 = from_rank_0(trait.values, runtime)
    names = dict.fromkeys([*of_rank_0, *trait.values])
    deviations = [name for name in names if of_rank_0.get(name) != trait.values.get(name)]
    per_rank = gather_over_ranks(deviations[:_SHOWN], runtime)
    shown = list(dict.fromkeys(name for each in per_rank for name in each))[:_SHOWN]
    mine = {name: trait.values.get(name, "missing") for name in shown}
    found = gather_over_ranks(mine, runtime)
    lines = [
        f"{trait.template.format(name=name)} {name_values(values, hosts)}"
        for name in shown
        for values in [{rank: each[name] for rank, each in enumerate(found)}]
    ]
    return ", and ".join(lines) or trait.template.format(name="order of parts") + " not the same"


def _differing_marks(per_rank: Sequence[dict[str, Mark]]) -> list[str]:
    """Name the marks that not all ranks who have them agree on, in their order."""
    names = dict.fromkeys(name for marks in per_rank for name in marks)
    found = []
    for name in names:
        first, *others = (marks[name] for marks in per_rank if name in marks)
        if not all(first.agrees_with(other) for other in others):
            found.append(name)
    return found


def _judge_marks(
    suspects: Sequence[str],
    first: dict[str, Mark],
    second: dict[str, Mark],
    hosts: Sequence[str],
    runtime: Runtime,
) -> None:
    """Refuse marks that differ though each rank that has them reads the same twice."""
    mine = {
        name: first[name].text if first[name].agrees_with(second.get(name, _NONE)) else None
        for name in suspects
        if name in first
    }
    per_rank = gather_over_ranks(mine, runtime)
    for name in suspects:
        values = {rank: each[name] for rank, each in enumerate(per_rank) if name in each}
        texts = {rank: text for rank, text in values.items() if text is not None}
        if len(texts) == len(values):
            raise DataError(f"{name} is {name_values(texts, hosts)}; {_SAME_DATA}.")
