"""Weights & Biases (W&B) follower: logs every row of ``metrics.jsonl`` to W&B once.

As a subprocess of the trainer it logs on until the trainer has ended. By hand,
``python -m ddp_sgd.report.wandb_follower RUN`` completes a W&B run after a crash, or follows a run
that trains where there is no network.

A row's place in the run is its ``_step`` in W&B. Rows up to the last one that W&B has are left out;
that one is read back from wandb's newest file of the run, or from the server.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from glob import escape
from pathlib import Path
from secrets import token_hex
from threading import Thread
from typing import TYPE_CHECKING, Any

from ddp_sgd.console import Parser, deliver, fill_descriptors, report_error, say
from ddp_sgd.errors import DataError, ExitCode, OutputError, RefusedError, StoppedError, UserError
from ddp_sgd.host import scaled
from ddp_sgd.report.folder_lock import OwnerWatch, lock_file
from ddp_sgd.report.journal import FILE_NAME, JournalTail, first_row, has_journal, place_of
from ddp_sgd.report.wandb_logger import (
    FINISH_TIMEOUT_S,
    PROGRAM,
    WandbRun,
    kept_id,
    tear_down,
    wandb_file,
)
from ddp_sgd.scores import choosing_score
from ddp_sgd.text import first_line

if TYPE_CHECKING:
    import wandb

NOWHERE = -1
"""The place before every row."""

_POLL_S = 0.5
"""Time from one look at the journal to the next: wandb itself sends no more often."""

_LOCK_TIMEOUT_S = 40.0
"""How long to wait for another follower, which may outlive its trainer by FINISH_TIMEOUT_S."""


def follow_trainer() -> None:
    """Log the run of the process that has started this one to W&B, until that ends."""
    trainer = os.getppid()
    control, held, lines = os.dup(0), os.dup(0), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    Thread(target=_leave_after_trainer, args=(held,), daemon=True).start()
    with suppress(Exception):  # found again, and reported, where the run is opened
        import wandb  # noqa: F401  # most of the work, while the trainer is still busy with torch
    with os.fdopen(control, "rb") as stream:
        line = stream.readline()
        if not line:  # there is no run after all
            return
        request = json.loads(line)
        sys.argv = request.pop("argv")
        os.environ.setdefault("WANDB_PROGRAM", sys.argv[0])
        poll = select.poll()
        poll.register(stream, select.POLLIN)

        def wait(seconds: float) -> bool:
            return bool(poll.poll(1e3 * seconds))

        def report(text: str) -> None:
            with suppress(OSError):  # the trainer has ended
                print(text, file=lines)

        try:
            follow(WandbRun(**request, trainer=trainer, report=report), wait)
        # BaseException: wandb leaves by sys.exit when its helper process failed.
        except BaseException as error:
            report(f"stopped ({first_line(error)}); training goes on, metrics.jsonl has every row")


def _leave_after_trainer(descriptor: int) -> None:
    """End this process FINISH_TIMEOUT_S after the trainer, even if it hangs.

    Args:
        descriptor: Of its own, never closed: one that is closed at the end looks like a hang-up.
    """
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is always reported
    poll.poll()
    time.sleep(scaled(FINISH_TIMEOUT_S + 5.0))  # a trainer that still runs ends this process before
    os._exit(1)


def follow(attempt: WandbRun, wait: Callable[[float], bool]) -> None:
    """Log the rows of a run to W&B until it is over; raises wandb's errors.

    Args:
        attempt: The run in W&B, to be opened.
        wait: Waits so many seconds; returns whether nothing more will be written.
    """
    # The helper of a run of the user's own is not for this one, and may end before.
    os.environ.pop("WANDB_SERVICE", None)
    # wandb's reports about itself leave from an exit hook of their own, which a stalled server
    # holds for 20 s and whose failures are printed; only the environment turns them off.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        lock_out_others(attempt.folder / "wandb" / ".lock")
        # On a busy machine the process of a later attempt may have come first.
        attempt.is_resumed |= kept_id(attempt.folder) == attempt.run_id
        run = attempt.open()
        if run is not None:
            _log_rows(attempt, run, wait)
            attempt.close(run)
    finally:
        tear_down()


def _log_rows(attempt: WandbRun, run: "wandb.Run", wait: Callable[[float], bool]) -> None:
    """Log the rows of the journal that W&B does not have, until the run is over."""
    mark = attempt.folder / "wandb" / "last_row"
    last, is_over = _position(attempt, run, mark), False
    best: dict[str, float] = {}
    shown: dict[str, float] = {}
    tail = JournalTail(attempt.folder / FILE_NAME)
    pause_s = 0.0
    while not is_over:
        is_over = wait(pause_s)  # before the look, so that this one is the last
        before, pause_s = last, _POLL_S
        for row in tail.read(is_over=is_over):
            if row.get("git_commit"):
                commit = {"git_commit": row["git_commit"]}
                run.config.update(commit, allow_val_change=True)  # type: ignore[no-untyped-call]
            place = place_of(row)
            if place is None:
                continue
            numbers = _numbers(row)
            best |= _best_accuracy(row, best)
            if place > last:
                run.log(numbers, step=place, commit=True)
                last = place
        if best != shown:
            run.summary.update(best)
            shown = dict(best)
        if last > before:
            with suppress(OSError):
                mark.write_text(f"{last} {wandb_file(run)}\n", encoding="utf-8")
    tail.close()


def _best_accuracy(row: Mapping[str, Any], best: Mapping[str, float]) -> dict[str, float]:
    """Give the best accuracy so far of the held-out set that chooses, such as best/eval/accuracy.

    Args:
        row: A row; of one without an accuracy nothing is given.
        best: The best one before.
    """
    name = choosing_score(row)
    accuracy = row.get(name) if name.endswith("/accuracy") else None
    if not isinstance(accuracy, (int, float)):
        return {}
    return {f"best/{name}": max(accuracy, best.get(f"best/{name}", accuracy))}


def _position(attempt: WandbRun, run: "wandb.Run", mark: Path) -> int:
    """Give the place of the last row that W&B has, or will have after ``wandb sync``."""
    if not attempt.is_resumed:
        return NOWHERE
    place, is_online = read_back(wandb_file(run), mark)
    if run.offline:
        return place
    on_server = run.starting_step - 1 if run.resumed else NOWHERE
    # What was on its way to a server when the process was killed has not come to it.
    return on_server if is_online else max(place, on_server)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Keep the numbers of a row; its time becomes W&B's, since a row may have waited."""
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    if "time" in numbers:
        numbers["_timestamp"] = numbers.pop("time")
    return numbers


