import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from limits import WAIT_S

from ddp_sgd.distributed.environment import Ranks
from ddp_sgd.distributed.rendezvous import (
    StoreKey,
    _fresh_part,
    _name_of_run,
    could_not_join,
    open_store,
    read_rendezvous_info,
)
from ddp_sgd.errors import ConfigError, PeerError
from ddp_sgd.host import free_port

HERE = socket.gethostname()
PACKAGE = Path(__file__).parents[2] / "ddp_sgd"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def ranks_at(port, rank, world_size=2, *, launcher="torchrun", address="127.0.0.1"):
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        launcher=launcher,
        address=address,
        port=port,
    )


def meet(*all_ranks, timeout_s=20.0):
    """Let ranks meet, each in a thread; return the store of each, or what it raised."""
    with ThreadPoolExecutor(len(all_ranks)) as threads:
        begun = [threads.submit(open_store, ranks, timeout_s) for ranks in all_ranks]
        return [each.exception() or each.result() for each in begun]


def test_ranks_find_each_other_in_any_order_and_know_who_came():
    port = free_port()
    stores = meet(*(ranks_at(port, rank, 3) for rank in (2, 0, 1)))
    assert [read_rendezvous_info(store) for store in stores] == [([HERE] * 3, HERE)] * 3
    assert [store.add("number", 1) for store in stores] == [1, 2, 3]


def test_second_rendezvous_at_one_port_knows_nothing_of_the_first():
    port = free_port()
    first = meet(*(ranks_at(port, rank) for rank in range(2)))
    second = meet(*(ranks_at(port, rank) for rank in range(2)))
    first[0].set("key", "of the first")
    assert [store.check(["key"]) for store in second] == [False, False]


def test_rank_that_does_not_come_is_named():
    (error,) = meet(ranks_at(free_port(), 0, 3), timeout_s=0.5)
    assert isinstance(error, PeerError)
    assert "could not join at 127.0.0.1:" in str(error)
    assert "within 0.5 s: ranks 1, 2 of 3 did not come; check that every rank" in str(error)


def test_port_where_nobody_listens():
    start = time.monotonic()
    (error,) = meet(ranks_at(free_port(), 1), timeout_s=0.5)
    assert "rank 1 of 2 could not join" in str(error)
    assert "Connection refused; check that every rank was started" in str(error)
    assert 0.5 < time.monotonic() - start < 20


def test_port_that_another_program_holds_is_reported_at_once_by_rank_0():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        (error,) = meet(ranks_at(port, 0), timeout_s=60)
    assert isinstance(error, PeerError)
    assert f"port {port} on {HERE} is held by another program; set MASTER_PORT" in str(error)


def test_listener_that_says_nothing_is_not_waited_for_any_longer():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        (error,) = meet(ranks_at(mute.getsockname()[1], 1), timeout_s=0.5)
    assert isinstance(error, PeerError)
    assert "within 0.5 s: there is no answer; check" in str(error)


def test_store_of_another_program_is_no_rendezvous():
    other = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    (error,) = meet(ranks_at(other.port, 1), timeout_s=0.5)
    assert isinstance(error, PeerError)
    assert f"port {other.port} on 127.0.0.1 is held by another program, while rank 1" in str(error)


def test_rank_of_another_run_is_sent_away_at_once_and_disturbs_nobody():
    port = free_port()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(open_store, ranks_at(port, 0), 60.0)
        (stranger,) = meet(ranks_at(port, 1, 3), timeout_s=60)
        last = open_store(ranks_at(port, 1), 60.0)
        assert first.result().add("number", 1) + last.add("number", 1) == 3
    assert isinstance(stranger, PeerError)
    assert str(stranger) == (
        f"port {port} on 127.0.0.1 is held by another run, 2 ranks, while rank 1 belongs to "
        "3 ranks; set MASTER_PORT to a free one, the same for every rank."
    )


def test_rank_that_is_there_twice_is_sent_away():
    port = free_port()
    results = meet(ranks_at(port, 0), ranks_at(port, 1), ranks_at(port, 1), timeout_s=2)
    errors = [result for result in results if isinstance(result, Exception)]
    assert len(errors) == 1
    assert isinstance(errors[0], PeerError)
    assert re.search(
        r"rank 1 of 2 is at 127.0.0.1:\d+ already, as process|waits for nobody", str(errors[0])
    )
    assert not isinstance(results[0], Exception)


def test_run_has_the_name_that_its_launcher_gives_it():
    context = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_RESTART_COUNT": "1"}
    named = "2 ranks of SLURM job 12, step 3, restart 1"
    assert _name_of_run(ranks_at(1, 0, launcher="srun"), context) == named
    assert _name_of_run(ranks_at(1, 0), context) == "2 ranks"  # a shell of a job may be on one host


@pytest.mark.parametrize(
    ("address", "local_size", "words"),
    [
        ("localhost", 1, "localhost is another machine on every host: set MASTER_ADDR to the name"),
        ("127.0.0.1", 4, "x; check that every rank was started, that MASTER_ADDR"),
        ("nosuch.invalid", 1, "that every host knows, or add it to /etc/hosts."),
        ("192.0.2.1", 1, f"192.0.2.1 is another host: set MASTER_ADDR to {HERE}."),
    ],
)
def test_error_names_the_trap_at_hand(address, local_size, words):
    ranks = Ranks(
        rank=0,
        world_size=4,
        local_rank=0,
        local_world_size=local_size,
        launcher="srun",
        address=address,
        port=7,
    )
    assert words in str(could_not_join(ranks, 3.0, OSError("x")))


def test_error_under_torchrun_names_the_address_that_torchrun_chose(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    told = str(could_not_join(ranks_at(7, 1, address="192.0.2.1"), 3.0, OSError()))
    assert "within 3 s: OSError; check that every rank was started and reaches 192.0.2.1," in told
    assert "PET_LOCAL_ADDR there sets another" in told
    assert str(could_not_join(ranks_at(7, 1), 3.0, OSError("x"), "do y.")).endswith("x; do y.")


def test_error_of_ours_stays_what_it_is():
    error = ConfigError("x is y; z.")
    assert could_not_join(ranks_at(1, 0), 3.0, error) is error


def join_anew(store, others, word):
    """Join as all ranks of one attempt do, over a store that dead ranks have used; tell the key."""
    told = {}

    def join(rank):
        part = _fresh_part(store.clone(), ranks_at(1, rank, 3), time.monotonic() + 10)
        part.add(word, 1)
        told[rank] = part

    threads = [threading.Thread(target=join, args=(rank,)) for rank in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return [told[rank].add(word, 0) for rank in others]


def test_an_attempt_has_a_part_of_torchruns_store_for_itself():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    store.set("ask/1", "question of a rank that was killed")
    assert join_anew(store, (0, 1, 2), "here") == [3, 3, 3]
    assert join_anew(store, (2, 1, 0), "here") == [3, 3, 3]


def test_every_key_of_the_store_is_in_the_table_and_in_use():
    folders = ("distributed", "doctor")
    texts = [path.read_text() for name in folders for path in (PACKAGE / name).glob("*.py")]
    literal = r"(?:store|part)\.(?:set|get|wait|check|add|compare_set|multi_get)\(\[?f?[\"']"
    assert [call for text in texts for call in re.findall(literal, text)] == []
    assert not re.search(r"PrefixStore\(f?[\"']", "".join(texts))
    used = {name for text in texts for name in re.findall(r"StoreKey\.([A-Z_]+)", text)}
    assert used == set(StoreKey.__members__)
