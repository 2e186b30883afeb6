"""What keeps a run from its first step; each writes a mark when it is reached."""

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path

from torch import nn
from user_code import Zeros


def _reach_mark():
    if rank_is_stuck():
        Path(os.environ["MARK"]).touch()


def rank_is_stuck():
    return os.environ.get("RANK", "0") == os.environ.get("STUCK_RANK", "0")


def wait_in_python():
    while True:
        time.sleep(60)


def wait_in_c():
    """The interpreter is free, but handlers of signals wait for a call that does not return."""
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


def swallow_everything():
    while True:
        with suppress(BaseException):
            time.sleep(60)


def be_stuck(how):
    _reach_mark()
    if rank_is_stuck():
        {"python": wait_in_python, "c": wait_in_c, "swallow": swallow_everything}[how]()


class StuckModel(nn.Linear):
    def __init__(self, how):
        super().__init__(4, 10)
        be_stuck(how)


class StuckData(Zeros):
    def __init__(self, how):
        super().__init__(64)
        be_stuck(how)


class StuckSamples(Zeros):
    def __init__(self, how):
        super().__init__(64)
        self._how = how

    def __getitem__(self, index):
        be_stuck(self._how)
        return super().__getitem__(index)


class StuckLater(Zeros):
    """Sample 40 cannot be got hold of."""

    def __init__(self):
        super().__init__(64)

    def __getitem__(self, index):
        if index == 40:
            _reach_mark()
            wait_in_python()
        return super().__getitem__(index)


class StuckForward(nn.Linear):
    def __init__(self, how, after=0):
        super().__init__(4, 10)
        self._how = how
        self._left = after

    def forward(self, inputs):
        if self._left:
            self._left -= 1
        else:
            be_stuck(self._how)
        return super().forward(inputs)
