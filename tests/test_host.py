import os
import subprocess
import sys
import threading

import pytest
from ranks import run_ranks

from ddp_sgd.host import batch_scheduling, leave_batch_scheduling, usable_cpus

ASK = "import os; print(os.sched_getscheduler(0))"


def test_there_is_one_at_least():
    assert usable_cpus() >= 1


def test_threads_and_processes_that_are_started_meanwhile_wait_for_a_cpu():
    policies = []
    with batch_scheduling():
        thread = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
        thread.start()
        thread.join()
        with batch_scheduling():
            policies.append(os.sched_getscheduler(0))
        policies.append(os.sched_getscheduler(0))
        asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, check=True)
        policies.append(int(asked.stdout))
    assert policies == [os.SCHED_BATCH] * 4
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_who_works_in_short_turns_leaves_it():
    with batch_scheduling():
        leave_batch_scheduling()
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_policy_that_somebody_chose_stays():
    """In a process of its own, which cannot get rid of this one without a privilege."""
    code = (
        "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
        "from ddp_sgd.host import batch_scheduling\n"
        "with batch_scheduling(): print(os.sched_getscheduler(0) == os.SCHED_IDLE)"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert asked.stdout == b"True\n"


def refuse(*_):
    raise PermissionError


@pytest.mark.parametrize("name", ["sched_setscheduler", "sched_getscheduler"])
@pytest.mark.parametrize("change", [("setattr", refuse), ("delattr",)])
def test_where_it_is_not_to_be_had_all_goes_on(change, name, monkeypatch):
    with monkeypatch.context() as patch:
        getattr(patch, change[0])(os, name, *change[1:])
        with batch_scheduling():
            pass
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def policies_of_all_threads(_):
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}  # noqa: PTH208


def test_gloo_too_waits_for_a_cpu():
    assert run_ranks(2, policies_of_all_threads) == [{os.SCHED_BATCH}] * 2
