"""Promise 2: every sample counts once an epoch, on any number of ranks, from any position."""

import tracemalloc
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from ddp_sgd.data.order import Permutation
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.plan import micro_batch_sizes


def orders(n, world_size, *, batch=8, accumulate=1, seed=0, tail="exact"):
    return [
        TrainSampler(
            n,
            global_batch=world_size * batch * accumulate,
            batch_size=batch,
            rank=rank,
            world_size=world_size,
            seed=seed,
            tail=tail,
        )
        for rank in range(world_size)
    ]


def last_rank(n, world_size, *, batch):
    return TrainSampler(
        n,
        global_batch=world_size * batch,
        batch_size=batch,
        rank=world_size - 1,
        world_size=world_size,
    )


def real_indices(order):
    """Indices without dummies, by step of the epoch."""
    steps = [[]]
    for indices, size, is_last, _ in order:
        steps[-1] += indices[:size].tolist()
        if is_last:
            steps.append([])
    assert steps.pop() == []
    assert len(steps) == order.steps_per_epoch - order.first_step
    return steps


runs = st.tuples(
    st.integers(1, 300),
    st.integers(1, 9),
    st.integers(1, 17),
    st.integers(1, 4),
    st.integers(0, 50),
)


@given(runs, st.integers(0, 2**63 - 1), st.data())
def test_each_index_once_an_epoch_from_any_position(run, seed, data):
    n, world_size, batch, accumulate, epoch = run
    ranks = orders(n, world_size, batch=batch, accumulate=accumulate, seed=seed)
    start = data.draw(st.integers(0, ranks[0].steps_per_epoch))
    for order in ranks:
        order.set_epoch(epoch, start)
    read = [index for order in ranks for step in real_indices(order) for index in step]
    permutation = ranks[0].permutation().tolist()
    assert sorted(permutation) == list(range(n))
    assert sorted(read) == sorted(permutation[start * ranks[0].global_batch :])


@given(runs)
def test_the_steps_are_the_same_sets_on_any_number_of_ranks(run):
    n, world_size, batch, accumulate, epoch = run
    many = orders(n, world_size, batch=batch, accumulate=accumulate)
    (alone,) = orders(n, 1, batch=world_size * batch * accumulate)
    for order in (*many, alone):
        order.set_epoch(epoch)
    together = [sorted(chain(*step)) for step in zip(*map(real_indices, many), strict=True)]
    assert together == [sorted(step) for step in real_indices(alone)]


@given(runs)
def test_every_rank_takes_part_in_every_step(run):
    n, world_size, batch, accumulate, _ = run
    for order in orders(n, world_size, batch=batch, accumulate=accumulate):
        batches = list(order)
        assert len(batches) == len(order)
        assert all(1 <= len(drawn.indices) <= batch for drawn in batches)
        assert all(drawn.size in (0, len(drawn.indices)) for drawn in batches)
        start = 0
        for step in range(order.steps_per_epoch):
            samples, sizes = order.share(step)
            assert sizes == (micro_batch_sizes(samples, order.rank, world_size, batch) or (0,))
            of_step = batches[start : start + len(sizes)]
            assert [drawn.size for drawn in of_step] == list(sizes)
            assert [drawn.is_last for drawn in of_step] == [False] * (len(sizes) - 1) + [True]
            assert {drawn.step_samples for drawn in of_step} == {samples}
            start += len(sizes)


@given(runs, st.data())
def test_a_run_that_ends_within_an_epoch_reads_the_first_steps_of_it(run, data):
    n, world_size, batch, accumulate, epoch = run
    for order in orders(n, world_size, batch=batch, accumulate=accumulate):
        order.set_epoch(epoch)
        whole = [drawn.indices.tolist() for drawn in order]
        micro_batches = [len(order.share(step)[1]) for step in range(order.steps_per_epoch)]
        stop = data.draw(st.integers(0, order.steps_per_epoch + 1))
        first = data.draw(st.integers(0, stop))
        order.set_epoch(epoch, first, 0, stop)
        part = [drawn.indices.tolist() for drawn in order]
        assert part == whole[sum(micro_batches[:first]) : sum(micro_batches[:stop])]
        assert len(part) == len(order)
        order.set_epoch(epoch)
        assert [drawn.indices.tolist() for drawn in order] == whole


def test_a_rank_without_a_sample_borrows_one_of_the_same_step():
    first, second = orders(1, 2)
    assert [d.indices.tolist() for d in first] == [d.indices.tolist() for d in second] == [[0]]
    assert first.share(0) == (1, (1,))
    assert second.share(0) == (1, (0,))


def test_dropping_the_tail_leaves_out_less_than_a_batch():
    read = [
        i
        for order in orders(21, 2, batch=4, tail="drop")
        for step in real_indices(order)
        for i in step
    ]
    assert len(read) == len(set(read)) == 16


