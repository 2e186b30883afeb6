from itertools import product

import pytest

from ddp_sgd.seeds import seed_for


def test_equal_places_give_equal_seeds_on_every_machine():
    assert seed_for("order", 0, 1) == 4361090855987773765
    assert seed_for("order", 7) == seed_for("order", 7)


def test_neighbouring_places_share_no_seed():
    seeds = {
        seed_for(purpose, seed, epoch, index)
        for purpose, seed, epoch, index in product(
            ("order", "sample"), range(4), range(-1, 4), range(9)
        )
    }
    assert len(seeds) == 2 * 4 * 5 * 9


def test_seeds_fit_torch_and_numpy():
    assert all(0 <= seed_for("model", 2**63 - 1, place) < 2**63 for place in range(100))


def test_bits_are_even():
    seeds = [seed_for("order", 0, epoch) for epoch in range(2000)]
    for bit in range(63):
        share = sum(seed >> bit & 1 for seed in seeds) / len(seeds)
        assert share == pytest.approx(0.5, abs=0.06)  # five standard deviations of a fair coin
