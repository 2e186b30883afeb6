"""Evaluation: every sample once, the same bits on any number of ranks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ddp_sgd.data.device import move
from ddp_sgd.data.loader import EvalLoader
from ddp_sgd.data.sampler import EvalSampler
from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.progress import ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.labels import is_classification
from ddp_sgd.engine.logged_numbers import sum_numbers, sum_of_means, times
from ddp_sgd.losses import Objective
from ddp_sgd.named_losses import LOSS, counts_on_host

Metrics = dict[str, float | int]

Score = Callable[[Callable[[], bool]], Metrics]
"""Scores the model; stops early if its argument returns True."""


_SMALL_BYTES = 2**14
"""Scores of a chunk that are copied sooner than compared with their targets."""

_MOST_WAITING = 64
"""EvalSampler whose scores wait for that."""


class Interrupted(Exception):  # noqa: N818  # it is no error
    """An evaluation was cut short, on all ranks."""


def evaluate(
    model: nn.Module,
    objective: Objective,
    loader: EvalLoader,
    runtime: Runtime,
    progress: ProgressTracker | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    *,
    seed_chunk: Callable[[int], None] = lambda _: None,
) -> Metrics:
    """Score a model.

    Every rank scores its chunks; losses stay apart by chunk until all are there, and are summed in
    the order of chunks, so that not even rounding depends on the number of ranks.

    Args:
        model: The module itself, not its wrapper, whose forward pass may communicate.
            Left in the mode that it was in.
        objective: The loss.
        loader: This rank's chunks.
        runtime: This process.
        progress: Updated at every chunk.
        interrupted: Whether this rank has to stop early; called before every chunk.
        seed_chunk: Seeds what the model draws for a chunk, given its number.

    Returns:
        ``eval/loss``, the mean over all units, ``eval/count``, the samples scored, and what else
        the loss names, each the mean over its units, if there are any. For scores
        of shape (m, C) and integer targets of shape (m,), C > 1, also ``eval/correct`` and
        ``eval/accuracy`` in [0, 1], with C > 5 ``eval/correct_top5`` and ``eval/accuracy_top5``,
        if the loss takes classes and no score is NaN.

    Raises:
        Interrupted: Some rank had something better to do; raised on all.
    """
    on_host = runtime.device.type == "mps"  # Metal has no float64
    place = torch.device("cpu") if on_host else runtime.device
    scored = _Scored(objective, runtime.device)
    with evaluating(model):
        for chunk, samples, inputs, targets in loader:
            if progress is not None:
                progress.touch()
            if _is_cut_short(interrupted(), loader.chunks, runtime):
                scored.cut_short = 1
                break
            seed_chunk(chunk)
            ready = loader.transform(move(inputs, runtime.device), chunk)
            answers = move(targets, runtime.device)
            scored.add(chunk, samples, objective.outputs(model, ready, answers), answers)
    sums, counts = scored.by_chunk(loader.chunks.count, place), scored.counts(place)
    sum_over_ranks(sums, runtime)
    sum_over_ranks(counts, runtime)
    cut_short, *numbers = counts.tolist()
    if cut_short:
        raise Interrupted
    return _losses(objective, sums.sum(dim=1).tolist()) | _scores(numbers)


def _is_cut_short(interrupted: bool, chunks: EvalSampler, runtime: Runtime) -> bool:  # noqa: FBT001
    """Whether to leave the loop; where ranks score in step, all leave it together."""
    if not chunks.in_step:
        return interrupted
    wishes = torch.tensor(float(interrupted), device=runtime.device)
    return bool(sum_over_ranks(wishes, runtime) > 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; then every module back into its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(modes[model])
        for module, training in modes.items():  # parts may be in another mode than the whole
            if module.training == training:
                continue
            if type(module).train is nn.Module.train:
                module.training = training
            else:  # a method of its own may do more than set flags
                module.train(training)


class _Scored:
    """What is known of the chunks that this rank has scored.

    Correct predictions of many small chunks are counted by one call.

    Args:
        objective: The loss.
        device: Where the model is.

    Attributes:
        cut_short: 1 if there was something better to do, else 0.
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.cut_short = 0
        self._objective = objective
        self._device = device
        self._chunks: list[int] = []
        self._losses: list[torch.Tensor] = []
        self._units: list[float | torch.Tensor] = []
        self._numbers: list[torch.Tensor] = []
        self._samples = 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._answers: torch.Tensor | None = None

    def add(self, chunk: int, samples: int, outputs: Any, answers: Any) -> None:
        """Add what the model gives for a chunk.

        Args:
            chunk: Number of the chunk.
            samples: Its samples; 0 for one that takes part only since others do.
            outputs: What the model returned.
            answers: Its targets, where the model is.
        """
        values = self._objective.values(outputs, answers)
        if not samples:
            return
        self._chunks.append(chunk)
        self._samples += samples
        self._add_losses(values, outputs, answers, samples)
        if not (self._objective.takes_classes and is_classification(outputs, answers)):
            return
        if outputs.nbytes > _SMALL_BYTES:
            self._judge([(outputs, answers)])
            return
        # Copies: a model may reuse its memory, or have shown a part of something large.
        self._waiting.append((outputs.clone(), answers.clone()))
        if len(self._waiting) == _MOST_WAITING:
            self._judge_waiting()

    def _add_losses(
        self, values: Mapping[str, torch.Tensor], outputs: Any, answers: Any, samples: int
    ) -> None:
        """Add the loss of a chunk, and what is logged with it."""
        objective, given = self._objective, None
        loss, units = values[LOSS] * objective.weight(samples), self._count(answers, samples)
        if objective.gives_units:
            given = objective.given_units(answers, samples, self._device)
            units = given.get(LOSS, torch.zeros_like(loss))  # none: the loss is a sum of means
            loss = times(values[LOSS].to(units.dtype), units)
        self._losses.append(loss)
        self._units.append(units)
        if objective.form.names:
            self._numbers.append(
                sum_numbers(objective, values, outputs, answers, samples=samples, units=given)
            )

    def _count(self, answers: torch.Tensor, samples: int) -> float | torch.Tensor:
        """Count the units of a chunk, whose targets are where the model is."""
        if self._objective.counts_samples or self._objective.gives_units:
            return samples
        if counts_on_host(self._device):
            return self._objective.units(answers, samples)
        return self._objective.units_on_device(answers, samples)

    def by_chunk(self, count: int, place: torch.device) -> torch.Tensor:
        """Give sums by chunk, float64 of shape (2 + 2 n, count), zero where others scored.

        Returns:
            Losses and units; then sums and units of the n numbers that are logged with them.
        """
        rows = 2 + 2 * len(self._objective.form.names)
        sums = torch.zeros((rows, count), dtype=torch.float64, device=place)
        if self._chunks:
            sums[0, self._chunks] = torch.stack(self._losses).to(place).double()
            on_device = [each for each in self._units if isinstance(each, torch.Tensor)]
            units = torch.stack(on_device).to(sums) if on_device else sums.new_tensor(self._units)
            sums[1, self._chunks] = units
        if self._numbers:
            numbers = torch.stack([each.flatten() for each in self._numbers])
            sums[2:, self._chunks] = numbers.to(sums).T
        return sums

    def counts(self, place: torch.device) -> torch.Tensor:
        """Return ``cut_short``, samples, rows of NaN, and how many count and are correct, twice."""
        self._judge_waiting()
        known = torch.tensor([self.cut_short, self._samples], device=place)
        none = torch.zeros(5, dtype=torch.int64, device=place)
        answers = none if self._answers is None else self._answers.to(place)
        return torch.cat([known, answers])

    def _judge_waiting(self) -> None:
        if self._waiting:
            self._judge(self._waiting)
            self._waiting = []

    def _judge(self, answers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Count correct predictions, without targets that the loss ignores."""
        outputs, targets = map(torch.cat, zip(*answers, strict=True))
        counted = targets != self._objective.ignore_index
        asked = counted.sum()
        not_numbers = outputs.isnan().any(dim=1).sum()
        counts = [not_numbers, asked, ((outputs.argmax(dim=1) == targets) & counted).sum()]
        if outputs.shape[1] > 5:
            top5 = outputs.topk(5, dim=1).indices
            counts += [asked, ((top5 == targets[:, None]).any(dim=1) & counted).sum()]
        else:
            counts += [torch.zeros_like(asked)] * 2
        new = torch.stack(counts)
        self._answers = new if self._answers is None else self._answers + new


def _losses(objective: Objective, sums: list[float]) -> Metrics:
    """Divide the sums of the loss, and of what is logged with it and has units, by these."""
    names = objective.form.names
    totals, counts = sums[2 : 2 + len(names)], sums[2 + len(names) :]
    means = {n: t / c for n, t, c in zip(names, totals, counts, strict=True) if c}
    loss = sums[0] / sums[1] if sums[1] else None
    whole = sum_of_means(means) if objective.form.sums_means else loss
    shown = {LOSS: math.nan if whole is None else whole, **means}
    return {f"eval/{name}": value for name, value in shown.items()}


def _scores(counts: Sequence[int]) -> Metrics:
    count, not_numbers, judged, correct, judged_top5, correct_top5 = counts
    metrics: Metrics = {"eval/count": count}
    if not_numbers:  # argmax would take NaN for the largest score
        return metrics
    if judged:
        metrics |= {"eval/accuracy": correct / judged, "eval/correct": correct}
    if judged_top5:
        metrics |= {
            "eval/accuracy_top5": correct_top5 / judged_top5,
            "eval/correct_top5": correct_top5,
        }
    return metrics
