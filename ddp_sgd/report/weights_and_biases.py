"""Weights & Biases as a view of the run, which can neither delay, hang nor stop it.

The training thread only puts rows on a queue. A daemon thread imports wandb, opens the run, logs
and closes it; what fails there ends in one line for the user, and training goes on. The journal is
the truth.

A resumed run goes on in the same W&B run and leaves out the rows that W&B has. A row's place in the
run is its internal step, ``_step``; the last one is told by the server, or by ``wandb/last_row``.

A process that is killed loses the rows in its queue and those that wandb's helper, which ends with
it, has not yet written to its file (FLUSH_INTERVAL_S) or sent. A resumed run sends again what the
server lacks, not what the file lacks. A kill between a row and its mark makes the row come twice.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.report.row_mark import NO_BEST, NOWHERE, RowMark, place_of
from ddp_sgd.report.sink import Row, RunRecord
from ddp_sgd.report.wandb_arguments import init_arguments

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 10.0
"""How long wandb may try its server, which takes under a second on a good link, before the run goes
offline."""

UPLOAD_TIMEOUT_S = 20.0
"""How long wandb may go on uploading at the end."""

FINISH_TIMEOUT_S = 30.0
"""How long ``finish`` waits for the thread: an upload that runs into its limit (20 s), or a run
that ends while its server is still being tried (10 s, 2 s to give up, 1 s to go offline), and room
for the rows still in the queue."""

IMPORT_TIMEOUT_S = 5.0
"""How long a fork waits for ``import wandb``, which takes about half a second."""

MOST_ROWS = 20_000
"""Rows that may wait: some 20 MB, which a thousand rows a second drain within FINISH_TIMEOUT_S."""

FLUSH_INTERVAL_S = 0.2
"""How often wandb writes rows to its file; its own 15 s are what a killed run would lose."""

_EVENTS = ("train", "eval")
_BEST = "best/eval/accuracy"
_OUTCOME = ("status", "exit_code", "weights_digest")


class WeightsAndBiases:
    """Sends rows to W&B, or keeps them for ``wandb sync`` where there is no server or no key.

    Processes that are forked (the workers of a DataLoader) have no part in it: they do not inherit
    the thread, and must not write. A fork waits while wandb is being imported, since the child
    would inherit half-made modules whose locks nobody ever opens.

    Args:
        config: Section ``wandb`` of the configuration.
        say: Prints one plain line for the user; it is called from the sink's own thread as well.
    """

    def __init__(self, config: WandbConfig, *, say: Callable[[str], None]) -> None:
        """Keep the configuration; nothing is imported or started yet."""
        self._config = config
        self._tell_user = say
        self._queue: SimpleQueue[tuple[str, Mapping[str, Any]]] = SimpleQueue()
        self._thread: Thread | None = None
        self._imported = Event()
        self._folder = Path()
        self._over = Event()
        self._abandoned = False
        self._dropped = False

    def start(self, record: RunRecord) -> None:
        """Start the thread that opens the run, unless W&B is disabled."""
        asked = os.environ.get("WANDB_MODE") if self._config.mode == "auto" else self._config.mode
        if asked == "disabled":
            return
        self._folder = record.folder / "wandb"
        # wandb's reports about itself leave from an exit hook of their own, which a silent server
        # holds for 20 s and whose failures are printed; only the environment turns them off.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.register_at_fork(before=partial(self._imported.wait, IMPORT_TIMEOUT_S))
        thread = Thread(target=self._work, args=(record,), name="wandb sink", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left for us
            self._imported.set()
            self._say(f"not started ({_reason(error)}); metrics.jsonl has every row")
        else:
            self._thread = thread

    def write(self, event: str, row: Row) -> None:
        """Queue a row of training or evaluation; never waits."""
        if event not in _EVENTS or self._thread is None or self._over.is_set():
            return
        if self._queue.qsize() < MOST_ROWS:
            self._queue.put((event, row))
        elif not self._dropped:
            self._dropped = True
            self._say(f"more than {MOST_ROWS} rows wait; rows are left out, metrics.jsonl has them")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close the run, and wait for that at most ``FINISH_TIMEOUT_S``."""
        if self._thread is None:
            return
        self._queue.put(("end", result))
        self._thread.join(FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            self._abandon()

    def _say(self, text: str) -> None:
        if not self._abandoned:
            self._tell_user(f"W&B: {text}")

    def _abandon(self) -> None:
        """Let the process end without wandb.

        wandb's exit hook waits for its helper process without a limit. ``wandb.teardown`` takes the
        hook away before it waits, so that a daemon thread that calls it frees the interpreter.
        """
        self._say(
            f"not finished after {FINISH_TIMEOUT_S:g} s; send the rest: wandb sync {self._folder}"
        )
        self._abandoned = True
        thread = Thread(target=_tear_down, name="wandb teardown", daemon=True)
        thread.start()
        thread.join(1.0)  # the hook goes in the first millisecond; the rest may never end

    def _work(self, record: RunRecord) -> None:
        """Do all that touches wandb: import, open, log, close."""
        try:
            try:
                import wandb  # noqa: F401  half a second, here where nobody waits for it
            finally:
                self._imported.set()
            run = self._open(record)
            if run is not None:
                mark = RowMark(record.folder / "wandb" / "last_row", resumed=record.resumed)
                self._close(run, self._log_until_end(run, mark))
        # BaseException: wandb leaves by sys.exit when its helper process failed.
        except BaseException as error:
            self._say(f"stopped ({_reason(error)}); training goes on, metrics.jsonl has every row")
        self._over.set()
        _tear_down()

    def _open(self, record: RunRecord) -> "wandb.Run | None":
        """Start the run online or, where that fails, offline; None if the user disabled wandb."""
        import wandb

        settings = _set_up(self._config)
        if settings.mode == "disabled":
            return None
        arguments = init_arguments(self._config, settings, record)
        offline = settings.mode in ("offline", "dryrun")
        why = ""
        if not offline:
            try:
                # Finds the key where wandb itself does, asks nobody for one and no server about it.
                if wandb.login(prompt=False, verify=False):
                    run = wandb.init(**arguments, settings=_run_settings())
                    self._opened(run, f"online, {run.url}")
                    return run
                why = " (no API key)"
            except Exception as error:  # whatever it is, the run can go on offline
                why = f" ({_reason(error)})"
            _tear_down()
            _set_up(self._config)
        run = wandb.init(**arguments, mode="offline", settings=_run_settings())
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

    def _log_until_end(self, run: "wandb.Run", mark: RowMark) -> Mapping[str, Any]:
        """Log rows that W&B does not have as they come; returns the result that ends them."""
        on_server = run.starting_step - 1 if run.resumed else NOWHERE
        last = mark.reached(None if run.offline else on_server)
        best = mark.best
        if best > NO_BEST:  # offline wandb knows no earlier life, and `wandb sync` replaces it
            run.summary[_BEST] = best
        while True:
            event, row = self._queue.get()
            if event == "end":
                mark.close()
                return row
            place = place_of(event, row)
            if place <= last:
                continue
            run.log(_numbers(row), step=place, commit=True)
            accuracy = row.get("eval/accuracy")
            if isinstance(accuracy, (int, float)) and accuracy > best:
                run.summary[_BEST] = best = accuracy
            mark.put(place, online=not run.offline, best=best)
            last = place

    def _close(self, run: "wandb.Run", result: Mapping[str, Any]) -> None:
        """Write how the run ended, and upload what is left for at most ``UPLOAD_TIMEOUT_S``."""
        run.summary.update({key: result[key] for key in _OUTCOME if key in result})
        if result.get("status") == "stopped":
            run.mark_preempting()  # with an exit code other than 0 W&B shows it as preempted
        try:
            run.finish(exit_code=result.get("exit_code", 0))
        except TimeoutError:
            self._say(
                f"not all sent after {UPLOAD_TIMEOUT_S:g} s; the rest: wandb sync {self._folder}"
            )


def _set_up(config: WandbConfig) -> "wandb.Settings":
    """Start wandb's helper, silent; returns the user's settings with the mode of ours on top."""
    import wandb

    mode: dict[str, Any] = {} if config.mode == "auto" else {"mode": config.mode}
    return wandb.setup(wandb.Settings(silent=True, **mode)).settings


def _tear_down() -> None:
    """End wandb's helper and take away wandb's exit hook, whatever state they are in."""
    try:
        import wandb

        wandb.teardown()
    # BaseException: it leaves by sys.exit when the helper failed; the user has been told.
    except BaseException:
        pass


def _run_settings() -> "wandb.Settings":
    """Bounded, silent, and no copy of the user's code, changes or environment."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        reinit="create_new",  # a run of the user's own stays the current one
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=UPLOAD_TIMEOUT_S,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_save_requirements=False,
    )


def _numbers(row: Row) -> dict[str, float]:
    """Keep the numbers of a row; its time becomes W&B's, since a row may wait in the queue."""
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    if "time" in numbers:
        numbers["_timestamp"] = numbers.pop("time")
    return numbers


def _reason(error: BaseException) -> str:
    """Give the first line of an error; wandb's later lines are advice for its own callers."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
