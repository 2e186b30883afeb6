"""One fate for all ranks: the first fault of any rank is the one that the user reads, once."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch.distributed import DistError, DistNetworkError
from torch.distributed.distributed_c10d import Store

from ddp_sgd.errors import ExitCode, FaultElsewhereError, PeerError, UserError

_LOST_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|pair closure|Socket Timeout"
    r"|wait timeout|gloo/transport|ncclRemoteError|ncclSystemError|watchdog|NCCL",
    re.IGNORECASE,
)
_FIRST_FAULT = "ddp_sgd/first_fault"


class Fate(Protocol):
    """What becomes of an error, given those of the other ranks."""

    def judge(self, error: Exception) -> Exception:
        """Return the error that this rank should end with."""


class OwnFate:
    """The fate of a process that is alone: its errors are its own."""

    def judge(self, error: Exception) -> Exception:
        """Return the error unchanged."""
        return error


class SharedFate:
    """The fate of ranks in a group: the first fault is written on a board in their store.

    A rank that fails leaves the group, so that collectives of the others fail within moments; they
    find the first fault on the board and end with its code, in silence.

    Args:
        store: Key-value store of the group.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size

    def judge(self, error: Exception) -> Exception:
        """Return the error that this rank should end with.

        Args:
            error: What this rank ran into.

        Returns:
            The error itself if this rank failed first, as a ``PeerError`` if it is a lost
            connection; ``FaultElsewhereError`` if another rank failed before.
        """
        if isinstance(error, FaultElsewhereError):
            return error
        mine = self._lost_peer(error) if is_lost_peer(error) else error
        code = mine.exit_code if isinstance(mine, UserError) else ExitCode.INTERNAL
        note = json.dumps({"rank": self._rank, "code": int(code), "message": str(mine)})
        try:
            first = json.loads(self._store.compare_set(_FIRST_FAULT, "", note))
        except (DistError, RuntimeError):  # the store went down with its host
            return mine
        if first["rank"] == self._rank:
            return mine
        return FaultElsewhereError(first["message"], first["code"])

    def _lost_peer(self, error: Exception) -> PeerError:
        cause = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip().splitlines()[0])
        cause = re.split(r"\.\s+(?=[A-Z])", cause)[0].rstrip(".")  # gloo goes on to chat
        return PeerError(
            f"rank {self._rank} of {self._world_size} is cut off: {cause}; look for the first "
            "error in the logs of the other ranks, then start again."
        )


def is_lost_peer(error: Exception) -> bool:
    """Whether an error says that another rank, or the way to it, is gone."""
    if isinstance(error, UserError):
        return False
    return isinstance(error, DistNetworkError) or (
        isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))
    )


@contextmanager
def shared_fate(fate: Fate) -> Iterator[None]:
    """Let every error that leaves the block be judged in the light of those of the other ranks."""
    try:
        yield
    except Exception as error:
        judged = fate.judge(error)
        if judged is error:
            raise
        raise judged from error
