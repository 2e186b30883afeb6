"""Random seeds as a pure function of their use, so that no generator state is saved."""

import struct
from hashlib import blake2b


def seed_for(purpose: str, seed: int, *place: int) -> int:
    """Mix the seed of a run with a place in it.

    Equal arguments give equal seeds on every machine; any other argument gives an unrelated one.

    Args:
        purpose: What the numbers are for, such as ``order`` or ``sample``; keeps streams apart.
        seed: Seed of the run, in [0, 2^63).
        place: Coordinates such as epoch, step, rank or index, each in [-2^63, 2^63).

    Returns:
        A seed in [0, 2^63).

    Example:
        >>> seed_for("order", 0, 1) == seed_for("order", 1, 0)
        False
    """
    message = purpose.encode() + struct.pack(f"<{1 + len(place)}q", seed, *place)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little") >> 1
