"""The command as a user calls it, with real processes."""

import json
import os
import subprocess
import sys

import commands
import pytest
from limits import WAIT_S
from ranks import rank_environment

from ddp_sgd.doctor.__main__ import main
from ddp_sgd.errors import ExitCode
from ddp_sgd.host import free_port

PEER, CONFIG = ExitCode.PEER, ExitCode.CONFIG
COMMAND = [sys.executable, "-m", "ddp_sgd.doctor"]


@pytest.fixture
def environment(tmp_path):
    """The environment of a user without a launcher, in a folder of their own."""
    foreign = ("SLURM_", "DDP_SGD_", "TORCHELASTIC_", *rank_environment(0, 1, 1))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "DDP_SGD_OUTPUT_DIR": str(tmp_path / "runs"),
        "DDP_SGD_RUNTIME__DEVICE": "cpu",
    }


def run_as_ranks(environment, *per_rank, world_size=None):
    """Start one process for each mapping of variables; return code, stdout and stderr of each."""
    port = free_port()
    size = world_size or len(per_rank)
    ranks = [
        commands.Popen(
            COMMAND,
            env=environment | rank_environment(int(own.get("RANK", rank)), size, port) | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(per_rank)
    ]
    try:
        said = [rank.communicate(timeout=WAIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *each) for rank, each in zip(ranks, said, strict=True)]


def errors(text):
    return [line for line in text.splitlines() if line.startswith("ddp_sgd: error: ")]


def test_alone(environment, tmp_path):
    done = commands.run(COMMAND, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *_, result, last = done.stdout.splitlines()
    assert result == "the only rank is ready"
    row = json.loads(last)
    assert (row["exit_code"], row["world_size"], len(row["ranks"])) == (0, 1, 1)
    assert not (tmp_path / "runs").exists()


def test_two_ranks_under_torchrun(environment):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = commands.run(
        [*torchrun, "-m", "ddp_sgd.doctor"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ranks  host ")
    assert lines[1].startswith("0-1 ")
    assert lines[-2] == "all 2 ranks on 1 host agree and reach each other"
    row = json.loads(lines[-1])
    assert [each["num_bytes"] for each in row["all_reduce"]] == [4, 4096, 65536, 2**20, 2**24]
    assert abs(row["ranks"][1]["clock"]["ahead_s"]) < 1.0
    assert done.stdout.count("{") == done.stdout.count("}")  # rank 0 only


def test_two_tasks_under_srun(environment):
    job = {
        "SLURM_JOB_ID": str(free_port() + 10_000),  # the port follows from it
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    tasks = [
        commands.Popen(
            COMMAND,
            env=environment | job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    try:
        said = [task.communicate(timeout=WAIT_S)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0]
    assert said[0].splitlines()[-2] == "all 2 ranks on 1 host agree and reach each other"
    assert said[1] == ""


def test_another_configuration_on_one_rank_is_shown(environment):
    first, second = run_as_ranks(environment, {}, {"DDP_SGD_OPTIM__LR": "0.2"})
    assert (first[0], second[0]) == (CONFIG, CONFIG)
    fault, last = first[1].splitlines()[-2:]
    assert fault.startswith("fault: optim.lr is 0.05 on rank 0 (")
    assert " and 0.2 on rank 1 (" in fault
    assert json.loads(last)["all_reduce"] == []
    assert second[1:] == ("", "")


def test_a_rank_that_never_comes_is_named(environment):
    environment |= {"DDP_SGD_RUNTIME__TIMEOUT_S": "20"}
    own = [{"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "2", "LOCAL_RANK": "2"}]
    first, third = run_as_ranks(environment, *own, world_size=3)
    assert (first[0], third[0]) == (PEER, PEER)
    assert first[1].splitlines()[1].startswith("0,2 ")
    fault, last = first[1].splitlines()[-2:]
    assert fault.startswith("fault: rank 1 (")  # its host is that of its neighbours
    assert "of 3 did not come; look whether every rank was started" in fault
    assert json.loads(last)["exit_code"] == 69
    assert third[1] == ""


SEVERAL_HOSTS = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_an_endpoint_on_the_own_host_is_reported_at_once(environment):
    """Nobody else is started, and the timeout is long: only a look at the name can tell."""
    environment |= {"DDP_SGD_RUNTIME__TIMEOUT_S": "3600"}
    own = SEVERAL_HOSTS | {"RANK": "1", "MASTER_ADDR": "localhost"}
    ((code, out, err),) = run_as_ranks(environment, own, world_size=2)
    assert (code, out) == (CONFIG, "")
    (line,) = errors(err)
    assert "MASTER_ADDR is localhost, which resolves to " in line
    assert ": every host would look for rank 0 on itself; set MASTER_ADDR to a name" in line


def test_a_name_that_this_host_does_not_know_is_reported_at_once(environment):
    environment |= {"DDP_SGD_RUNTIME__TIMEOUT_S": "3600"}
    own = SEVERAL_HOSTS | {"RANK": "1", "MASTER_ADDR": "nowhere.invalid"}
    ((code, _, err),) = run_as_ranks(environment, own, world_size=2)
    assert code == CONFIG
    assert "MASTER_ADDR is nowhere.invalid, which " in errors(err)[0]


def test_without_rank_0_one_rank_of_the_host_tells(environment):
    environment |= {"DDP_SGD_RUNTIME__TIMEOUT_S": "2"}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank - 1)} for rank in (1, 2)]
    told, silent = run_as_ranks(environment, *own, world_size=3)
    assert (told[0], silent[0]) == (PEER, PEER)
    (line,) = errors(told[2])
    assert "rank 1 of 3 could not join at 127.0.0.1:" in line
    assert errors(silent[2]) == []


def test_an_environment_that_is_half_set(environment, monkeypatch, capsys):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    assert main([]) == CONFIG
    assert "are not set, though RANK is" in capsys.readouterr().err


def test_help_names_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m ddp_sgd.doctor")
    words = " ".join(out.split())
    assert all(f"{code}: " in words for code in (64, 69, 73))
