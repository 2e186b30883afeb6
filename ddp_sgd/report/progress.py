"""Console logger: a progress bar on a terminal, plain lines in a file."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from ddp_sgd.console import is_terminal, say, silence
from ddp_sgd.report.journal import EventRow, Row, RunRecord
from ddp_sgd.report.plan_table import passes_in_words, plan_lines, update_words
from ddp_sgd.scores import scored_sets

_KINDS = ("compute", "data", "waiting", "bookkeeping")

_OTHERS = {
    *("loss", "loss_rank0", "lr", "momentum", "grad_norm", "skipped_steps", "loss_scale"),
    *("overflow_steps", "step", "count", "accuracy", "correct", "accuracy_top5", "correct_top5"),
}
"""Measurements that are not named by the loss."""

_SILENCE_S = 30.0
"""Longest time without a plain line, as far as rows come in, in seconds."""


class Progress:
    """Prints the plan once, a line an epoch, and a last line with what came out."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._record: RunRecord | None = None
        self._loss = _Mean()
        self._named: dict[str, _Mean] = {}
        self._last_line = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        self._draw(lambda bar: bar.clear())
        say(line)
        self._draw(lambda bar: bar.refresh())
        self._last_line = time.monotonic()

    def _draw(self, change: Callable[["tqdm[Any]"], object]) -> None:
        """Change the bar, if there is one; it goes with its terminal, and the run stays."""
        if self._bar is None:
            return
        try:
            change(self._bar)
        except Exception:  # any error of the terminal or tqdm
            self._bar.disable = True  # else it would try again when it is deleted
            self._bar = None
            silence(sys.stderr)

    def start(self, record: RunRecord) -> None:
        """Print the plan, and open the bar on a terminal."""
        self._record = record
        config = record.config
        sections = config.compute, config.data, config.eval, update_words(config)
        for line in plan_lines(record.plan, config.schedule.milestones, *sections):
            self.say(line)
        for note in record.notes:
            self.say(f"note      {note}")
        self.say(f"results in {record.folder}")
        if is_terminal(sys.stderr):
            with suppress(Exception):  # a terminal that is gone by now
                self._bar = tqdm(
                    total=record.plan.total_steps, unit="step", dynamic_ncols=True, leave=False
                )

    def write(self, rows: Sequence[EventRow]) -> None:
        """Move the bar; print a line at the end of each epoch, for each score, and now and then."""
        for event, row in rows:
            self._show(event, row)

    def _show(self, event: str, row: Mapping[str, Any]) -> None:
        if event == "train":
            self._show_training(row)
        elif event == "eval":
            for scores in _scores(row):
                self.say(f"{'':26}{scores}")
        elif event == "resume":
            for line in _origin_lines(row):
                self.say(line)
        elif event == "checkpoint" and row.get("error"):
            self.say(f"checkpoint of step {row['step']} {row['error']}; the run goes on")
        elif event == "stop":
            self.say(f"stopping after step {row['step']}: {row['reason']}")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close the bar and print the last line."""
        self._draw(lambda bar: bar.close())
        self._bar = None
        if self._record is None or result["status"] == "failed":
            return
        for line in _time_lines(result):
            self.say(line)
        samples = result["samples"] - self._record.origin.samples
        self.say(f"{last_line({**result, 'samples': samples})}, results in {self._record.folder}")

    def _show_training(self, row: Mapping[str, Any]) -> None:
        self._loss.add(row["train/loss"], row["samples"])
        for name, mean in _named_numbers("train", row, "accuracy"):
            self._named.setdefault(name, _Mean(self._loss.start_samples)).add(mean, row["samples"])
        plan = self._record.plan if self._record else None
        run_ends = plan is not None and row["step"] == plan.total_steps
        epoch_ends = row["epoch"] == int(row["epoch"]) or run_ends
        self._draw(lambda bar: _move(bar, row))
        if epoch_ends or (self._bar is None and time.monotonic() - self._last_line > _SILENCE_S):
            self.say(self._line(row))
        if epoch_ends:
            for each in (self._loss, *self._named.values()):
                each.start(row["samples"])

    def _line(self, row: Mapping[str, Any]) -> str:
        plan = self._record.plan if self._record else None
        epochs = passes_in_words(plan) if plan else "0"
        means = {name: each.value for name, each in self._named.items()}
        named = "".join(f"  {name} {v:.4f}" for name, v in means.items() if v is not None)
        line = (
            f"epoch {row['epoch']:6.4g}/{epochs}  step {row['step']:7d}  "
            f"loss {_text(self._loss.value)}{named}  lr {row['train/lr']:.4g}  "
            f"{row['throughput/samples_per_s']:,.0f} samples/s"
        )
        skipped = int(row["train/skipped_steps"] or 0)
        return line + (f"  {skipped} steps skipped, gradient not finite" if skipped else "")


def last_line(result: Mapping[str, Any]) -> str:
    """Sum up how a run ended.

    Args:
        result: The content of ``result.json``, at least its status and step.
    """
    wall_s = result.get("wall_s")
    parts = (
        f"{result['status']}: {result['step']} steps{f' in {wall_s:.1f} s' if wall_s else ''}",
        *_scores(result),
        f"{result['samples'] / wall_s:,.0f} samples/s in all" if wall_s else "",
    )
    return ", ".join(filter(None, parts))


def _time_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Show where the time of training went, if any did, and which rank made the others wait."""
    shares = {key: result.get(f"share/{key}", 0.0) for key in _KINDS}
    if not any(shares.values()):
        return
    text = ", ".join(f"{key} {share:.0%}" for key, share in shares.items() if share)
    if "slowest_rank" in result:
        text += (
            f"; slowest is rank {result['slowest_rank']}, "
            f"for which the others wait {result['share/lag']:.0%}"
        )
    yield f"time      {text}".replace("%", " %")


