import json
import threading

from torch.distributed import HashStore

from ddp_sgd.distributed.error_propagation import describe_lost_ranks, find_lost_ranks
from ddp_sgd.distributed.progress import Note


def write(store, rank, polls, *, left=False):
    note = Note(step=1, phase="x", phases=1, idle_s=0.0, polls=polls, left=left)
    store.set(f"note/{rank}", json.dumps(note))


def test_rank_that_makes_no_notes_is_absent_and_who_left_or_goes_on_is_not():
    store = HashStore()
    for rank in range(4):
        write(store, rank, polls=7, left=rank == 2)
    alive = threading.Timer(0.2, write, (store, 1), {"polls": 8})
    alive.start()
    assert find_lost_ranks(store, 4, 1.0) == [0, 3]
    alive.join()


def test_nobody_is_looked_for_any_longer_than_it_takes_to_see_all():
    store = HashStore()
    for rank in range(2):
        write(store, rank, polls=7, left=True)
    assert find_lost_ranks(store, 2, 3600) == []


def test_without_a_watch_nobody_is_absent():
    store = HashStore()
    write(store, 0, polls=7)
    assert find_lost_ranks(store, 2, 3600) == []


def test_hosts_are_named_with_their_ranks():
    hosts = ["node1"] * 2 + ["node2"] * 2 + [f"node{rank}" for rank in range(3, 9)]
    end = "not been heard of for 16 s; see that the host and the network to it are up, then start "
    assert describe_lost_ranks([1], hosts, 16.2).startswith(f"node1 (rank 1) has {end}")
    told = describe_lost_ranks([1, 2, 3], hosts, 16.2)
    assert told.startswith(f"node1 (rank 1), node2 (ranks 2, 3) have {end}")
    assert "node5 (rank 6) and 2 more have" in describe_lost_ranks(range(2, 9), hosts, 1)
    assert "(ranks 0, 1, 2, 3, 4, 5, 6, 7 and more)" in describe_lost_ranks(range(9), ["a"] * 9, 1)
