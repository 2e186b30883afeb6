"""Rank consistency: configuration, data and model of all ranks are compared before a run."""

import hashlib
import json
import socket
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.distributed.collectives import from_rank_0, gather_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.components import Components
from ddp_sgd.engine.fingerprint import (
    Mark,
    describe_loss_tensors,
    describe_model,
    mark_samples,
)
from ddp_sgd.errors import ConfigError, DataError, UserError
from ddp_sgd.losses import loss_modules
from ddp_sgd.rank_differences import read_versions, settings_that_agree, tell_apart, vital_versions

_SHOWN = 3
"""Differences that one message tells of."""
_NONE = Mark("")
_SAME_DATA = "give every rank the same data, in the same order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trait:
    """One thing that has to be the same on every rank, name by name.

    Args:
        values: What this rank has, in order.
        says: How a difference reads, with ``{name}`` in it.
        remedy: What the user can do.
        error: Class of the error.
    """

    values: dict[str, str]
    says: str
    remedy: str
    error: type[UserError] = ConfigError

    @property
    def digest(self) -> str:
        """Digest of the names and values, in their order."""
        return hashlib.sha256(json.dumps(list(self.values.items())).encode()).hexdigest()


class Brought(NamedTuple):
    """What a rank tells the others.

    Args:
        host: Name of its host.
        digests: Of its traits.
        marks: Of its samples.
    """

    host: str
    digests: list[str]
    marks: dict[str, Mark]


def require_consistency(
    config: RunConfig, components: Components, runtime: Runtime
) -> dict[str, Mark]:
    """Refuse to start if ranks differ in versions, configuration, model or data.

    Ranks send digests; only where these differ do they send what is behind them, and read the
    samples again: what a data set gives differently at a second reading is no difference.

    Args:
        config: Description of the run.
        components: Model and data.
        runtime: This process.

    Returns:
        Marks of the samples that this rank has read; alone, of the training data only.

    Raises:
        ConfigError: Versions, configurations or models differ; equal on all ranks.
        DataError: The data differ; equal on all ranks.
    """
    if runtime.alone:
        return read_marks(config, replace(components, eval_set=None))
    traits = list_traits(config, components)
    digests = [trait.digest for trait in traits]
    mine = Brought(socket.gethostname(), digests, read_marks(config, components))
    all_ranks = gather_over_ranks(mine, runtime)
    hosts = [brought.host for brought in all_ranks]
    for number, trait in enumerate(traits):
        if len({brought.digests[number] for brought in all_ranks}) > 1:
            raise trait.error(f"{_differences(trait, hosts, runtime)}; {trait.remedy}.")
    if suspects := _differing_marks([brought.marks for brought in all_ranks]):
        _judge_marks(suspects, mine.marks, read_marks(config, components), hosts, runtime)
    return mine.marks


def list_traits(config: RunConfig, components: Components) -> list[Trait]:
    """List what has to be the same on every rank; where one differs, so may those below it."""
    return [
        Trait(
            values=vital_versions(read_versions()),
            says="the version of {name} is",
            remedy="install the same packages on every host",
        ),
        Trait(
            values=settings_that_agree(config),
            says="{name} is",
            remedy="start every rank with the same files, variables and options",
        ),
        Trait(
            values={name: _length(dataset) for name, dataset in _data_sets(components).items()},
            says="the length of {name} is",
            remedy=_SAME_DATA,
            error=DataError,
        ),
        Trait(
            values=describe_model(components.model),
            says="the model's {name} is",
            remedy="build the same model on every rank",
        ),
        Trait(
            values=describe_loss_tensors(loss_modules(components.loss, components.model)),
            says="the loss's {name} is",
            remedy="build the same loss on every rank, with the same class weights",
        ),
    ]


def _data_sets(components: Components) -> dict[str, Any]:
    return {"data.train": components.train_set, "data.eval": components.eval_set}


def _length(dataset: Sized | None) -> str:
    return "none" if dataset is None else str(len(dataset))


def read_marks(config: RunConfig, components: Components) -> dict[str, Mark]:
    """Read some samples of each data set; see ``mark_samples``."""
    marks: dict[str, Mark] = {}
    for name, dataset in _data_sets(components).items():
        if dataset is not None:
            marks |= mark_samples(dataset, name, config.seed, components.collate)
    return marks


def _differences(trait: Trait, hosts: Sequence[str], runtime: Runtime) -> str:
    """Say what differs from rank 0, on which ranks; every rank calls this and gets the same."""
    of_rank_0 = from_rank_0(trait.values, runtime)
    names = dict.fromkeys([*of_rank_0, *trait.values])
    deviations = [name for name in names if of_rank_0.get(name) != trait.values.get(name)]
    per_rank = gather_over_ranks(deviations[:_SHOWN], runtime)
    shown = list(dict.fromkeys(name for each in per_rank for name in each))[:_SHOWN]
    mine = {name: trait.values.get(name, "missing") for name in shown}
    found = gather_over_ranks(mine, runtime)
    lines = [
        f"{trait.says.format(name=name)} {tell_apart(values, hosts)}"
        for name in shown
        for values in [{rank: each[name] for rank, each in enumerate(found)}]
    ]
    return ", and ".join(lines) or trait.says.format(name="order of parts") + " not the same"


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
            raise DataError(f"{name} is {tell_apart(texts, hosts)}; {_SAME_DATA}.")
