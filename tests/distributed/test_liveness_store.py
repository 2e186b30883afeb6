"""Notes and one verdict for all ranks, by calls that do not wait for ever."""

import threading

import pytest
from torch.distributed import HashStore

from ddp_sgd.distributed.hang_watch import LivenessStore
from ddp_sgd.distributed.progress import HangReport, Note

PATIENCE_S = 60.0
NOTE = Note(step=3, phase="step", phases=7, idle_s=0.5, polls=9)


@pytest.fixture
def boards():
    store = HashStore()
    pair = [LivenessStore(store, rank, 2) for rank in range(2)]
    yield pair
    for liveness in pair:
        liveness.close(PATIENCE_S)
    assert "ddp_sgd-board" not in [thread.name for thread in threading.enumerate()]


def test_every_rank_reads_the_notes_of_all(boards):
    assert boards[0].exchange(NOTE, PATIENCE_S) is True
    assert boards[1].exchange(NOTE._replace(step=4), PATIENCE_S) is True
    assert boards[1].read_notes(PATIENCE_S) == [NOTE, NOTE._replace(step=4)]


def test_the_first_report_holds(boards):
    first, second = HangReport("one", 0, [1]), HangReport("two", 1, [0])
    assert boards[0].post(first, PATIENCE_S) == first
    assert boards[1].post(second, PATIENCE_S) == first
    assert boards[1].exchange(NOTE, PATIENCE_S) == first


def test_the_host_of_the_store_waits_for_the_others(boards):
    boards[0].exchange(NOTE._replace(left=True), PATIENCE_S)
    boards[1].exchange(NOTE, PATIENCE_S)
    boards[0].outlast_others(0.0, PATIENCE_S)  # not for ever
    host = threading.Thread(target=boards[0].outlast_others, args=(PATIENCE_S, PATIENCE_S))
    host.start()
    assert host.is_alive()
    boards[1].exchange(NOTE._replace(left=True), PATIENCE_S)
    host.join(PATIENCE_S)
    assert not host.is_alive()


class FrozenStore:
    """Answers when it is woken."""

    def __init__(self):
        self.is_awake = threading.Event()
        self.asked = 0

    def multi_get(self, keys):
        self.asked += 1
        self.is_awake.wait(PATIENCE_S)
        return [b'[3, "step", 7, 0.5, 9, false]' for _ in keys]


def test_a_silent_store_is_not_waited_for_nor_asked_twice():
    store = FrozenStore()
    liveness = LivenessStore(store, 0, 1)
    assert liveness.read_notes(0.01) is None
    assert liveness.read_notes(0.01) is None
    liveness.close(0.01)  # nor does the end wait
    liveness = LivenessStore(store, 0, 1)
    assert liveness.read_notes(0.01) is None
    assert not liveness.is_gone
    store.is_awake.set()
    assert liveness.read_notes(PATIENCE_S) == [NOTE]
    liveness.close(PATIENCE_S)
    assert store.asked == 3


class LostStore:
    def check(self, keys):
        raise RuntimeError("Broken pipe")

    def set(self, key, value):
        pass


def test_a_lost_store_is_gone_for_good():
    liveness = LivenessStore(LostStore(), 0, 1)
    assert liveness.exchange(NOTE, PATIENCE_S) is False
    assert liveness.is_gone
    assert liveness.post(HangReport("x", 0, []), PATIENCE_S) is None
    liveness.outlast_others(PATIENCE_S, PATIENCE_S)
    liveness.close(PATIENCE_S)
