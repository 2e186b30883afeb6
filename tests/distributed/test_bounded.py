import threading

import pytest

from ddp_sgd.distributed.bounded import call_within


def test_value_and_error_come_through():
    assert call_within(20, lambda: 7) == 7
    with pytest.raises(KeyError):
        call_within(20, {}.popitem)


def test_wait_is_bounded():
    never = threading.Event()
    with pytest.raises(TimeoutError, match="there is no answer"):
        call_within(0.05, never.wait)
    never.set()
