"""Lost ranks: hosts that no longer renew their liveness notes in the store."""

import json
import time
from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store

from ddp_sgd.distributed.hang_report import Note

_POLL_S = 0.1


def find_lost_ranks(store: Store, world_size: int, wait_s: float) -> list[int]:
    """Find the ranks whose watch makes no note any more.

    Args:
        store: Where each rank leaves its notes, under ``note/<rank>``.
        world_size: Number of ranks.
        wait_s: How long to look, in seconds; longer than the time between two notes.

    Returns:
        Ranks in order; none where not all keep a watch.
    """
    keys = [f"note/{rank}" for rank in range(world_size)]
    if not store.check(keys):
        return []
    first = _read(store, keys)
    lost = list(range(world_size))
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        now = _read(store, [keys[rank] for rank in lost])
        lost = [
            rank
            for rank, note in zip(lost, now, strict=True)
            if not note.left and note.polls == first[rank].polls
        ]
        if not lost:
            break
        time.sleep(_POLL_S)
    return lost


def describe_lost_ranks(ranks: Sequence[int], hosts: Sequence[str], silent_s: float) -> str:
    """Say which hosts are gone, and what to do, on one line.

    Args:
        ranks: Those that are gone, at least one.
        hosts: Name of the host of every rank.
        silent_s: Since when, in seconds.
    """
    here: dict[str, list[int]] = {}
    for rank in ranks:
        here.setdefault(hosts[rank], []).append(rank)
    shown = [f"{host} ({_name(found)})" for host, found in list(here.items())[:4]]
    more = f" and {len(here) - 4} more" if len(here) > 4 else ""
    return (
        f"{', '.join(shown)}{more} {'have' if len(here) > 1 else 'has'} not been heard of for "
        f"{silent_s:.0f} s; see that the host and the network to it are up, then start again."
    )


def _name(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' * (len(ranks) > 1)} {shown}{' and more' if len(ranks) > 8 else ''}"


def _read(store: Store, keys: list[str]) -> list[Note]:
    return [Note(*json.loads(note)) for note in store.multi_get(keys)]
