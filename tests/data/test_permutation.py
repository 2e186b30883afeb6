"""The order is a bijection at any size, and looks like one drawn by lot."""

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from ddp_sgd.data import Digits
from ddp_sgd.data.order import Permutation
from ddp_sgd.models import MLP
from ddp_sgd.seeds import seed_for

seeds = st.integers(0, 2**63 - 1)


def order(n, seed=0):
    return Permutation(n, seed)(np.arange(n))


def excess(counts, cells):
    """Chi-squared of equal shares, in standard deviations above what chance gives."""
    counts = np.asarray(counts, dtype=float)
    share = counts.sum() / cells
    missing = cells - len(counts)
    chi_squared = ((counts - share) ** 2).sum() / share + missing * share
    return (chi_squared - (cells - 1)) / math.sqrt(2 * (cells - 1))


@given(st.integers(1, 5000), seeds)
@example(1, 0)
@example(63, 0)
@example(64, 0)
@example(65, 0)
@example(4096, 2**63 - 1)
def test_each_number_comes_once(n, seed):
    assert np.array_equal(np.sort(order(n, seed)), np.arange(n))


@given(st.integers(1, 2**62), seeds, st.data())
def test_at_any_size_positions_give_different_numbers_in_range(n, seed, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    values = Permutation(n, seed)(np.array(positions))
    assert values.dtype == np.int64
    assert len(set(values.tolist())) == len(positions)
    assert (values >= 0).all()
    assert (values < n).all()


@given(st.integers(1, 10**12), seeds, st.data())
def test_what_stands_at_a_position_does_not_depend_on_what_else_is_asked_for(n, seed, data):
    permutation = Permutation(n, seed)
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    alone = [int(permutation(np.array([position]))[0]) for position in positions]
    assert permutation(np.array(positions)).tolist() == alone
    assert permutation(np.array(positions)[::-1]).tolist() == alone[::-1]


def test_a_seed_gives_the_same_order_for_ever():
    """A change of these numbers needs another name in ``ORDER``: old checkpoints carry it."""
    assert order(10, seed=7).tolist() == [6, 0, 7, 2, 1, 3, 4, 9, 5, 8]
    billion = Permutation(10**9, seed=7)(np.array([0, 1, 2, 999_999_999]))
    assert billion.tolist() == [110666771, 23475182, 67956659, 370546683]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_of_few_samples_each_order_is_as_likely_as_any_other(n):
    orders = Counter(tuple(order(n, seed).tolist()) for seed in range(600))
    assert excess(list(orders.values()), math.factorial(n)) < 6


@pytest.mark.parametrize("n", [6, 11, 16, 65])
def test_each_number_is_as_likely_as_any_other_at_each_position(n):
    many = np.stack([order(n, seed) for seed in range(1000)])
    pairs = np.bincount((many + n * np.arange(n)).ravel(), minlength=n * n)
    # Rows and columns have fixed sums: (n - 1)^2 degrees of freedom, and a larger share of each.
    chi_squared = ((pairs - 1000 / n) ** 2).sum() / (1000 / n) * (n - 1) / n
    freedom = (n - 1) ** 2
    assert abs(chi_squared - freedom) < 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [7, 20, 65])
def test_neighbours_are_as_likely_to_be_any_pair(n):
    """Samples that often share a batch would make its gradient noisier, or less so."""
    many = np.stack([order(n, seed) for seed in range(1000)])
    steps = (np.diff(many, axis=1) % n).ravel()  # 1 to n - 1, each alike
    assert abs(excess(np.bincount(steps, minlength=n)[1:], n - 1)) < 6


@pytest.mark.parametrize("n", [1437, 10**5, 10**9, 2**62])
def test_numbers_follow_neither_their_positions_nor_their_neighbours(n):
    positions = np.arange(min(n, 50_000))
    values = Permutation(n, seed=3)(positions) / n
    limit = 6 / math.sqrt(len(positions))
    assert abs(np.corrcoef(positions, values)[0, 1]) < limit
    for distance in (1, 2, 32, 1024):
        assert abs(np.corrcoef(values[distance:], values[:-distance])[0, 1]) < limit
    tenths = np.bincount((values * 10).astype(int), minlength=10)
    assert (abs(tenths - len(values) / 10) < 6 * math.sqrt(len(values) / 10)).all()


