"""What a run says, and to whom: rows with their place in the run, to every sink of rank 0."""

import math
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from ddp_sgd.config import RunConfig, dump_yaml
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ExitCode, OutputError, UserError
from ddp_sgd.plan import Plan
from ddp_sgd.report.journal import Journal
from ddp_sgd.report.progress import Progress
from ddp_sgd.report.run_folder import RunFolder, open_run_folder
from ddp_sgd.report.sink import NoSink, Row, RunRecord, Sink, Sinks
from ddp_sgd.report.tensorboard import TensorBoard
from ddp_sgd.report.weights_and_biases import WeightsAndBiases


class Reporter:
    """Gives every row its time and place, and writes the result however the run ends.

    Args:
        folder: The run folder.
        verdict: Sink that keeps the result; open from the beginning.
        sinks: All others; they open when the plan is known.
        config: Description of the run.
        world_size: Ranks.
    """

    def __init__(
        self, folder: Path, verdict: Sink, sinks: Sink, config: RunConfig, world_size: int
    ) -> None:
        self._folder = folder
        self._verdict = verdict
        self._sinks = sinks
        self._opened: list[Sink] = []
        self._config = config
        self._world_size = world_size
        self._start = time.perf_counter()
        self._plan: Plan | None = None
        self._step = 0

    def start(self, plan: Plan) -> None:
        """Open the sinks, and say that the run starts."""
        self._plan = plan
        record = RunRecord(
            folder=self._folder,
            name=self._config.name,
            config=self._config.model_dump(mode="json"),
            plan=plan,
            world_size=self._world_size,
            git_commit=git_commit(),
            run_id=token_hex(4),
            resumed=False,
        )
        for sink in (self._verdict, self._sinks):
            self._opened.append(sink)
            sink.start(record)
        self._write("start", 0, {"world_size": self._world_size})

    def train(self, step: int, row: Row | None) -> None:
        """Say what the steps since the last row measured, if there is a row."""
        if row is not None:
            self._write("train", step, row)

    def eval(self, step: int, scores: Row) -> None:
        """Say how the model scored, if it did."""
        if scores:
            self._write("eval", step, scores)

    def stop(self, step: int, reason: str | None) -> None:
        """Say that the run ends early, since somebody asked."""
        self._write("stop", step, {"reason": reason or "another rank was asked to stop"})

    def end(self, result: Row) -> None:
        """Say how the run ended, and close the sinks."""
        self._write("end", int(result["step"] or 0), {"status": result["status"]})
        self._close(result)

    def fail(self, error: BaseException) -> None:
        """Write down that the run failed, and why; what cannot be written then is lost."""
        code = error.exit_code if isinstance(error, UserError) else ExitCode.INTERNAL
        place = self._place(self._step) if self._plan else {"step": 0, "epoch": 0.0, "samples": 0}
        result = {
            "status": "failed",
            "exit_code": int(code),
            **place,
            "world_size": self._world_size,
            "error": str(error) or type(error).__name__,
        }
        with suppress(OutputError):
            if self._plan:
                self._write("end", self._step, {"status": "failed", "error": result["error"]})
        with suppress(OutputError):
            self._close(result)

    def _close(self, result: Mapping[str, Any]) -> None:
        wall = {"wall_s": time.perf_counter() - self._start}
        full = {key: _number(value) for key, value in {**result, **wall}.items()}
        try:  # the result first: others may take their time, and a launcher may lose patience
            self._verdict.finish(full)
        finally:
            for sink in [sink for sink in reversed(self._opened) if sink is not self._verdict]:
                sink.finish(full)

    def _write(self, event: str, step: int, row: Row) -> None:
        self._step = step
        full = {"time": time.time(), **self._place(step), **row}
        for sink in self._opened:
            sink.write(event, {key: _number(value) for key, value in full.items()})

    def _place(self, step: int) -> dict[str, int | float]:
        plan = self._plan
        if plan is None:
            raise RuntimeError("a row was written before the run had a plan")
        return {"step": step, "epoch": plan.epoch_at(step), "samples": plan.samples_at(step)}


@contextmanager
def open_report(config: RunConfig, runtime: Runtime) -> Iterator[Reporter]:
    """Make the run folder and the sinks, on rank 0; the other ranks say nothing.

    Raises:
        OutputError: The run folder cannot be made.
        ConfigError: A sink that the configuration asks for is not installed.
    """
    report = _speaking(config, runtime) if runtime.rank == 0 else _silent(config, runtime)
    try:
        yield report
    except BaseException as error:
        report.fail(error)
        raise


def git_commit() -> str | None:
    """Return the commit of the working directory, ``+changes`` appended if files differ."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        return answer.stdout.strip() or None
    return None


def _speaking(config: RunConfig, runtime: Runtime) -> Reporter:
    progress = Progress()
    sinks: list[Sink] = [Journal(), progress, WeightsAndBiases(config.wandb, say=progress.say)]
    if config.log.tensorboard:
        sinks.append(TensorBoard(say=progress.say))
    folder = open_run_folder(config.output_dir, config.name)
    verdict = RunFolder(folder, dump_yaml(config))
    return Reporter(folder, verdict, Sinks(sinks), config, runtime.world_size)


def _silent(config: RunConfig, runtime: Runtime) -> Reporter:
    return Reporter(Path(), NoSink(), NoSink(), config, runtime.world_size)


def _number(value: Any) -> Any:
    """Strict JSON has no word for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
