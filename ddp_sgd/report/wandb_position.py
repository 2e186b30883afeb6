"""The position of a W&B run: the last row that W&B has of it, and the lock under which that holds.

A row's place in the run is its internal step, ``_step``; rows up to the last one that W&B has are
left out. That one is read back from wandb's newest file of the run. A follower holds a lock that
wandb's helper process inherits, so that no other one begins before all rows of the one before are
where they can be read back.
"""

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

from ddp_sgd.errors import OutputError, RefusedError
from ddp_sgd.host import scaled

NOWHERE = -1
"""The place before every row."""

_LOCK_TIMEOUT_S = 40.0
"""How long to wait for another follower, which may take FINISH_TIMEOUT_S after its trainer."""


def place_of(row: Mapping[str, Any]) -> int | None:
    """Number a row of training or evaluation by its place in the run, the same after every resume.

    Returns:
        ``2 * samples``, plus 1 for an evaluation, which comes after the row of training of the same
        samples; None for any other row.
    """
    event, samples = row.get("event"), row.get("samples")
    if event not in ("train", "eval"):
        return None
    return 2 * (samples if isinstance(samples, int) else 0) + int(event == "eval")


def kept_id(folder: Path) -> str | None:
    """Read the id that W&B knows the run of a run folder by; None if none was kept."""
    try:
        return (folder / "wandb" / "run_id").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def lock_out_others(path: Path) -> None:
    """Lock out other followers of a run until this process and wandb's helper have ended.

    The lock file becomes stdin, which the helper inherits. Where the file system has no locks, all
    go on without.

    Raises:
        OutputError: The lock file cannot be made.
        RefusedError: Another follower does not end.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise OutputError(f"{path} is not writable ({error.strerror}); see to that.") from error
    os.dup2(descriptor, 0)
    os.close(descriptor)
    deadline = time.monotonic() + scaled(_LOCK_TIMEOUT_S)
    while True:
        try:
            return fcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"{path.parent} is in use by another process that sends this run to W&B; wait "
                    "for its end."
                ) from None
        except OSError:
            return None
        time.sleep(0.1)


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
    found: dict[Path, int] = {}
    files = {
        file
        for file in current.parent.parent.glob(f"*/{escape(current.name)}")
        if file != current and not file.parent.is_symlink()
    }
    with suppress(OSError, ValueError):
        number, name = mark.read_text(encoding="utf-8").split(maxsplit=1)
        marked = Path(name.strip())
        if marked.is_file():
            files.add(marked)
        else:
            found[marked] = int(number)
    by_name = sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))
    for order in (by_name, sorted(files, key=lambda file: file.stat().st_mtime)):
        for file in reversed(order):
            if file not in found:
                found[file] = _last_place(file)
            if found[file] > NOWHERE:
                break
    place, file = max(((place, file) for file, place in found.items()), default=(NOWHERE, current))
    return place, not file.parent.name.startswith("offline-")


def _last_place(file: Path) -> int:
    """Read the last row in a file of wandb's, by its own reader; a torn end counts as no row.

    Raises:
        OutputError: The reader fails. To send all rows again could show them twice.
    """
    # What `wandb leet inspect --json FILE` starts, which takes a second of imports for each file:
    # a run that was killed over and over has many, and the follower little time.
    options = ["--no-observability", "--json", "--run-file", str(file.absolute())]
    command = [_core(), "leet", "inspect", *options, str(file.absolute().parent.parent)]
    null, pipe, last = subprocess.DEVNULL, subprocess.PIPE, b""
    with subprocess.Popen(command, stdin=null, stdout=pipe, stderr=null) as reader:
        for line in reader.stdout or ():
            if b'"type":"history"' in line:
                last = line
    if reader.returncode:
        raise OutputError(f"{file} is not readable by wandb; move it out of the run folder.")
    return int(json.loads(last)["history"]["item"]["_step"]) if last else NOWHERE


def _core() -> str:
    from wandb.util import get_core_path

    return str(get_core_path())
