"""The store as ranks find it that come alone, late, or at the wrong place."""

import os
import socket
import threading

import pytest
from limits import WAIT_S
from ranks import rank_environment, run_ranks

from ddp_sgd.distributed.environment import Ranks
from ddp_sgd.distributed.rendezvous import is_there, reach_store, read_key
from ddp_sgd.errors import PeerError
from ddp_sgd.host import free_port


def rank(number, port):
    return Ranks(
        rank=number,
        world_size=2,
        local_rank=number,
        local_world_size=2,
        launcher="torchrun",
        address="127.0.0.1",
        port=port,
    )


def test_rank_0_waits_for_nobody_and_others_find_its_store():
    port = free_port()
    host = reach_store(rank(0, port), 20.0, {})
    other = reach_store(rank(1, port), 20.0, {})
    other.set("key", "value")
    assert read_key(host, "key", 10.0) == b"value"
    assert is_there(host, "key")
    assert not is_there(host, "another")
    assert read_key(host, "another", 0.05) is None


def test_a_restart_has_a_part_for_itself():
    port = free_port()
    host = reach_store(rank(0, port), 20.0, {})
    host.set("key", "old")
    again = reach_store(rank(1, port), 20.0, {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert not is_there(again, "key")


def test_a_rank_waits_for_rank_0():
    port = free_port()
    found = []
    early = threading.Thread(target=lambda: found.append(reach_store(rank(1, port), 30.0, {})))
    early.start()
    host = reach_store(rank(0, port), 20.0, {})
    early.join(WAIT_S)
    found[0].set("key", "value")
    assert read_key(host, "key", 10.0) == b"value"


def test_nobody_is_there():
    with pytest.raises(
        PeerError, match=r"rank 1 of 2 could not join at 127.0.0.1:\d+ within 0.2 s"
    ):
        reach_store(rank(1, free_port()), 0.2, {})


def test_a_port_that_is_taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(PeerError, match="is held by another program; set MASTER_PORT"):
            reach_store(rank(0, port), 5.0, {})
        with pytest.raises(PeerError, match="rank 1 of 2 could not join"):  # no store of torch's
            reach_store(rank(1, port), 1.0, {})


def come_alone(_, number, port):
    environment = rank_environment(number, 2, port)
    store = reach_store(rank(number, port), 20.0, environment)
    store.set(f"here/{number}", "")
    try:
        while True:
            read_key(store, f"here/{1 - number}", 20.0)
            if number == 0:
                os._exit(0)  # and the store with it
    except PeerError as error:
        return str(error)


def test_a_store_that_goes_down_is_a_lost_rank_0():
    port = free_port()
    told = {}

    def start(number):
        told[number] = run_ranks(1, come_alone, number, port, raises=True)[0]

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told[1].startswith("rank 0 cannot be reached any more: ")
