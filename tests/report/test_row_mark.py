import os
from math import inf

import pytest

from ddp_sgd.report.row_mark import NO_BEST, NOWHERE, RowMark, place_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "wandb" / "last_row"


def _kept(path):
    mark = RowMark(path, resumed=True)
    mark.close()
    return mark.place, mark.online, mark.best


def test_places_rise_with_the_samples_and_training_comes_before_evaluation():
    rows = [(event, {"samples": samples}) for samples in (0, 1, 2) for event in ("train", "eval")]
    assert [place_of(event, row) for event, row in rows] == [0, 1, 2, 3, 4, 5]


def test_a_mark_outlives_the_process(path):
    mark = RowMark(path, resumed=False)
    mark.put(2560, online=True, best=0.1 + 0.2)
    assert _kept(path) == (2560, True, 0.1 + 0.2)  # not closed: a killed process does not either
    mark.close()


def test_a_mark_covers_the_one_before(path):
    mark = RowMark(path, resumed=False)
    sizes = set()
    for place, best in ((10**18, 0.1 + 0.2), (3, NO_BEST), (5, 1.0), (7, 1e-300)):
        mark.put(place, online=False, best=best)
        sizes.add(path.stat().st_size)
        assert _kept(path) == (place, False, best)
    assert len(sizes) == 1
    mark.close()


def test_a_new_run_starts_anew(path):
    first = RowMark(path, resumed=False)
    first.put(2560, online=True, best=0.5)
    first.close()
    RowMark(path, resumed=False).close()
    assert _kept(path) == (NOWHERE, False, NO_BEST)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "mixed", "binary"])
def test_a_mark_that_is_torn_says_nothing(path, damage):
    mark = RowMark(path, resumed=False)
    mark.put(2560, online=True, best=0.5)
    mark.close()
    line = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "cut": line[:-4],
                "flipped": line.replace(b"2560", b"2570"),
                "mixed": line + line,
                "binary": b"\xff\x00" * 30,
            }[damage]
        )
    assert _kept(path) == (NOWHERE, False, NO_BEST)


def test_what_cannot_be_opened_or_written_is_given_up(path, tmp_path):
    path.mkdir(parents=True)
    mark = RowMark(path, resumed=True)
    mark.put(2, online=False, best=0.5)
    assert (mark.place, mark.best) == (2, 0.5)
    full = RowMark(tmp_path / "other", resumed=False)
    descriptor = os.open("/dev/full", os.O_RDWR)
    os.dup2(descriptor, full._descriptor)
    os.close(descriptor)
    full.put(4, online=False, best=0.5)
    full.put(6, online=False, best=0.5)
    assert full.place == 6
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.parametrize(
    ("online", "on_server", "reached"),
    [
        (False, None, 10),
        (True, None, 10),
        (True, 6, 6),
        (True, NOWHERE, NOWHERE),
        (False, NOWHERE, 10),
        (False, 6, 10),
        (False, 12, 12),
    ],
)
def test_a_server_knows_best_what_was_sent_to_it(path, online, on_server, reached):
    mark = RowMark(path, resumed=False)
    mark.put(10, online=online, best=-inf)
    assert mark.reached(on_server) == reached
    mark.close()