@pytest.mark.parametrize("n", [1437, 10**9])
def test_epochs_and_seeds_have_nothing_to_do_with_each_other(n):
    positions = np.arange(1437)
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2**63 - 1, 0)]
    orders = [Permutation(n, seed_for("order", *place))(positions) for place in places]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 6 / math.sqrt(len(positions))
            assert (one == other).sum() < 12  # Poisson with mean 1, or less


@pytest.mark.parametrize("n", [9, 49, 64, 81])
def test_odd_and_even_orders_are_alike_in_number(n):
    """Rounds over two odd sides would give even orders only."""

    def swaps(values):
        seen, cycles = set(), 0
        for start in range(n):
            cycles += start not in seen
            place = start
            while place not in seen:
                seen.add(place)
                place = values[place]
        return n - cycles

    odd = sum(swaps(order(n, seed).tolist()) % 2 for seed in range(400))
    assert abs(odd - 200) < 6 * 10


def test_memory_does_not_grow_with_the_samples():
    peaks = []
    for n in (10**5, 10**9, 2**62):
        tracemalloc.start()
        Permutation(n, seed=0)(np.arange(4096) + n // 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 10 * 4096 * 8
    assert max(peaks) < 1.2 * min(peaks)


def train_digits(order_of, seed):
    """Held-out loss and accuracy after two epochs of plain SGD."""
    (inputs, targets), (held_out, labels) = (
        (torch.from_numpy(digits.inputs), torch.from_numpy(digits.targets))
        for digits in (Digits("train"), Digits("eval"))
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(64, [32], 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(2):
        for batch in order_of(seed, epoch).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        outputs = model(held_out)
        right = (outputs.argmax(1) == labels).float().mean().item()
        return nn.functional.cross_entropy(outputs, labels).item(), right


def furthest_apart(one, other):
    """Largest difference of two empirical distribution functions, in samples of n."""
    places = np.union1d(one, other)
    below = (np.searchsorted(np.sort(each), places, side="right") for each in (one, other))
    return int(np.abs(np.subtract(*below)).max())


def chance_of(apart, n):
    """Chance that two times n draws from one distribution are that far apart, or further.

    Source:
        Gnedenko, Koroljuk 1951; reflections of a walk of 2 n steps. Ties make it smaller.
    """
    ways = range(1, n // apart + 1)
    return (
        2
        * sum((-1) ** (j + 1) * math.comb(2 * n, n - j * apart) for j in ways)
        / math.comb(2 * n, n)
    )


def test_the_chance_is_right():
    """Two draws each, in one of 6 orders: aabb and bbaa are 2 apart."""
    assert chance_of(2, 2) == pytest.approx(2 / 6)
    assert chance_of(1, 2) == pytest.approx(1)
    assert furthest_apart([1, 2], [3, 4]) == 2
    assert furthest_apart([1, 4], [2, 3]) == 1


def test_training_goes_as_with_the_permutations_of_torch():
    """12 seeds each, by the test of Kolmogorov and Smirnov; chance alone fails one in 1000."""

    def ours(seed, epoch):
        return torch.from_numpy(order(1437, seed_for("order", seed, epoch)))

    def of_torch(seed, epoch):
        generator = torch.Generator().manual_seed(seed_for("order", seed, epoch))
        return torch.randperm(1437, generator=generator)

    def by_class(seed, epoch):
        return torch.from_numpy(np.argsort(Digits("train").targets, kind="stable"))

    scores = {
        order_of: np.array([train_digits(order_of, seed) for seed in range(12)]).T
        for order_of in (ours, of_torch, by_class)
    }
    for mine, theirs, sorted_ in zip(*scores.values(), strict=True):  # losses, then accuracies
        assert chance_of(furthest_apart(mine, theirs), 12) > 1e-3
        assert chance_of(furthest_apart(sorted_, theirs), 12) < 1e-6  # the comparison can fail
