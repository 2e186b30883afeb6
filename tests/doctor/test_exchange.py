"""Facts over a real store, between threads that stand for ranks."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from limits import WAIT_S

from ddp_sgd.doctor.facts import Clock, Facts, leave_token
from ddp_sgd.doctor.protocol import Coordinator, Worker
from ddp_sgd.errors import ConfigError, PeerError


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))


def facts(rank, world_size=3, **more):
    return Facts(rank=rank, world_size=world_size, host=f"node{rank}", pid=rank, **more)


class Visits:
    """Ranks beside rank 0, each in a thread with a client of its own."""

    def __init__(self, store, folders, *, world_size=3, report=""):
        self.codes, self.words, self.errors = {}, {}, {}
        self._report = report
        self.threads = [
            threading.Thread(target=self._visit, args=(store.clone(), rank, folder, world_size))
            for rank, folder in folders.items()
        ]
        for thread in self.threads:
            thread.start()

    def _visit(self, store, rank, folder, world_size):
        try:
            worker = Worker(store, facts(rank, world_size), 30.0)
            self.words[rank] = worker.answer(folder)
            self.codes[rank] = worker.report(self._report)
        except Exception as error:
            self.errors[rank] = error

    def join(self):
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_a_visit_from_beginning_to_end(store, tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    visits = Visits(store, {1: shared, 2: own}, report="no luck")
    coordinator = Coordinator(store, 3)
    with leave_token(shared) as (token, _):
        answers = coordinator.ask(facts(0), token, 30.0)
    assert answers.facts == {rank: facts(rank) for rank in range(3)}
    assert answers.shares == {1: True, 2: False}
    for clock in answers.clocks.values():  # one clock, read by two threads
        assert abs(clock.ahead_s) <= clock.within_s
    coordinator.give_word(["a", "b", "c"])
    assert coordinator.hear(30.0) == {1: "no luck", 2: "no luck"}
    coordinator.dismiss(64)
    visits.join()
    assert visits.errors == {}
    assert visits.words == {1: ["a", "b", "c"], 2: ["a", "b", "c"]}
    assert visits.codes == {1: 64, 2: 64}


def test_a_rank_that_does_not_come_is_left_out_in_time(store, tmp_path):
    visits = Visits(store, {2: tmp_path})
    visits.threads[0].join(0)
    coordinator = Coordinator(store, 3)
    store.wait(["facts/2"], timedelta(seconds=30))
    answers = coordinator.ask(facts(0), None, 0.1)
    assert sorted(answers.facts) == [0, 2]
    assert answers.shares == {2: False}
    coordinator.give_word(None)
    assert coordinator.hear(30.0) == {}
    coordinator.dismiss(69)
    visits.join()
    assert (visits.words, visits.codes) == ({2: None}, {2: 69})


def test_a_rank_beyond_the_world_is_told(store, tmp_path):
    visits = Visits(store, {2: tmp_path}, world_size=3)
    coordinator = Coordinator(store, 1)
    coordinator.ask(facts(0, 1), None, 0.1)
    visits.join()
    assert isinstance(visits.errors[2], ConfigError)
    assert "WORLD_SIZE is 1 on rank 0, and 3 on rank 2; start all" in str(visits.errors[2])


def test_a_late_rank_hears_the_word_and_the_code(store, tmp_path):
    coordinator = Coordinator(store, 3)
    coordinator.ask(facts(0), None, 0.0)
    coordinator.give_word(None)
    coordinator.dismiss(69)
    visits = Visits(store, {1: tmp_path})
    visits.join()
    assert (visits.words, visits.codes, visits.errors) == ({1: None}, {1: 69}, {})


def test_a_rank_exists_once(store):
    Worker(store, facts(1), 30.0)
    twin = Facts(rank=1, world_size=3, host="node7", pid=8)
    with pytest.raises(PeerError, match="rank 1 is here already, as process 1 on node1; start"):
        Worker(store, twin, 30.0)


def test_a_rank_that_falls_silent_has_no_clock(store, monkeypatch):
    monkeypatch.setattr("ddp_sgd.doctor.protocol._ANSWER_S", 0.1)
    Worker(store, facts(1, 2), 30.0)  # and never answers
    coordinator = Coordinator(store, 2)
    answers = coordinator.ask(facts(0, 2), None, 30.0)
    assert sorted(answers.facts) == [0, 1]
    assert (answers.clocks, answers.shares) == ({}, {})
    assert coordinator.hear(30.0) == {}
    coordinator.dismiss(69)


def test_rank_0_that_says_nothing_is_given_up(store, tmp_path, monkeypatch):
    monkeypatch.setattr("ddp_sgd.doctor.protocol._GRACE_S", 0.0)
    worker = Worker(store, facts(1), 0.1)
    with pytest.raises(PeerError, match="rank 0 said nothing for 0.1 s; look at its log"):
        worker.answer(tmp_path)


def test_a_clock_that_is_ahead(store, tmp_path, monkeypatch):
    """The other thread's clock is 100 s ahead; both are read from the same module."""
    import time

    real, main = time.time, threading.get_ident()
    monkeypatch.setattr(
        "ddp_sgd.doctor.protocol.time.time",
        lambda: real() + (0 if threading.get_ident() == main else 100),
    )
    visits = Visits(store, {1: tmp_path}, world_size=2)
    coordinator = Coordinator(store, 2)
    clock = coordinator.ask(facts(0, 2), None, 30.0).clocks[1]
    assert isinstance(clock, Clock)
    assert abs(clock.ahead_s - 100) <= clock.within_s
    coordinator.give_word(None)
    coordinator.hear(30.0)
    coordinator.dismiss(0)
    visits.join()
