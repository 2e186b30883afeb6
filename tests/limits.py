"""How long tests wait for what they expect: generously, since only a test that fails waits so long.

The factor of the environment, ``DDP_SGD_TIMEOUT_FACTOR``, raises this, and pytest's own timeout.
"""

from ddp_sgd.host import scaled

__all__ = ["WAIT_S", "scaled"]

WAIT_S = scaled(240.0)
"""Longest wait for a process, a thread or an event."""
