"""Processes die, torchrun starts them again, and the run ends as if nothing had happened.

``python -m pytest tests/test_restarts.py --restarts=20 -k kills`` kills twenty times in one run,
and prints how long each recovery took; ``make soak`` does so.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ddp_sgd.distributed.ranks import free_port
from ddp_sgd.errors import ExitCode

ROOT = Path(__file__).parent.parent
LOCAL = ROOT / "launch" / "local.sh"
MULTINODE = ROOT / "launch" / "multinode.sh"
DEADLINE_S = 100
SCRIPTS = []
RUN = ("--log.every_steps=1", "--checkpoint.every_steps=20", "--checkpoint.keep=2")
EPOCHS = 12
"""So that a kill that comes two saves after the last one still finds the run under way."""
KILLS = int(os.environ.get("DDP_SGD_TEST_RESTARTS", "3"))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    for script in SCRIPTS:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if script.poll() is None:
                script.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    script.wait(DEADLINE_S)
    SCRIPTS.clear()