def test_epochs_differ_and_seeds_differ_but_ranks_agree():
    (order,) = orders(100, 1)
    (other,) = orders(100, 1, seed=1)
    permutations = []
    for epoch in range(3):
        order.set_epoch(epoch)
        permutations.append(order.permutation().tolist())
    assert permutations[0] != permutations[1] != permutations[2] != permutations[0]
    assert other.permutation().tolist() != permutations[0]
    for rank in orders(100, 4):
        assert rank.permutation().tolist() == permutations[0]


@given(
    n=st.integers(1, 300),
    world_size=st.integers(1, 5),
    global_batch=st.integers(1, 64),
    batch=st.integers(1, 16),
    data=st.data(),
)
def test_an_epoch_is_taken_up_in_the_middle_of_a_step(n, world_size, global_batch, batch, data):
    """As where an earlier life had another global batch: the rest of the step, then whole ones."""
    position = data.draw(st.integers(0, n - 1))
    first_step, skip = divmod(position, global_batch)
    read, whole = [], None
    for rank in range(world_size):
        order = TrainSampler(
            n, global_batch=global_batch, batch_size=batch, rank=rank, world_size=world_size
        )
        order.set_epoch(1, first_step, skip)
        assert len(list(order)) == len(order)
        read += chain(*real_indices(order))
        whole = order.permutation().tolist()
    assert sorted(read) == sorted(whole[position:])
    assert order.share(first_step)[0] == min(global_batch - skip, n - position)


def test_of_a_billion_samples_1024_ranks_read_each_once_in_a_step():
    ranks = orders(10**9, 1024)
    for step in (0, 61_000, ranks[0].steps_per_epoch - 1):
        read = []
        for order in ranks:
            order.set_epoch(2, step)
            drawn = next(iter(order))
            read += drawn.indices[: drawn.size].tolist()
        assert len(read) == len(set(read)) == ranks[0].share(step)[0]
        assert 0 <= min(read) <= max(read) < 10**9


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("world_size", [1, 1024])
def test_work_and_memory_up_to_the_first_batch_depend_on_neither_samples_nor_place(
    world_size, place, monkeypatch
):
    """Counted, not timed: positions that are worked out, and bytes."""
    asked_for = []

    class Counted(Permutation):
        def __call__(self, positions):
            asked_for.append(len(positions))
            return super().__call__(positions)

    monkeypatch.setattr("ddp_sgd.data.order.Permutation", Counted)
    peaks = []
    for n in (10**6, 10**9, 10**12):
        tracemalloc.start()
        order = last_rank(n, world_size, batch=32)
        order.set_epoch(1, round(place * (order.steps_per_epoch - 1)))
        next(iter(order))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(asked_for) <= 4096
    assert len(asked_for) == 3
    assert max(peaks) < 10 * 4096 * 8  # an epoch of a million samples alone has 8 MB


@given(
    n=st.integers(10**6, 10**12),
    world_size=st.sampled_from([1, 3, 1024]),
    place=st.floats(0.0, 1.0),
    steps=st.integers(1, 200),
)
def test_a_resume_reads_on_where_the_epoch_would_have_been(n, world_size, place, steps):
    """EvalSampler that are worked out together begin elsewhere than without a break."""
    order = last_rank(n, world_size, batch=8)
    first = round(place * (order.steps_per_epoch - 1))
    begin = max(0, first - steps)
    order.set_epoch(3, begin)
    unbroken = list(islice(order, first - begin, first - begin + 10))
    order.set_epoch(3, first)
    for now, before in zip(islice(order, 10), unbroken, strict=False):
        assert np.array_equal(now.indices, before.indices)
        assert now[1:] == before[1:]


def test_it_is_a_distributed_sampler():
    (order,) = orders(5, 1)
    assert isinstance(order, DistributedSampler)
    with pytest.raises(ValueError, match="rank"):
        TrainSampler(5, global_batch=2, batch_size=2, rank=2, world_size=2)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 7))
def test_chunks_cover_each_sample_once_and_do_not_depend_on_ranks(n, batch, world_size):
    whole = EvalSampler(n, batch_size=batch, rank=0, world_size=1)
    alone = [chunk.indices.tolist() for chunk in whole]
    assert [chunk.size for chunk in whole] == [len(chunk) for chunk in alone]
    shared = {}
    for rank in range(world_size):
        chunks = EvalSampler(n, batch_size=batch, rank=rank, world_size=world_size)
        assert len(chunks) == len(list(chunks))
        shared |= {number: indices.tolist() for indices, _, number in chunks}
    assert [shared[number] for number in sorted(shared)] == alone
    assert list(chain(*alone)) == list(range(n))
