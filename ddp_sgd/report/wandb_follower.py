"""Weights & Biases (W&B) logger: a subprocess that follows ``metrics.jsonl`` and logs its rows.

The trainer starts it (``wandb_logger``), and it logs on until the trainer has ended, or died. By
hand, ``python -m ddp_sgd.report.wandb_follower RUN`` completes a W&B run after a crash, or follows
a run that trains where there is no network. Rows that W&B has are left out (``wandb_position``).
"""

import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from ddp_sgd.config import RunConfig, WandbConfig, load_config
from ddp_sgd.console import (
    Parser,
    deliver,
    fill_descriptors,
    report_error,
    say,
    silent_descriptors,
)
from ddp_sgd.errors import ConfigError, DataError, ExitCode, OutputError, StoppedError, UserError
from ddp_sgd.report.folder_lock import OwnerWatch
from ddp_sgd.report.journal import FILE_NAME, JournalTail, first_row, has_journal
from ddp_sgd.report.wandb_position import NOWHERE, kept_id, lock_out_others, place_of, read_back
from ddp_sgd.text import first_line
from ddp_sgd.time_limits import scaled

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 10.0
"""How long wandb may try its server, which takes under a second on a good link, before the run goes
offline."""

UPLOAD_TIMEOUT_S = 20.0
"""How long wandb may go on uploading at the end."""

FINISH_TIMEOUT_S = 30.0
"""How long the subprocess may live on when the trainer is done or dead: an upload that runs into
its limit (20 s), or a run that ends while its server is still being tried (10 s, 2 s to give up,
1 s to go offline), and room for the last rows."""

FLUSH_INTERVAL_S = 0.2
"""How often wandb writes rows to its file; its own 15 s are what is read back and sent again."""

_POLL_S = 0.5
"""Time from one look at the journal to the next: wandb itself sends no more often."""

PROGRAM = "python -m ddp_sgd.report.wandb_follower"
"""How a user starts a follower."""

_BEST = "best/eval/accuracy"
_OUTCOME = ("status", "exit_code", "weights_digest")
_DISABLED = (
    "W&B is disabled by WANDB_MODE, WANDB_DISABLED or wandb's settings file; give --mode=online or "
    "--mode=offline."
)


class FollowRequest(NamedTuple):
    """What a follower is asked for, and what the files of the run folder do not say.

    Args:
        folder: The run folder.
        run_id: Identity of the run; W&B uses it, unless it has another one.
        resumed: Whether the run goes on, so that W&B may know it.
        mode: What to use instead of the mode of the configuration; None to use that.
        trainer: Process that trains, whose use of the machine W&B shows; None if it is elsewhere.
        argv: Its command line; empty if it is elsewhere.
        init_timeout_s: How long wandb may try its server before the run goes offline.
        upload_timeout_s: How long wandb may go on uploading at the end.
    """

    folder: str
    run_id: str
    resumed: bool
    mode: str | None
    trainer: int | None
    argv: list[str]
    init_timeout_s: float
    upload_timeout_s: float


def follow_trainer() -> None:
    """Serve the process that has started this one: log its run to W&B until it ends or dies."""
    control, held, lines = os.dup(0), os.dup(0), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    Thread(target=_leave_after_trainer, args=(held,), daemon=True).start()
    with suppress(Exception):  # found again, and reported, where the run is opened
        import wandb  # noqa: F401  # most of the work, while the trainer is still busy with torch
    with os.fdopen(control, "rb") as stream:
        line = stream.readline()
        if not line:  # there is no run after all
            return
        request = FollowRequest(*json.loads(line))
        sys.argv = request.argv
        os.environ.setdefault("WANDB_PROGRAM", request.argv[0])
        poll = select.poll()
        poll.register(stream, select.POLLIN)

        def report(text: str) -> None:
            with suppress(OSError):  # the trainer is dead
                print(text, file=lines)

        try:
            _Follower(request, report, lambda s: bool(poll.poll(1e3 * s))).run()
        # BaseException: wandb leaves by sys.exit when its helper process failed.
        except BaseException as error:
            report(f"stopped ({first_line(error)}); training goes on, metrics.jsonl has every row")


def _leave_after_trainer(descriptor: int) -> None:
    """End this process FINISH_TIMEOUT_S after the trainer, whatever hangs.

    Args:
        descriptor: Of its own, never closed: one that is closed at the end looks like a hang-up.
    """
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is reported unasked
    poll.poll()
    time.sleep(scaled(FINISH_TIMEOUT_S + 5.0))  # a trainer that lives ends this process before
    os._exit(1)


