"""Orders: what a function of the user's gives is cut into steps, on any number of ranks."""

import re
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_sgd.data.order import ORDER, Sequential, Shuffled, build_order, name_order
from ddp_sgd.data.sampler import TrainSampler
from ddp_sgd.errors import ConfigError, DataError


def draw(n, seed, epoch, global_batch):
    """As many indices as two global batches and a half, with repeats."""
    return np.random.default_rng((seed, epoch)).integers(0, n, global_batch * 5 // 2 + 1)


def real_indices(sampler):
    """Indices without dummies, by step of the epoch."""
    steps = [[]]
    for indices, size, is_last, _ in sampler:
        steps[-1] += indices[:size].tolist()
        if is_last:
            steps.append([])
    assert steps.pop() == []
    return steps


def build(function, samples=10, global_batch=4, seed=3, epoch=0):
    return build_order(function, global_batch, samples=samples, seed=seed, epoch=epoch)


def samplers(world_size, batch, accumulate, *, samples, tail="exact", function=draw):
    global_batch = world_size * batch * accumulate
    return [
        TrainSampler(
            samples,
            global_batch=global_batch,
            batch_size=batch,
            rank=rank,
            world_size=world_size,
            seed=7,
            tail=tail,
            order=build(function, samples, global_batch, seed=7),
        )
        for rank in range(world_size)
    ]


@given(
    n=st.integers(1, 40),
    world_size=st.integers(1, 5),
    batch=st.integers(1, 6),
    accumulate=st.integers(1, 3),
    epoch=st.integers(0, 9),
    tail=st.sampled_from(["exact", "drop"]),
    data=st.data(),
)
def test_ranks_read_together_what_the_order_has_from_any_position(
    n, world_size, batch, accumulate, epoch, tail, data
):
    ranks = samplers(world_size, batch, accumulate, samples=n, tail=tail)
    global_batch = ranks[0].global_batch
    start = data.draw(st.integers(0, ranks[0].steps_per_epoch - 1))
    skip = data.draw(st.integers(0, min(global_batch, 2) - 1))
    expected = draw(n, 7, epoch, global_batch).tolist()
    cuts = [expected[at : at + global_batch] for at in range(0, len(expected), global_batch)]
    if tail == "drop":
        cuts = [cut for cut in cuts if len(cut) == global_batch]
    cuts = cuts[start:]
    cuts[0] = cuts[0][skip:]
    for rank in ranks:
        rank.set_epoch(epoch, start, skip)
    steps = [sorted(chain(*parts)) for parts in zip(*map(real_indices, ranks), strict=True)]
    assert steps == [sorted(cut) for cut in cuts]
    if world_size == 1:
        assert real_indices(ranks[0]) == cuts


def test_sequential_reads_the_data_set_as_it_is_numbered():
    order = build("sequential", samples=10**12)
    assert isinstance(order, Sequential)
    assert order.of_epoch(5)(np.array([0, 10**12 - 1])).tolist() == [0, 10**12 - 1]
    (sampler,) = samplers(1, 3, 1, samples=8, function="sequential")
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert real_indices(sampler) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_shuffled_is_the_default():
    positions = np.arange(10)
    order = build("shuffled")
    assert isinstance(order, Shuffled)
    (sampler,) = samplers(1, 4, 1, samples=10, function="shuffled")
    plain = TrainSampler(10, global_batch=4, batch_size=4, rank=0, world_size=1, seed=7)
    assert sampler.permutation().tolist() == plain.permutation().tolist()
    assert sorted(order.of_epoch(2)(positions).tolist()) == list(range(10))


@pytest.mark.parametrize(
    "give",
    [
        lambda n: [3, 1, 3],
        lambda n: (3, 1, 3),
        lambda n: np.array([3, 1, 3], np.uint8),
        lambda n: torch.tensor([3, 1, 3], dtype=torch.int32),
        lambda n: [torch.tensor(3), 1, np.int16(3)],
    ],
)
def test_indices_come_in_any_form_that_holds_whole_numbers(give):
    order = build(lambda n, seed, epoch, global_batch: give(n))
    assert order.of_epoch(0)(np.arange(3)).tolist() == [3, 1, 3]
    assert order.facts[:3] == (3, 2, 1)


def test_it_gets_samples_seed_epoch_and_global_batch():
    asked = []

    def function(*arguments):
        asked.append(arguments)
        return range(10)

    order = build(function, samples=10, global_batch=4, seed=3, epoch=5)
    assert asked == [(10, 3, 5, 4)] * 2
    order.of_epoch(5)
    order.of_epoch(6)
    order.of_epoch(6)
    assert asked[2:] == [(10, 3, 6, 4)]
    assert order.facts[:3] == (10, 10, 0)


def test_memory_that_the_function_fills_again_is_copied():
    memory = np.arange(4)

    def function(n, seed, epoch, global_batch):
        memory[:] = np.roll(np.arange(4), epoch)
        return memory

    order = build(function, samples=4)
    kept = order.of_epoch(0)
    order.of_epoch(1)
    assert kept(np.arange(4)).tolist() == [0, 1, 2, 3]


def failing(n, seed, epoch, global_batch):
    raise KeyError("lengths")


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (
            lambda *_: [0, 12],
            "which in epoch 2 gives the index 12; return indices from 0 to 9, of the",
        ),
        (lambda *_: [0, -1], "gives the index -1; return indices from 0 to 9"),
        (lambda *_: np.array([2**63], np.uint64), f"gives the index {2**63}; "),
        (lambda *_: [], "gives no index; return at least one."),
        (lambda *_: [0.0, 1.0], "gives numbers of type float64 and shape (2,); return"),
        (lambda *_: [True, False], "gives numbers of type bool and shape (2,); return"),
        (lambda *_: [[0, 1]], "gives numbers of type int64 and shape (1, 2); return"),
        (lambda *_: None, "gives a NoneType; return whole numbers of shape (m,)"),
        (lambda *_: (n for n in range(3)), "gives a generator; return whole"),
        (lambda *_: [[0], [1, 2]], "in epoch 2 fails, ValueError: "),
        (lambda n: [0], "in epoch 2 fails, TypeError: "),
        (failing, "failing, which in epoch 2 fails, KeyError: 'lengths'; let it"),
        (
            lambda n, *_: np.random.permutation(n),  # what must not be done
            "gives other indices at a second call; let them follow from the arguments",
        ),
    ],
)
def test_what_is_no_order_is_refused_with_its_epoch(give, words):
    with pytest.raises(ConfigError, match=rf"^data\.order is .*{re.escape(words)}"):
        build(give, epoch=2)


def test_another_length_in_a_later_epoch_is_refused():
    order = build(lambda n, seed, epoch, global_batch: range(10 - epoch))
    order.of_epoch(0)
    with pytest.raises(ConfigError, match="in epoch 1 gives 9 indices, and 10 in epoch 0; give e"):
        order.of_epoch(1)


def test_an_error_of_this_package_stays_as_it_is():
    def function(*_):
        raise DataError("lengths.npy is missing; write it.")

    with pytest.raises(DataError, match=r"^lengths\.npy is missing; write it\.$"):
        build(function)


def test_checkpoints_carry_the_name_of_an_order():
    assert name_order("shuffled") == ORDER
    assert name_order("sequential") == "sequential"
    assert name_order({"class_path": "my.Buckets", "init_args": {}}) == "my.Buckets"
