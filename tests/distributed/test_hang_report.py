"""Whom the notes of all ranks convict, and how the user is told."""

from pathlib import Path

from ddp_sgd.distributed.progress import Note, describe_hang, find_hung_ranks


def notes(*ranks):
    """One note for each (phases, idle_s, polls), in step 57."""
    return [
        Note(step=57, phase=f"phase {phases}", phases=phases, idle_s=idle_s, polls=polls)
        for phases, idle_s, polls in ranks
    ]


BEFORE = notes((4, 5, 10), (4, 5, 10), (4, 5, 10))


def test_the_rank_with_the_least_progress_is_stuck():
    after = notes((5, 9, 20), (4, 10, 20), (5, 9, 20))
    assert find_hung_ranks(BEFORE, after, 10.0) == ([1], False)


def test_ranks_that_are_equally_far_are_stuck_together():
    after = notes((5, 10, 20), (5, 11, 20), (5, 12, 20))
    assert find_hung_ranks(BEFORE, after, 10.0) == ([0, 1, 2], False)


def test_the_last_one_is_not_stuck_while_it_shows_life():
    after = notes((5, 10, 20), (4, 0.5, 20), (5, 12, 20))
    assert find_hung_ranks(BEFORE, after, 10.0) == ([], False)


def test_a_rank_whose_polls_stand_still_is_frozen_however_far_it_is():
    after = notes((5, 10, 20), (6, 1, 10), (5, 12, 20))
    assert find_hung_ranks(BEFORE, after, 10.0) == ([1], True)


def test_one_reading_shows_nobody_frozen():
    assert find_hung_ranks(None, notes((5, 10, 20), (4, 10, 10)), 10.0) == ([1], False)


def test_who_left_is_neither_frozen_nor_last():
    left = BEFORE[1]._replace(left=True)
    after = [*notes((5, 10, 20)), left, *notes((6, 10, 20))]
    assert find_hung_ranks(BEFORE, after, 10.0) == ([0], False)
    assert find_hung_ranks([left], [left], 10.0) == ([], False)


def test_one_culprit():
    places = [("node6", 11), ("node7", 12)]
    text = describe_hang(
        [1],
        notes((5, 10, 20), (4, 10, 20)),
        places,
        frozen=False,
        hang_s=300.0,
        stacks=Path("runs/a/logs"),
    )
    assert text == (
        "rank 1 of 2 on host node7 is stuck, with no progress for 300 s in phase "
        '"phase 4" of step 57; look at stack-rank-1.txt in runs/a/logs, and raise runtime.hang_s '
        "if a phase may take that long."
    )


def test_many_hung_ranks_are_one_line():
    places = [(f"node{rank // 8}", rank) for rank in range(16)]
    text = describe_hang(
        range(1, 16),
        notes(*[(4, 10, 20)] * 16),
        places,
        frozen=True,
        hang_s=2.5,
        stacks=None,
    )
    assert text == (
        "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 7 more of 16 on hosts node0, node1 are frozen, with no "
        'sign of life for 2.5 s in phase "phase 4" of step 57; look at what was done there, and '
        "raise runtime.hang_s if a phase may take that long."
    )