class _Follower:
    """One attempt of a run in W&B: opened, logged from the journal, closed.

    Args:
        request: What is asked for.
        report: Prints a line for the user.
        wait: Waits so many seconds; returns whether nothing more will be written.
    """

    def __init__(
        self, request: FollowRequest, report: Callable[[str], None], wait: Callable[[float], bool]
    ) -> None:
        self._request = request
        self._report = report
        self._wait = wait
        self._folder = Path(request.folder)
        self._config = load_config([f"--config={self._folder / 'config.yaml'}"], environ={})
        self._mode = request.mode or self._config.wandb.mode
        if request.trainer is None and self._mode == "disabled":  # while it trained
            self._mode = "auto"
        self._mark = self._folder / "wandb" / "last_row"

    def run(self) -> None:
        """Do all that touches wandb; raises whatever that raises."""
        # The helper of a run of the user's own is not for this one, and may end before.
        os.environ.pop("WANDB_SERVICE", None)
        # wandb's reports about itself leave from an exit hook of their own, which a silent server
        # holds for 20 s and whose failures are printed; only the environment turns them off.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            lock_out_others(self._folder / "wandb" / ".lock")
            run = self._open()
            if run is not None:
                self._log(run)
                self._close(run)
        finally:
            _tear_down()

    def _open(self) -> "wandb.Run | None":
        """Start the run online or, where that fails, offline; None if the user disabled wandb."""
        import wandb

        settings = self._set_up()
        if settings.mode == "disabled":
            if self._request.trainer is None:
                raise ConfigError(_DISABLED)
            return None
        arguments = self._init_arguments(settings)
        why = ""
        if settings.mode not in ("offline", "dryrun"):
            try:
                # Finds the key where wandb itself does, asks nobody for one and no server about it.
                if wandb.login(prompt=False, verify=False):
                    run = wandb.init(**arguments)
                    self._opened(run, f"online, {run.url}")
                    return run
                why = " (no API key)"
            except Exception as error:  # whatever it is, the run can go on offline
                why = f" ({first_line(error)})"
            _tear_down()
            self._set_up()
        run = wandb.init(**arguments, mode="offline")
        folder = Path(run.dir).parent
        self._opened(run, f"offline{why}, in {folder}; send it later: wandb sync {folder}")
        return run

    def _set_up(self) -> "wandb.Settings":
        """Start wandb's helper, silent; returns the user's settings with the mode of ours on top.

        The helper logs to stderr where it cannot write to the home folder, hence the descriptors.
        """
        import wandb

        mode: dict[str, Any] = {} if self._mode == "auto" else {"mode": self._mode}
        with silent_descriptors():
            return wandb.setup(wandb.Settings(silent=True, **mode)).settings

    def _init_arguments(self, settings: "wandb.Settings") -> dict[str, Any]:
        """Give the arguments of ``wandb.init``; None leaves a value to the user's own settings."""
        import wandb

        request, config = self._request, self._config.wandb
        kept = kept_id(self._folder) if request.resumed else None
        own = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=request.init_timeout_s,
            finish_timeout=request.upload_timeout_s,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
            x_stats_pid=request.trainer or os.getpid(),
            x_disable_stats=request.trainer is None,
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_save_requirements=False,
        )
        return {
            "dir": None if os.environ.get("WANDB_DIR") else request.folder,
            "id": kept or (None if settings.run_id else request.run_id),
            # Also offline: `wandb sync` follows it, and appends the rows to those of before.
            "resume": "allow" if request.resumed else None,
            "allow_val_change": True,
            "project": config.project or (None if settings.project else "ddp_sgd"),
            "name": config.name or (None if settings.run_name else self._config.name),
            "entity": config.entity,
            "group": config.group,
            "tags": config.tags or None,
            "config": _shown(self._config, self._folder),
            "settings": own,
        }

    def _opened(self, run: "wandb.Run", text: str) -> None:
        """Keep what a resumed run needs, and name the axes."""
        (self._folder / "wandb" / "run_id").write_text(f"{run.id}\n", encoding="utf-8")
        run.define_metric("step")
        run.define_metric("samples")
        run.define_metric("*", step_metric="step")
        self._report(text)

    def _log(self, run: "wandb.Run") -> None:
        """Log the rows of the journal that W&B does not have, until the run is over."""
        last, is_over = self._position(run), False
        best = shown = float("-inf")
        tail = JournalTail(self._folder / FILE_NAME)
        pause_s = 0.0
        while not is_over:
            is_over = self._wait(pause_s)  # before the look, so that this one is the last
            before, pause_s = last, _POLL_S
            for row in tail.read(is_over=is_over):
                if row.get("git_commit"):
                    commit = {"git_commit": row["git_commit"]}
                    run.config.update(commit, allow_val_change=True)  # type: ignore[no-untyped-call]
                place = place_of(row)
                if place is None:
                    continue
                numbers = _numbers(row)
                best = max(best, numbers.get("eval/accuracy", best))
                if place > last:
                    run.log(numbers, step=place, commit=True)
                    last = place
            if best > shown:
                run.summary[_BEST] = shown = best
            if last > before:
                with suppress(OSError):
                    self._mark.write_text(f"{last} {_wandb_file(run)}\n", encoding="utf-8")
        tail.close()

    def _position(self, run: "wandb.Run") -> int:
        """Give the place of the last row that W&B has, or will have after ``wandb sync``."""
        if not self._request.resumed:
            return NOWHERE
        place, is_online = read_back(_wandb_file(run), self._mark)
        if run.offline:
            return place
        on_server = run.starting_step - 1 if run.resumed else NOWHERE
        # What was on its way to a server when the process was killed has not come to it.
        return on_server if is_online else max(place, on_server)

    def _close(self, run: "wandb.Run") -> None:
        """Write how the run ended, and upload what is left for at most ``upload_timeout_s``."""
        result: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            result = json.loads((self._folder / "result.json").read_bytes())
        run.summary.update({key: result[key] for key in _OUTCOME if key in result})
        if result.get("status") == "stopped":
            run.mark_preempting()  # with an exit code other than 0 W&B shows it as preempted
        try:
            run.finish(exit_code=result.get("exit_code", ExitCode.PEER.value))
        except TimeoutError:
            limit, folder = self._request.upload_timeout_s, _wandb_file(run).parent
            self._report(f"not all sent after {limit:g} s; the rest: wandb sync {folder}")