def lock_out_others(path: Path) -> None:
    """Lock out other followers of a run until this process and wandb's helper have ended.

    Else another one could begin before all rows of this one are where they can be read back. The
    lock file becomes stdin, which the helper inherits. Where the file system has no locks, all go
    on without.

    Raises:
        OutputError: The lock file cannot be made.
        RefusedError: Another follower does not end, or the lock file is a link.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = lock_file(path, scaled(_LOCK_TIMEOUT_S))
    except BlockingIOError:
        raise RefusedError(
            f"{path.parent} is in use by another process that sends this run to W&B; wait for its "
            "end."
        ) from None
    except OSError as error:
        raise OutputError(f"{path} is not writable ({error.strerror}); see to that.") from error
    if descriptor is not None:
        os.dup2(descriptor, 0)
        os.close(descriptor)


def read_back(current: Path, mark: Path) -> tuple[int, bool]:
    """Find the last row that earlier attempts gave to W&B.

    Clocks, time zones and copies change the order of files by name or by time: the newest by either
    counts, and so does that of the mark, where they went if WANDB_DIR was another.

    Args:
        current: wandb's file of this attempt.
        mark: Hint of ours: a place and the file of that row; if the file is gone the place counts.

    Returns:
        The place of the row, and whether the attempt was online.
    """
    files = {
        file
        for file in current.parent.parent.glob(f"*/{escape(current.name)}")
        if file != current and not file.parent.is_symlink()
    }
    found = [(NOWHERE, current)]
    with suppress(OSError, ValueError):
        number, name = mark.read_text(encoding="utf-8").split(maxsplit=1)
        marked = Path(name.strip())
        if marked.is_file():
            files.add(marked)
        else:
            found = [(int(number), marked)]
    by_name = sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))
    by_time = sorted(files, key=lambda file: file.stat().st_mtime)
    last_place = cache(_last_place)
    for oldest_first in (by_name, by_time):
        newest_first = ((last_place(file), file) for file in reversed(oldest_first))
        found.append(next((row for row in newest_first if row[0] > NOWHERE), found[0]))
    place, file = max(found)
    return place, not file.parent.name.startswith("offline-")


def _last_place(file: Path) -> int:
    """Read the last row in a file of wandb's, by its own reader; a torn end counts as no row.

    Raises:
        OutputError: The reader fails. To send all rows again could show them twice.
    """
    from wandb.util import get_core_path

    # What `wandb leet inspect --json FILE` starts, which takes a second of imports for each file:
    # a run that was killed over and over has many, and the follower little time.
    options = ["--no-observability", "--json", "--run-file", str(file.absolute())]
    command = [get_core_path(), "leet", "inspect", *options, str(file.absolute().parent.parent)]
    null, pipe, last = subprocess.DEVNULL, subprocess.PIPE, b""
    with subprocess.Popen(command, stdin=null, stdout=pipe, stderr=null) as reader:
        for line in reader.stdout or ():
            if b'"type":"history"' in line:
                last = line
    if reader.returncode:
        raise OutputError(f"{file} is not readable by wandb; move it out of the run folder.")
    return int(json.loads(last)["history"]["item"]["_step"]) if last else NOWHERE


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
    if not has_journal(asked.folder):
        raise DataError(f"{asked.folder} is no folder with a {FILE_NAME}; name a run folder.")
    attempt = WandbRun(
        folder=asked.folder.absolute(),
        run_id=first_row(asked.folder).get("run_id") or token_hex(4),
        is_resumed=True,
        report=lambda text: say(f"W&B: {text}"),
        mode=asked.mode,
    )
    try:
        follow(attempt, OwnerWatch(asked.folder).wait_for_end)
    except KeyboardInterrupt:
        raise StoppedError("stopped by SIGINT; run it again to send the rest.") from None
    except BaseException as error:  # wandb leaves by sys.exit when its helper process failed
        if isinstance(error, UserError):
            raise
        raise OutputError(f"W&B is not complete ({first_line(error)}); run it again.") from error


if __name__ == "__main__":
    sys.exit(main())
