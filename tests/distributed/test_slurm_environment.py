import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from ddp_sgd.distributed.environment import (
    attempt_of_job,
    end_of_job,
    find_lone_shell,
    times_requeued,
)


@pytest.mark.parametrize(
    ("environ", "life", "requeues"),
    [
        ({}, None, 0),
        ({"SLURM_JOB_ID": "17"}, "17.0", 0),
        ({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}, "17.2", 2),
        ({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": ""}, "17.0", 0),
    ],
)
def test_life_of_a_job(environ, life, requeues):
    assert attempt_of_job(environ) == life
    assert times_requeued(environ) == requeues


@pytest.mark.parametrize(("said", "end"), [("1798135200", 1798135200.0), ("UNLIMITED", None)])
def test_end_that_slurm_puts_into_the_environment(said, end):
    assert end_of_job({"SLURM_JOB_END_TIME": said}) == end


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("2026-12-24T18:00:00", 1798135200.0), ("N/A", None), ("", None)],
)
@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}, "17_3"),
    ],
)
def test_an_older_slurm_is_asked(environ, asked, answer, expected, tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$2" = --jobs={asked} ] && echo "{answer}"\n')
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        assert end_of_job(environ) == expected
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_slurm_that_does_not_answer_sets_no_end(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert end_of_job({"SLURM_JOB_ID": "17"}) is None


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17"}, None),  # of which somebody kept the variables
        ({"SLURM_TASK_PID": "1"}, "the batch script"),
        ({"SLURM_TASK_PID": "1", "SLURM_STEP_ID": "0"}, None),
        ({"SLURM_TASK_PID": "1", "SLURM_STEPID": "0"}, None),
        ({"SLURM_TASK_PID": "1", "SLURM_STEP_ID": "4294967290"}, "an interactive shell"),
        ({"SLURM_TASK_PID": "?", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "9"}, None),
    ],
)
def test_shell_is_known_by_its_variables(environ, found):
    assert find_lone_shell(environ) == found


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["bash"], "an interactive shell"),
        (["sh"], "an interactive shell"),
        (["bash", "--norc"], "an interactive shell"),
        (["bash", "-c", "read line; exit"], None),
        (["cat"], None),
    ],
)
def test_shell_of_a_terminal_is_known_by_its_command(command, found):
    with subprocess.Popen(command, stdin=subprocess.PIPE) as task:
        while not Path(f"/proc/{task.pid}/cmdline").read_text():
            time.sleep(0.01)  # the kernel fills it in a bit after the start
        environ = {"SLURM_TASK_PID": str(task.pid), "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "9"}
        assert find_lone_shell(environ) == found
        del environ["SLURM_PTY_PORT"]
        assert find_lone_shell(environ) is None
        task.stdin.close()
