"""The git commit of the working directory, for the journal and for W&B. No torch."""

import subprocess
from contextlib import suppress
from threading import Thread

from ddp_sgd.host import scaled

_TIMEOUT_S = 5.0
"""How long ``git`` may take; a large working tree on a network file system is not worth more."""


class GitCommit:
    """The git commit of the working directory, looked up in a thread while the run is set up."""

    def __init__(self) -> None:
        """Start ``git``."""
        self._commit: str | None = None
        self._thread = Thread(target=self._look_up, name="ddp_sgd-git-commit", daemon=True)
        with suppress(RuntimeError):  # the system has no thread left for us
            self._thread.start()

    def wait(self) -> str | None:
        """Return the commit, ``+changes`` appended if files differ; None if there is none."""
        if self._thread.ident is not None:
            self._thread.join(scaled(_TIMEOUT_S))
        return self._commit

    def _look_up(self) -> None:
        self._commit = git_commit()


def git_commit() -> str | None:
    """Return the commit of the working directory, ``+changes`` appended if files differ."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=scaled(_TIMEOUT_S), check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
