"""Where the time goes, from durations alone."""

import pytest

from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.sync import TimeShares, is_share


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def ranks(meets_in, *days):
    """Ranks that spent time so, by phase; gives the measure of the first, and what all know."""
    measured, shares = [], None
    for rank, day in reversed(list(enumerate(days))):
        clock = Clock()
        clock.now = 1000.0 * rank  # clocks of different hosts have nothing in common
        progress = ProgressTracker(clock)
        shares = TimeShares(progress, Runtime(rank=rank, world_size=len(days)), meets_in)
        for phase, seconds in day.items():
            progress.enter(phase)
            clock.now += seconds
        measured.append(shares.measure())
    return shares, shares.read([sum(column) for column in zip(*measured, strict=True)])


ALONE = {
    Phase.DATA: 1.0,
    Phase.FORWARD: 2.0,
    Phase.BACKWARD: 3.0,
    Phase.ALL_REDUCE: 0.25,
    Phase.OPTIMIZER: 0.25,
    Phase.SYNC: 0.25,
    Phase.SAVE: 0.25,
    Phase.EVALUATE: 50.0,
    Phase.START: 9.0,
}


def test_a_rank_alone():
    shares, spent = ranks((), ALONE)
    assert spent.by_kind == {"data": 1.0, "compute": 5.5, "waiting": 0.0, "bookkeeping": 0.5}
    assert spent.elapsed_s == 7.0
    shares.close_row(spent)
    assert shares.summary() == {
        "share/data": pytest.approx(1 / 7),
        "share/compute": pytest.approx(5.5 / 7),
        "share/waiting": 0.0,
        "share/bookkeeping": pytest.approx(0.5 / 7),
    }


def test_where_ranks_meet_after_the_backward_pass_that_phase_is_waiting():
    slow = {Phase.FORWARD: 4.0, Phase.BACKWARD: 4.0, Phase.ALL_REDUCE: 1.0}
    quick = {Phase.FORWARD: 2.0, Phase.BACKWARD: 2.0, Phase.ALL_REDUCE: 5.0}
    shares, spent = ranks((Phase.ALL_REDUCE,), quick, slow, quick)
    assert spent.by_kind["waiting"] == pytest.approx(11 / 3)
    assert spent.by_kind["compute"] == pytest.approx(16 / 3)
    shares.close_row(spent)
    summary = shares.summary()
    assert summary["slowest_rank"] == 1
    assert summary["share/lag"] == pytest.approx(4 / 9)  # 5 s of waiting instead of 1


def test_where_ranks_meet_in_the_backward_pass_the_quickest_shows_how_long_it_takes():
    slow = {Phase.FORWARD: 6.0, Phase.BACKWARD: 3.0}
    quick = {Phase.FORWARD: 2.0, Phase.BACKWARD: 7.0}
    shares, spent = ranks((Phase.BACKWARD,), slow, quick)
    assert spent.by_kind["waiting"] == pytest.approx(2.0)  # 0 and 4 s
    assert spent.by_kind["compute"] == pytest.approx(7.0)
    shares.close_row(spent)
    assert shares.summary()["slowest_rank"] == 0
    assert shares.summary()["share/lag"] == pytest.approx(4 / 9)


def test_rows_add_up_to_the_run():
    clock = Clock()
    progress = ProgressTracker(clock)
    shares = TimeShares(progress, Runtime(), ())
    for seconds in (1.0, 3.0):
        progress.enter(Phase.DATA)
        clock.now += seconds
        progress.enter(Phase.FORWARD)
        clock.now += 1.0
        spent = shares.read(shares.measure())
        assert spent.by_kind["data"] == seconds
        shares.close_row(spent)
    assert shares.summary()["share/data"] == pytest.approx(4 / 6)


def test_a_run_without_a_row_has_no_shares_to_divide():
    assert set(TimeShares(ProgressTracker(), Runtime(), ()).summary().values()) == {0.0}


def test_what_comes_from_here_is_known_by_its_key():
    summary = ranks((Phase.BACKWARD,), ALONE, ALONE)[0].summary()
    assert all(map(is_share, summary))
    assert not is_share("eval/loss")
