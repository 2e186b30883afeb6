import random
from itertools import product

import numpy as np
import pytest
import torch

from ddp_sgd.seeds import ReadingRandomness, seed_for


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


DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "random": random.random,
    "a cached number of random": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "a cached number of numpy": np.random.randn,
    "nothing": lambda: 0.5,
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("others", DRAWS)
@pytest.mark.parametrize("late", [False, True])
def test_a_reading_depends_on_its_seed_only(name, others, late):
    """Whatever was read before, whoever draws in between, and if only some readings draw."""
    expected = {}
    for seed in range(6):
        ReadingRandomness.seed(seed)
        expected[seed] = 0.0 if late and seed % 3 else DRAWS[name]()
    randomness = ReadingRandomness()
    for seed in (1, 2, 0, 4, 5, 3, 0, 1):
        value = randomness.read(seed, lambda seed=seed: 0.0 if late and seed % 3 else DRAWS[name]())
        assert value == expected[seed]
        if seed == 4:
            DRAWS[others]()


def test_generators_that_nothing_draws_from_are_left_alone(monkeypatch):
    monkeypatch.setattr(ReadingRandomness, "_twins", None)
    randomness, calls = ReadingRandomness(), []
    randomness.read(1, lambda: calls.append(0))
    before = np.random.get_state()[2]
    for seed in range(20):
        randomness.read(seed, lambda: calls.append(torch.rand(())))
    assert len(calls) == 21
    assert np.random.get_state()[2] != before  # it was not seeded again, and goes on


@pytest.mark.parametrize("seeds_all", [False, True])
def test_a_reading_that_draws_is_done_again_once(seeds_all, monkeypatch):
    monkeypatch.setattr(ReadingRandomness, "_twins", None)
    randomness, calls = ReadingRandomness(seeds_all=seeds_all), []
    for seed in range(3):
        randomness.read(seed, lambda: calls.append(random.random()))
    assert len(calls) == (3 if seeds_all else 4)
