"""Timeouts that are fixed in the code, and the factor that raises all of them.

Timeouts of the configuration (``runtime.timeout_s``, ``runtime.hang_s``) are the user's, and are
not multiplied. No torch.
"""

import os
from collections.abc import Mapping

FACTOR = "DDP_SGD_TIMEOUT_FACTOR"
"""Environment variable that holds the factor, a number in [1, 1000]; 1 where it is not set."""

_MOST = 1000.0


def scaled(seconds: float) -> float:
    """Return a fixed timeout, multiplied by the factor of the environment.

    Args:
        seconds: Timeout on a machine that is not overloaded, in seconds.
    """
    return seconds * (timeout_factor(os.environ) or 1.0)


def timeout_factor(environ: Mapping[str, str]) -> float | None:
    """Return the factor that an environment sets.

    Args:
        environ: The environment, such as ``os.environ``.

    Returns:
        A number in [1, 1000]; None where the variable holds something else.
    """
    try:
        factor = float(environ.get(FACTOR) or "1")
    except ValueError:
        return None
    return factor if 1.0 <= factor <= _MOST else None