def _shown(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Give what W&B shows as the configuration of the run."""
    try:
        plan = json.loads((folder / "plan.json").read_bytes())
        world_size = plan["world_size"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder / 'plan.json'} is not readable; name a run folder.") from error
    return {**config.model_dump(mode="json"), "plan": plan, "world_size": world_size}


def _wandb_file(run: "wandb.Run") -> Path:
    return Path(run.dir).parent / f"run-{run.id}.wandb"


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Keep the numbers of a row; its time becomes W&B's, since a row may have waited."""
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    if "time" in numbers:
        numbers["_timestamp"] = numbers.pop("time")
    return numbers


def is_disabled(config: WandbConfig) -> bool:
    """Whether the configuration or, where it leaves that open, the environment disables W&B."""
    if config.mode != "auto":
        return config.mode == "disabled"
    is_off = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return is_off or os.environ.get("WANDB_MODE") == "disabled"


def _tear_down() -> None:
    """End wandb's helper and take away wandb's exit hook, whatever state they are in."""
    # BaseException: it leaves by sys.exit when the helper failed; the user has been told.
    with suppress(BaseException):
        import wandb

        wandb.teardown()


def main(argv: Sequence[str] | None = None) -> int:
    """Complete the W&B run of a run folder, or follow a run that goes on; return the exit code.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
    """
    fill_descriptors()
    try:
        _follow_by_hand(argv)
    except UserError as error:
        report_error(error)
        return int(error.exit_code)
    return ExitCode.DONE


def _follow_by_hand(argv: Sequence[str] | None) -> None:
    parser = Parser(prog=PROGRAM, description="Send the journal of a run to W&B.")
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--mode", choices=("online", "offline"), help="instead of wandb.mode")
    try:
        asked = parser.parse_args(argv)
    except SystemExit:  # after --help
        return deliver("")
    if asked.mode is None and is_disabled(WandbConfig()):
        raise ConfigError(_DISABLED)
    if not has_journal(asked.folder):
        raise DataError(f"{asked.folder} is no folder with a {FILE_NAME}; name a run folder.")
    request = FollowRequest(
        folder=str(asked.folder.absolute()),
        run_id=first_row(asked.folder).get("run_id") or token_hex(4),
        resumed=True,
        mode=asked.mode,
        trainer=None,
        argv=[],
        init_timeout_s=scaled(INIT_TIMEOUT_S),
        upload_timeout_s=scaled(UPLOAD_TIMEOUT_S),
    )
    watch = OwnerWatch(asked.folder)
    try:
        _Follower(request, lambda text: say(f"W&B: {text}"), watch.wait_for_end).run()
    except KeyboardInterrupt:
        raise StoppedError("stopped by SIGINT; run it again to send the rest.") from None
    except BaseException as error:  # wandb leaves by sys.exit when its helper process failed
        if isinstance(error, UserError):
            raise
        raise OutputError(f"W&B is not complete ({first_line(error)}); run it again.") from error


if __name__ == "__main__":
    sys.exit(main())
