"""Shells of a real SLURM that have the variables of task 0, and no other tasks."""

import shlex
import sys

import pytest
from launching import environment
from slurm.cluster import slurm

from ddp_sgd.errors import ExitCode

TRAIN = f"{sys.executable} -m ddp_sgd.train --epochs=1 --runtime.timeout_s=60"
SIZE = ("--nodes=2", "--ntasks=2")
SHELLS = {"salloc": ("salloc", *SIZE), "srun --pty": ("srun", *SIZE, "--pty", "bash")}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("cluster"), nodes=2) as cluster:
        yield cluster


def at_a_terminal(cluster, command, typed=""):
    """Return what a terminal shows in which a command runs and lines are typed."""
    shown = f"script --quiet --return --command {shlex.quote(shlex.join(command))} /dev/null"
    ours = environment(SLURM_CONF=str(cluster.configuration), SHELL="/bin/bash")
    return cluster.run("bash", "-c", f"printf %s {shlex.quote(typed)} | {shown}; true", env=ours)


def lines_typed(*commands):
    return "".join(f"{command}; echo code=$?\n" for command in commands) + "exit\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_interactive_shell_is_told_of_before_anybody_is_waited_for(
    shell, cluster, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    all_tasks = f"srun --overlap --ntasks=2 {TRAIN} --name=all </dev/null"  # it reads what is typed
    remedies = (all_tasks, f"env -u SLURM_PROCID {TRAIN}")
    shown = at_a_terminal(cluster, SHELLS[shell], lines_typed(TRAIN, *remedies))
    assert (
        "ddp_sgd: error: SLURM_NTASKS is 2, but this process was started alone, from an "
        "interactive shell; start all with srun --overlap --ntasks=2 in front of the command, or "
        "unset SLURM_PROCID to run one process."
    ) in shown
    codes = [line for line in shown.splitlines() if line.startswith("code=")]
    assert codes == [f"code={int(ExitCode.CONFIG)}", "code=0", "code=0"], shown


def test_batch_script_is_told_of_before_anybody_is_waited_for(cluster, tmp_path):
    remedy = f"srun --overlap --ntasks=2 {TRAIN} --name=all"
    job = cluster.wrap(tmp_path, f"{remedy}; {TRAIN}", sbatch=SIZE)
    assert job.end() == ("FAILED", 0), job.said
    assert (
        "SLURM_NTASKS is 2, but this process was started alone, from the batch script" in job.said
    )
    assert job.facts()["ExitCode"] == f"{int(ExitCode.CONFIG)}:0"
    assert (tmp_path / "runs" / "all" / "result.json").exists()


def test_ranks_at_a_terminal_are_no_shell(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = at_a_terminal(cluster, ("srun", *SIZE, "--pty", *shlex.split(TRAIN)))
    assert "2 ranks x 32" in shown
    assert "finished: 23 steps" in shown
