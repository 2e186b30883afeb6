"""Read-ahead in the process of the rank: several small batches by one call."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ddp_sgd.data.fetcher import AHEAD_BYTES, Fetcher, Request, Unreadable
from ddp_sgd.tree import tensors_in


class InProcess:
    """Batches that are read where they are used, without the way through DataLoader.

    Small ones are read several at a time: a call for 8 kB takes as long as the copy of 100 kB.
    """

    def __init__(self, fetcher: Fetcher, requests: Iterable[Request]) -> None:
        self._fetcher = fetcher
        self._requests = requests

    def __iter__(self) -> Iterator[Any]:
        requests, at_once, most = iter(self._requests), 1, self._fetcher.most_at_once
        while burst := list(islice(requests, at_once)):
            batches = self._fetcher.read_ahead(burst)
            if at_once < most:
                at_once = min(most, _batches_at_once(batches[0]))
                most = at_once  # the first batch shows how large they are
            yield from batches


def _batches_at_once(batch: Any) -> int:
    if isinstance(batch, Unreadable):
        return 1
    num_bytes = sum(tensor.nbytes for tensor in tensors_in(batch))
    return max(1, AHEAD_BYTES // max(1, num_bytes))
