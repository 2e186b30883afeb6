import random

import numpy as np
import torch

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.side_effects import undo_side_effects
from ddp_sgd.seeds import Randomness, model_generators

CPU = torch.device("cpu")


def drawing(*draws):
    randomness = Randomness(CPU)
    with undo_side_effects([], randomness.generators) as effects:
        for draw in draws:
            draw()
        randomness.follow(
            draws_from_random=effects.draws_from_random, draws_from_numpy=effects.draws_from_numpy
        )
    return randomness


def seed_step(randomness, step, rank):
    randomness.seed(Runtime(rank=rank, world_size=3).seed_for("model", 0, step))


def drawn():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_generators_of_the_host():
    assert model_generators(CPU) == (torch.default_generator,)


def test_each_step_and_rank_draws_its_own_numbers():
    randomness = drawing(random.random, np.random.rand)
    seen = set()
    for step in range(3):
        for rank in range(3):
            seed_step(randomness, step, rank)
            first = drawn()
            seed_step(randomness, step, rank)
            assert drawn() == first
            seen.update(first)
    assert len(seen) == 3 * 3 * 3


def test_chunks_of_an_evaluation_have_seeds_of_their_own():
    randomness = drawing()
    randomness.seed_chunk(0, 1)
    chunk = torch.rand(())
    seed_step(randomness, 1, 0)
    assert torch.rand(()) != chunk
    randomness.seed_chunk(0, 1)
    assert torch.rand(()) == chunk


def test_only_what_is_drawn_from_is_seeded():
    for draws, moved in (((), (False, False)), ((random.random,), (True, False))):
        randomness = drawing(*draws)
        before = random.getstate(), np.random.get_state()[1].tolist()
        randomness.seed(7)
        now = random.getstate(), np.random.get_state()[1].tolist()
        assert tuple(a != b for a, b in zip(before, now, strict=True)) == moved
