"""What is given is written, in order, by somebody else."""

import threading

import pytest
from limits import WAIT_S

from ddp_sgd.report import reporter as module
from ddp_sgd.report.reporter import AsyncWriter


class Book:
    """Takes bursts, and tells by whom."""

    def __init__(self, fails_at=None):
        self.bursts = []
        self.writers = []
        self.fails_at = fails_at
        self.written = threading.Event()

    def write(self, burst):
        self.writers.append(threading.current_thread())
        if self.fails_at in burst:
            self.written.set()
            raise OSError(f"no room for {self.fails_at}")
        self.bursts.append(burst)
        self.written.set()

    @property
    def notes(self):
        return [note for burst in self.bursts for note in burst]


@pytest.fixture
def patient(monkeypatch):
    """A writer's thread that takes no turn of its own."""
    monkeypatch.setattr(module, "BURST_S", 1000.0)


def test_notes_are_written_unasked_by_another_thread():
    book = Book()
    writer = AsyncWriter(book.write)
    writer.put(1)
    assert book.written.wait(WAIT_S)
    assert book.notes == [1]
    assert book.writers[0] is not threading.current_thread()
    writer.close()


def test_a_flush_writes_all_in_order_at_once(patient):
    book = Book()
    writer = AsyncWriter(book.write)
    for note in range(5):
        writer.put(note)
    writer.flush()
    assert book.bursts == [[0, 1, 2, 3, 4]]
    assert book.writers == [threading.current_thread()]
    writer.flush()
    assert len(book.bursts) == 1
    writer.close()


def test_what_is_left_at_the_end_is_written_and_the_thread_ends(patient):
    before = threading.active_count()
    book = Book()
    writer = AsyncWriter(book.write)
    writer.put("last")
    writer.close()
    assert book.notes == ["last"]
    assert threading.active_count() == before


def test_a_failure_comes_up_in_the_next_call_and_only_there(patient):
    book = Book(fails_at=2)
    writer = AsyncWriter(book.write)
    writer.put(1)
    writer.put(2)
    with pytest.raises(OSError, match="no room for 2"):
        writer.flush()
    writer.put(3)
    writer.close()
    assert book.notes == [3]


def test_a_failure_of_the_other_thread_comes_up_in_a_put():
    book = Book(fails_at=1)
    writer = AsyncWriter(book.write)
    writer.put(1)
    assert book.written.wait(WAIT_S)
    with writer._turn:  # the burst is over
        pass
    with pytest.raises(OSError, match="no room for 1"):
        writer.put(2)
    writer.close()


def test_a_slow_disk_holds_who_gives_too_much(patient, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 3)
    book = Book()
    writer = AsyncWriter(book.write)
    for note in range(7):
        writer.put(note)
    assert book.bursts == [[0, 1, 2], [3, 4, 5]]
    writer.close()
    assert book.notes == list(range(7))
