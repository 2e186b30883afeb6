"""The process in which W&B runs, so that neither its import nor its rows take time from training.

Rank 0 sends pickled messages through stdin: an ``Opening``, then pairs of an event and its row, the
last one ``end`` with the result. What goes back through stdout are lines for the user.

A resumed run goes on in the same W&B run and leaves out the rows that W&B has. A row's place in the
run is its internal step, ``_step``; the last one is told by the server, or by ``wandb/last_row``.

If the rank is killed, this process ends at once, and wandb's helper with it: the next life of the
run may open the same W&B run within seconds. Rows on their way, and those that the helper has not
yet written to its file (FLUSH_INTERVAL_S) or sent, are lost. A resumed run sends again what the
server lacks, not what the file lacks. A kill between a row and its mark makes the row come twice.
"""

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ddp_sgd.child_process import serve_the_rank
from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.report.logger import EventRow, Row, RunRecord
from ddp_sgd.report.row_mark import NO_BEST, NOWHERE, RowMark, place_of
from ddp_sgd.report.wandb_arguments import init_arguments, run_settings, set_up

if TYPE_CHECKING:
    import wandb

_BEST = "best/eval/accuracy"
_OUTCOME = ("status", "exit_code", "weights_digest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the process is told first.

    Args:
        config: Section ``wandb`` of the configuration.
        record: What is known about the run.
        rank_pid: The process that trains, whose use of the machine W&B shows.
        argv: Its command line.
        init_timeout_s: How long wandb may try its server before the run goes offline.
        upload_timeout_s: How long wandb may go on uploading at the end.
    """

    config: WandbConfig
    record: RunRecord
    rank_pid: int
    argv: list[str]
    init_timeout_s: float
    upload_timeout_s: float


def main() -> None:
    """Serve rank 0 until it says that the run is over, or is gone."""
    said, told = serve_the_rank()
    messages, lines = os.fdopen(said, "rb"), os.fdopen(told, "w", buffering=1)
    # The helper of a run of the user's own is not for this one, and may end before.
    os.environ.pop("WANDB_SERVICE", None)
    # wandb's reports about itself leave from an exit hook of their own, which a silent server
    # holds for 20 s and whose failures are printed; only the environment turns them off.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with suppress(Exception):  # found again, and told, where the run is opened
        import wandb  # noqa: F401  # most of the work, while the rank is still busy with torch
    opening = pickle.load(messages)
    sys.argv = opening.argv
    os.environ.setdefault("WANDB_PROGRAM", opening.argv[0])
    _Life(opening, say=lambda line: print(line, file=lines)).run(_read(messages))


def _read(messages: BinaryIO) -> Iterator[EventRow]:
    try:
        while True:
            yield pickle.load(messages)
    except EOFError:  # the other thread is about to find out
        os._exit(1)


class _Life:
    """One life of a run in W&B: opened, logged, closed; whatever fails ends in one line.

    Args:
        opening: What the rank said first.
        say: Gives a line to the user.
    """

    def __init__(self, opening: Opening, *, say: Callable[[str], None]) -> None:
        self._opening = opening
        self._say = say
        self._folder = opening.record.folder / "wandb"

    def run(self, messages: Iterator[EventRow]) -> None:
        """Do all that touches wandb."""
        record = self._opening.record
        try:
            run = self._open()
            if run is not None:
                mark = RowMark(record.folder / "wandb" / "last_row", resumed=record.resumed)
                self._close(run, _log_until_end(run, mark, messages))
        # BaseException: wandb leaves by sys.exit when its helper process failed.
        except BaseException as error:
            self._say(f"stopped ({_reason(error)}); training goes on, metrics.jsonl has every row")
        _tear_down()

    def _open(self) -> "wandb.Run | None":
        """Start the run online or, where that fails, offline; None if the user disabled wandb."""
        import wandb

        opening = self._opening
        settings = set_up(opening.config)
        if settings.mode == "disabled":
            return None
        arguments = init_arguments(opening.config, settings, opening.record)

        def init(**mode: Any) -> "wandb.Run":
            own = run_settings(
                opening.init_timeout_s, opening.upload_timeout_s, rank_pid=opening.rank_pid
            )
            return wandb.init(**arguments, **mode, settings=own)

        why = ""
        if settings.mode not in ("offline", "dryrun"):
            try:
                # Finds the key where wandb itself does, asks nobody for one and no server about it.
                if wandb.login(prompt=False, verify=False):
                    run = init()
                    self._opened(run, f"online, {run.url}")
                    return run
                why = " (no API key)"
            except Exception as error:  # whatever it is, the run can go on offline
                why = f" ({_reason(error)})"
            _tear_down()
            set_up(opening.config)
        run = init(mode="offline")
        folder = Path(run.dir).parent
        self._opened(run, f"offline{why}, in {folder}; send it later: wandb sync {folder}")
        return run

    def _opened(self, run: "wandb.Run", text: str) -> None:
        """Keep what a resumed run and a late ``wandb sync`` need, and name the axes."""
        (self._folder / "run_id").write_text(f"{run.id}\n", encoding="utf-8")
        self._folder = Path(run.dir).parent
        run.define_metric("step")
        run.define_metric("samples")
        run.define_metric("*", step_metric="step")
        self._say(text)

    def _close(self, run: "wandb.Run", result: Mapping[str, Any]) -> None:
        """Write how the run ended, and upload what is left for at most ``upload_timeout_s``."""
        run.summary.update({key: result[key] for key in _OUTCOME if key in result})
        if result.get("status") == "stopped":
            run.mark_preempting()  # with an exit code other than 0 W&B shows it as preempted
        try:
            run.finish(exit_code=result.get("exit_code", 0))
        except TimeoutError:
            limit = f"{self._opening.upload_timeout_s:g} s"
            self._say(f"not all sent after {limit}; the rest: wandb sync {self._folder}")


def _log_until_end(
    run: "wandb.Run", mark: RowMark, messages: Iterator[EventRow]
) -> Mapping[str, Any]:
    """Log rows that W&B does not have as they come; returns the result that ends them."""
    on_server = run.starting_step - 1 if run.resumed else NOWHERE
    last = mark.reached(None if run.offline else on_server)
    best = mark.best
    if best > NO_BEST:  # offline wandb knows no earlier life, and `wandb sync` replaces it
        run.summary[_BEST] = best
    for event, row in messages:
        if event == "end":
            break
        place = place_of(event, row)
        if place <= last:
            continue
        run.log(_numbers(row), step=place, commit=True)
        accuracy = row.get("eval/accuracy")
        if isinstance(accuracy, (int, float)) and accuracy > best:
            run.summary[_BEST] = best = accuracy
        mark.put(place, online=not run.offline, best=best)
        last = place
    mark.close()
    return row


def _tear_down() -> None:
    """End wandb's helper and take away wandb's exit hook, whatever state they are in."""
    # BaseException: it leaves by sys.exit when the helper failed; the user has been told.
    with suppress(BaseException):
        import wandb

        wandb.teardown()


def _numbers(row: Row) -> dict[str, float]:
    """Keep the numbers of a row; its time becomes W&B's, since a row may have waited."""
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    if "time" in numbers:
        numbers["_timestamp"] = numbers.pop("time")
    return numbers


def _reason(error: BaseException) -> str:
    """Give the first line of an error; wandb's later lines are advice for its own callers."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
