"""File lock of a run folder, and an owner note for hosts that the lock does not reach.

``flock`` on a folder is local to one host on NFS, and some network file systems have no locks at
all or keep them on each host. So a regular file is locked, and a note beside it names the
owner of the folder. The owner renews the note; a start on another host watches whether it does.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple, Self

from ddp_sgd.distributed.environment import times_requeued
from ddp_sgd.errors import RefusedError
from ddp_sgd.files import is_missing, retry
from ddp_sgd.host import scaled

LOCK_NAME = ".lock"
"""File that is locked. It stays, empty: to remove a lock file may remove that of another run."""

OWNER_NAME = ".owner.json"
"""The owner note; removed at the end of a run."""

RENEW_S = 5.0
"""Time between two renewals of the owner note."""

SILENT_RENEWALS = 3
"""Missed renewals after which the owner of a note counts as ended."""

_PATIENCE_S = scaled(10.0)
"""Longest wait for another run to leave the folder: a rank that lost its launcher saves first."""

_POLL_S = 0.05

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Owner(NamedTuple):
    """A process that has a run folder for itself.

    Args:
        host: Name of its host.
        boot: Identity of the running kernel, for hosts of one name; empty where there is none.
        pid: Number of the process.
        job: Its SLURM job; None outside of SLURM.
        restarts: How often that job was requeued before.
        token: Identifies this use of the folder.
    """

    host: str
    boot: str
    pid: int
    job: str | None
    restarts: int
    token: str

    @classmethod
    def here(cls, environ: Mapping[str, str]) -> Self:
        """Describe this process."""
        boot = ""
        with suppress(OSError):
            boot = _BOOT_ID.read_text().strip()
        job = environ.get("SLURM_JOB_ID") or None
        restarts, token = times_requeued(environ), token_hex(4)
        return cls(socket.gethostname(), boot, os.getpid(), job, restarts, token)

    def shares_locks_with(self, other: "Owner") -> bool:
        """Whether both run under one kernel, so that neither misses a lock of the other."""
        return (self.host, self.boot) == (other.host, other.boot)

    def succeeds(self, other: "Owner") -> bool:
        """Whether this is a later attempt of the same SLURM job, which has only one at a time."""
        return self.job is not None and self.job == other.job and self.restarts > other.restarts

    def __str__(self) -> str:
        return f"process {self.pid}{f' of job {self.job}' if self.job else ''} on {self.host}"


class FolderLock:
    """Keeps other runs out of a folder, from its making to ``release``.

    The system takes the lock back if this process dies. The note stays then: a start under the same
    kernel goes by the lock, and so does the next attempt of the same SLURM job; any other
    waits ``SILENT_RENEWALS * RENEW_S`` for the note to be renewed before it takes over.

    Args:
        folder: An existing folder.
        patience_s: Longest wait for another run to leave it; None for that of a start.

    Raises:
        RefusedError: Another run has it and does not give it up, or a link is in the way.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, *, patience_s: float | None = None) -> None:
        self._folder = folder
        self._owner = Owner.here(os.environ)
        self._taken_over_by: Owner | None = None
        self._over = threading.Event()
        try:
            patience_s = _PATIENCE_S if patience_s is None else patience_s
            self._descriptor = lock_file(folder / LOCK_NAME, patience_s)
        except BlockingIOError:
            raise _in_use(folder) from None
        try:
            _wait_for_owner(folder, self._owner, is_locked=self._descriptor is not None)
            with suppress(FileNotFoundError):
                (folder / OWNER_NAME).unlink()
            self._write(os.O_CREAT | os.O_EXCL)
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(
            target=self._keep_renewing, name="ddp_sgd-owner-note", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise if another run took the folder over, since the note was not renewed in time.

        Raises:
            RefusedError: The folder is no longer that of this process, which was suspended, or cut
                off from the disk, for too long.
        """
        if self._taken_over_by is not None:
            raise RefusedError(
                f"{self._folder} is in use by {self._taken_over_by} now, which took it over when "
                "this process did not renew its owner note; let that run end, or choose another "
                "name."
            )

    def follow(self, folder: Path) -> None:
        """Take note that the folder was renamed; it is renewed no more.

        Args:
            folder: Its new name.
        """
        self._stop()
        self._folder = folder

    def release(self) -> None:
        """Release the folder. In a process that was forked this only closes its descriptor."""
        if os.getpid() == self._owner.pid and self._descriptor != -1:
            self._stop()
            with suppress(OSError):
                note = _read(self._folder)
                if self._taken_over_by is None and note and note.owner == self._owner:
                    (self._folder / OWNER_NAME).unlink()
        self._close()

    def _stop(self) -> None:
        self._over.set()
        self._thread.join(RENEW_S)  # a disk that hangs holds up the thread, not the end of the run

    def _close(self) -> None:
        """Close the lock file; ``-1`` marks a lock that was released."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor is not None and descriptor != -1:
            os.close(descriptor)

    def _keep_renewing(self) -> None:
        while not self._over.wait(RENEW_S):
            with suppress(OSError, RefusedError):  # the next time is soon enough
                self._renew()

    def _renew(self) -> None:
        note = _read(self._folder)
        if note and note.owner not in (None, self._owner):
            self._taken_over_by = note.owner
            self._over.set()
        else:
            self._write(os.O_CREAT)

    def _write(self, flags: int) -> None:
        """Write the note in place, by its name: that is what others read."""
        text = json.dumps({**self._owner._asdict(), "renewed": round(time.time(), 3)}) + "\n"
        descriptor = _open(self._folder / OWNER_NAME, os.O_WRONLY | flags)
        try:
            os.pwrite(descriptor, text.encode(), 0)
            os.ftruncate(descriptor, len(text.encode()))
        finally:
            os.close(descriptor)  # on NFS this is what sends it to the server


class OwnerWatch:
    """Liveness of the run that owns a run folder, seen from any host, by its owner note.

    Nothing depends on clocks, which differ between hosts: only changes of the note count.

    Args:
        folder: The run folder.
        here: This process; None describes it.

    Attributes:
        owner: The owner in the note at the last look; None if there was none.
        renewals: How often the note was seen to change.
    """

    def __init__(self, folder: Path, here: Owner | None = None) -> None:
        """Look at nothing yet."""
        self.owner: Owner | None = None
        self.renewals = 0
        self._folder = folder
        self._here = here or Owner.here(os.environ)
        self._before: bytes | None = None
        self._changed = time.monotonic()

    def look(self) -> bool:
        """Read the note; return whether there is one, and it is renewed.

        Raises:
            OSError: It cannot be read.
            RefusedError: It is a link.
        """
        note = _read(self._folder)
        if note is None:
            return False
        self.owner = note.owner
        if note.text != self._before:
            self.renewals += self._before is not None
            self._before, self._changed = note.text, time.monotonic()
        return time.monotonic() - self._changed < scaled(SILENT_RENEWALS * RENEW_S)

    def is_alive(self) -> bool:
        """Whether a run has the folder; one that was killed on this host has it no more."""
        try:
            is_renewed = self.look()
        except OSError:  # a disk may be out of reach for a moment while the run goes on
            return True
        is_here = self.owner is not None and self._here.shares_locks_with(self.owner)
        return is_renewed and not (is_here and self.owner and _is_gone(self.owner.pid))

    def wait_for_end(self, seconds: float) -> bool:
        """Wait for so long; return whether the run has ended by then."""
        time.sleep(seconds)
        return not self.is_alive()


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


class _Note(NamedTuple):
    """An owner note as it was read; the owner is None where it is no JSON object of ours."""

    text: bytes
    owner: Owner | None


def _read(folder: Path) -> _Note | None:
    """Read the owner note; None if there is none.

    Raises:
        OSError: It cannot be read.
        RefusedError: It is a link.
    """
    try:
        text = retry(lambda: _content(folder / OWNER_NAME))
    except OSError as error:
        if is_missing(error):
            return None
        raise
    try:
        fields = json.loads(text)
        owner = Owner(*(fields[name] for name in Owner._fields))
    except (ValueError, KeyError, TypeError):
        owner = None
    return _Note(text, owner)


def _content(path: Path) -> bytes:
    with open(_open(path, os.O_RDONLY), "rb") as stream:
        return stream.read(4096)


def lock_file(path: Path, patience_s: float) -> int | None:
    """Lock a file, which is made if it is missing.

    Args:
        path: The file.
        patience_s: Longest wait for another process to give it up.

    Returns:
        A descriptor, which holds the lock until it is closed; None where the file system has no
        locks.

    Raises:
        BlockingIOError: Another process has it and does not give it up.
        RefusedError: It is a link.
        OSError: It cannot be made.
    """
    deadline = time.monotonic() + patience_s
    while True:
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            # On NFS this is a lock of the server, which needs a file that is open for writing.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
        except OSError as error:
            # Another run has moved that folder aside meanwhile; all else means no locks.
            if not isinstance(error, FileNotFoundError) and error.errno != errno.ESTALE:
                os.close(descriptor)
                return None
        os.close(descriptor)
        time.sleep(_POLL_S)


def _open(path: Path, flags: int) -> int:
    """Open a file that is no link.

    Raises:
        RefusedError: It is a link.
        OSError: It cannot be opened.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise RefusedError(f"{path} is a link; remove it, or choose another name.") from error


def _wait_for_owner(folder: Path, here: Owner, *, is_locked: bool) -> None:
    """Wait until the owner whom the note names has left, or has ceased to renew it.

    Raises:
        RefusedError: The note was renewed meanwhile, and its owner does not leave.
    """
    deadline = time.monotonic() + _PATIENCE_S
    watch = OwnerWatch(folder, here)
    while watch.look():
        owner = watch.owner
        if owner and (here.succeeds(owner) or (is_locked and here.shares_locks_with(owner))):
            return
        if watch.renewals and time.monotonic() >= deadline:
            raise _in_use(folder)
        time.sleep(_POLL_S)


def _in_use(folder: Path) -> RefusedError:
    note = _read(folder)
    who = f"{note.owner}{_last_seen(folder)}" if note and note.owner else "a run that is going on"
    return RefusedError(f"{folder} is in use by {who}; wait for its end, or choose another name.")


def _last_seen(folder: Path) -> str:
    """Return how long ago the note was renewed, by the file server's clock; empty if unknown."""
    try:
        os.utime(folder / LOCK_NAME, follow_symlinks=False)
        now = (folder / LOCK_NAME).lstat().st_mtime
        return f", last seen {max(0.0, now - (folder / OWNER_NAME).lstat().st_mtime):.0f} s ago"
    except OSError:
        return ""
