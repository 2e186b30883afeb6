"""The score of a model: every sample once, the same bits on any number of ranks."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ddp_sgd.data.loading import EvalLoader, move
from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.pulse import Pulse
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.losses import Objective

Metrics = dict[str, float | int]

Score = Callable[[Callable[[], bool]], Metrics]
"""Scores the model, unless its argument says that there is something better to do."""


_MOST_WAITING_BYTES = 2**20
"""Scores that wait to be compared with their targets."""


class Interrupted(Exception):  # noqa: N818  # it is no error
    """An evaluation was cut short, on all ranks."""


def evaluate(
    model: nn.Module,
    objective: Objective,
    loader: EvalLoader,
    runtime: Runtime,
    pulse: Pulse | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Metrics:
    """Score a model.

    Every rank scores its chunks; losses stay apart by chunk until all are there, and are summed in
    the order of chunks, so that not even rounding depends on the number of ranks.

    Args:
        model: The module itself, not its wrapper, which may talk to other ranks in a forward pass.
            Left in the mode that it was in.
        objective: The loss.
        loader: This rank's chunks.
        runtime: This process.
        pulse: Is told of every chunk.
        interrupted: Whether this rank has something better to do; asked before every chunk.

    Returns:
        ``eval/loss``, the mean over all units, and ``eval/count``, the samples scored. For scores
        of shape (m, C) and integer targets of shape (m,), C > 1, also ``eval/correct`` and
        ``eval/accuracy`` in [0, 1], with C > 5 ``eval/correct_top5`` and ``eval/accuracy_top5``.

    Raises:
        Interrupted: Some rank had something better to do; raised on all.
    """
    on_host = runtime.device.type == "mps"  # Metal has no float64
    place = torch.device("cpu") if on_host else runtime.device
    chunks, losses, units, judge = [], [], [], _Judge(objective)
    cut_short = 0
    with evaluating(model):
        for chunk, inputs, targets in loader:
            if pulse is not None:
                pulse.tick()
            if interrupted():
                cut_short = 1
                break
            outputs, answers = model(move(inputs, runtime.device)), move(targets, runtime.device)
            samples = _length(targets)
            chunks.append(chunk)
            losses.append(objective.total(outputs, answers, samples))
            units.append(samples if objective.counts_samples else objective.units(targets, samples))
            judge.see(outputs, answers, samples)
    sums = torch.zeros((2, loader.chunks.count), dtype=torch.float64, device=place)
    if chunks:
        sums[0, chunks] = torch.stack(losses).to(sums)
        sums[1, chunks] = torch.tensor(units).to(sums)
    known = torch.tensor([cut_short, judge.samples], device=place)
    counts = torch.cat([known, judge.counts(place)])
    sum_over_ranks(sums, runtime)
    sum_over_ranks(counts, runtime)
    cut_short, *judged = counts.tolist()
    if cut_short:
        raise Interrupted
    return _metrics(*sums.sum(dim=1).tolist(), *judged)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; then every module back into its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Judge:
    """Counts right answers, those of many small chunks by one call.

    Args:
        objective: Knows which targets are not asked for.

    Attributes:
        samples: Those seen.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._waiting_bytes = 0
        self._counts: torch.Tensor | None = None
        self.samples = 0

    def see(self, outputs: Any, targets: Any, samples: int) -> None:
        """Take the answers of a chunk."""
        self.samples += samples
        if is_classification(outputs, targets):
            self._waiting.append((outputs, targets))
            self._waiting_bytes += outputs.nbytes
            if self._waiting_bytes > _MOST_WAITING_BYTES:
                self._judge()

    def counts(self, place: torch.device) -> torch.Tensor:
        """Tell how many were asked and right, by the highest score, and by the highest five."""
        self._judge()
        none = torch.zeros(4, dtype=torch.int64, device=place)
        return none if self._counts is None else self._counts.to(place)

    def _judge(self) -> None:
        """Count right answers; targets that the loss ignores are not asked for."""
        if not self._waiting:
            return
        outputs, targets = map(torch.cat, zip(*self._waiting, strict=True))
        self._waiting, self._waiting_bytes = [], 0
        asked = (targets != self._objective.ignore_index).sum()
        counts = [asked, (outputs.argmax(dim=1) == targets).sum()]
        if outputs.shape[1] > 5:
            top5 = outputs.topk(5, dim=1).indices
            counts += [asked, (top5 == targets[:, None]).any(dim=1).sum()]
        else:
            counts += [torch.zeros_like(asked)] * 2
        new = torch.stack(counts)
        self._counts = new if self._counts is None else self._counts + new


def is_classification(outputs: Any, targets: Any) -> bool:
    """Whether outputs are scores of shape (m, C), C > 1, for integer targets of shape (m,)."""
    return (
        isinstance(outputs, torch.Tensor)
        and isinstance(targets, torch.Tensor)
        and outputs.ndim == 2
        and outputs.shape[1] > 1
        and targets.ndim == 1
        and not targets.is_floating_point()
    )


def _length(targets: Any) -> int:
    while not isinstance(targets, torch.Tensor):
        targets = next(iter(targets.values() if isinstance(targets, dict) else targets))
    return int(targets.shape[0])


def _metrics(
    loss: float,
    units: float,
    count: int,
    judged: int,
    correct: int,
    judged_top5: int,
    correct_top5: int,
) -> Metrics:
    metrics: Metrics = {"eval/loss": loss / units if units else math.nan, "eval/count": count}
    if judged:
        metrics |= {"eval/accuracy": correct / judged, "eval/correct": correct}
    if judged_top5:
        metrics |= {
            "eval/accuracy_top5": correct_top5 / judged_top5,
            "eval/correct_top5": correct_top5,
        }
    return metrics