def _origin_lines(row: Row) -> Iterator[str]:
    """Show from where a run goes on, and what was passed over."""
    if row.get("passed_over"):
        yield f"passed over: {row['passed_over']}"
    if row.get("file"):
        yield f"going on from step {row['step']}, epoch {row['epoch']:.4g} ({row['file']})"
    else:
        yield "beginning again at step 0: nothing was saved before"


def _move(bar: "tqdm[Any]", row: Mapping[str, Any]) -> None:
    bar.update(row["step"] - bar.n)
    bar.set_postfix_str(f"loss {_text(row['train/loss'])} lr {row['train/lr']:.4g}")


class _Mean:
    """Mean loss over the samples of an epoch, from the means of its rows."""

    def __init__(self, samples: int = 0) -> None:
        self.start(samples)

    def start(self, samples: int) -> None:
        self._total, self._counted, self._last = 0.0, 0, samples
        self.start_samples = samples

    def add(self, mean: float | None, samples: int) -> None:
        if mean is not None:
            self._total += mean * (samples - self._last)
            self._counted += samples - self._last
        self._last = samples

    @property
    def value(self) -> float | None:
        return self._total / self._counted if self._counted else None


def _named_numbers(
    prefix: str, row: Mapping[str, Any], *wanted: str
) -> Iterator[tuple[str, float | None]]:
    """Yield the numbers that the loss has named, and those that are wanted besides."""
    for key, value in row.items():
        before, _, name = key.rpartition("/")
        if before == prefix and (name not in _OTHERS or name in wanted):
            yield name, value


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _scores(row: Mapping[str, Any]) -> Iterator[str]:
    """Describe the scores of each held-out set in a row, and of the test set."""
    for prefix in scored_sets(row):
        named = "".join(f"  {name} {_text(value)}" for name, value in _named_numbers(prefix, row))
        text = f"{prefix} loss {_text(row[f'{prefix}/loss'])}{named}"
        if f"{prefix}/accuracy" in row:
            share = f"{100 * row[f'{prefix}/accuracy']:.2f} %"
            text += f"  accuracy {share} ({row[f'{prefix}/correct']}/{row[f'{prefix}/count']})"
        yield text
