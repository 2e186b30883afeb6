"""Store of the ranks, opened without waiting for all of them; reads with a timeout."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store

from ddp_sgd.distributed.environment import Ranks
from ddp_sgd.distributed.process_exit import call_with_timeout
from ddp_sgd.distributed.rendezvous import could_not_join, open_whole_store
from ddp_sgd.errors import PeerError
from ddp_sgd.text import first_line


def reach_store(ranks: Ranks, timeout_s: float, environ: Mapping[str, str]) -> Store:
    """Reach the store of the ranks without waiting for all of them.

    Unlike ``open_store`` this lets those that did come report on the others.

    Args:
        ranks: This process among all, at least two.
        timeout_s: Longest wait for the store, in seconds.
        environ: The environment, such as ``os.environ``.

    Raises:
        PeerError: Rank 0 cannot be reached, or its port is taken.
    """
    try:
        store = call_with_timeout(timeout_s + 1.0, lambda: open_whole_store(ranks, timeout_s))
    except (OSError, RuntimeError, ValueError) as error:
        raise could_not_join(ranks, timeout_s, error) from error
    # torchrun keeps its store over restarts.
    return PrefixStore(f"doctor/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def read_key(store: Store, key: str, patience_s: float) -> bytes | None:
    """Return a value when it is there; None if it does not come in time.

    Args:
        store: From ``reach_store``.
        key: Its name.
        patience_s: Longest wait, in seconds; torch notes in the log when it is over.

    Raises:
        PeerError: The store is gone, and rank 0 with it.
    """
    with needs_store():
        try:
            store.wait([key], timedelta(seconds=patience_s))
        except DistStoreError:
            return None
        return bytes(store.get(key))


def is_there(store: Store, key: str) -> bool:
    """Whether there is a value.

    Raises:
        PeerError: The store is gone, and rank 0 with it.
    """
    with needs_store():
        return bool(store.check([key]))


@contextmanager
def needs_store() -> Iterator[None]:
    """Translate the error of a store that is gone.

    Raises:
        PeerError: In place of what torch raises.
    """
    try:
        yield
    except RuntimeError as error:  # torch's own classes are RuntimeErrors
        raise PeerError(
            f"rank 0 cannot be reached any more: {first_line(error)}; look at its log."
        ) from error
