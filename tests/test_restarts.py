"""Processes die, torchrun starts them again, and the run ends as if nothing had happened.

``RESTARTS=20 python -m pytest tests/test_restarts.py -s`` runs the long tests, too, kills twenty
times in one run, and prints how long recoveries took; ``make soak`` does so.
"""

import json
import os
import signal
import statistics
import sys
import time

import pytest
import torch
from launching import LOCAL, MULTINODE, Launch, is_alive, kill

from ddp_sgd.errors import ExitCode
from ddp_sgd.host import free_port

KILLS = int(os.environ.get("RESTARTS", "3"))
EPOCHS = 8
DATA_SIZE = 1437
STARTED = []

soak = pytest.mark.skipif("RESTARTS" not in os.environ, reason="takes long; set RESTARTS=20")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def tell(text):
    sys.stdout.write(f"{text}\n")


def launch(folder, script, *options, pause_s=0.1, **variables):
    patience = f"{{pause_s: {pause_s}, until: {folder / 'hurry'}}}"
    model = f"--model={{class_path: user_code.Slow, init_args: {patience}}}"
    often = ("--log.every_steps=1", "--checkpoint.every_steps=5")
    length = f"--epochs={EPOCHS}"
    STARTED.append(Launch(folder, script, *options, length, model, *often, **variables))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    for run in STARTED:
        run.clean_up()
    STARTED.clear()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = launch(tmp_path_factory.mktemp("undisturbed"), LOCAL, "--nproc=2", pause_s=0.0)
    assert run.end() == ExitCode.DONE, run.said
    return run


def assert_every_sample_once(run, undisturbed):
    """The journal has the rows of the undisturbed run, none twice and none missing."""
    place = [(row["step"], row["samples"], row["train/lr"]) for row in run.rows()]
    assert place == [(row["step"], row["samples"], row["train/lr"]) for row in undisturbed.rows()]
    assert place[-1][1] == EPOCHS * DATA_SIZE
    assert run.result()["status"] == "finished"


def weights(run):
    newest = max((run.run_folder / "checkpoints").glob("*.pt"), key=lambda path: path.name)
    state = torch.load(newest, weights_only=True)
    return torch.cat([value.double().flatten() for value in state["model"].values()])


def kill_after_progress(run, victim, rows):
    """Kill a process as soon as the run has written so many rows; return when."""
    begin = time.time()
    run.wait_until(lambda: len(run.rows_since(begin)) >= rows and victim() is not None)
    killed = victim()
    kill(killed)
    return time.time()


def kill_rank_and_wait(run, rank, *, rows):
    """Return how long it took from the kill to the next row of metrics, in seconds."""
    instant = kill_after_progress(run, lambda: run.ranks.get(rank), rows)
    run.wait_until(lambda: run.rows_since(instant))
    return run.rows_since(instant)[0]["time"] - instant


@pytest.mark.timeout(600 + 30 * KILLS)
def test_run_goes_on_where_a_rank_is_killed_again_and_again(undisturbed, tmp_path):
    run = launch(tmp_path, LOCAL, "--nproc=2", f"--max-restarts={KILLS + 5}")
    recoveries = [
        kill_rank_and_wait(run, number % 2, rows=1 + 4 * (number % 3)) for number in range(KILLS)
    ]
    (tmp_path / "hurry").touch()
    assert run.end() == ExitCode.DONE, run.said
    assert len(run.rows("resume")) == KILLS
    assert run.result()["weights_digest"] == undisturbed.result()["weights_digest"]
    assert_every_sample_once(run, undisturbed)
    recoveries.sort()
    p95 = recoveries[int(0.95 * (KILLS - 1))]
    tell(f"recovery of {KILLS}: median {statistics.median(recoveries):.1f} s, p95 {p95:.1f} s")


@soak
def test_run_goes_on_where_torchrun_is_killed(undisturbed, tmp_path):
    run = launch(tmp_path, LOCAL, "--nproc=2", "--max-restarts=1", "--runtime.hang_s=20")
    ranks = run.wait_until(lambda: run.rows() and run.ranks)
    kill_after_progress(run, lambda: run.agent, 3)
    (tmp_path / "hurry").touch()
    assert run.end() == ExitCode.DONE, run.said
    assert "torchrun was ended by SIGKILL; it is started again (1 of 1)" in run.said
    assert not any(map(is_alive, ranks.values()))
    assert run.result()["weights_digest"] == undisturbed.result()["weights_digest"]
    assert_every_sample_once(run, undisturbed)


@soak
def test_torchrun_that_is_killed_for_good_is_code_69(tmp_path):
    run = launch(tmp_path, LOCAL, "--nproc=1")
    kill_after_progress(run, lambda: run.agent, 1)
    assert run.end() == ExitCode.PEER
    assert "ddp_sgd: error: torchrun was ended by SIGKILL; its processes save and end" in run.said


def machine(folder, port, *options, pause_s=0.2, **variables):
    """One machine of an elastic run, which notices within moments that others are gone."""
    return launch(
        folder,
        MULTINODE,
        "--nnodes=1:2",
        "--nproc=1",
        "--runtime.hang_s=20",
        "--runtime.timeout_s=30",
        *options,
        pause_s=pause_s,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        PET_LOCAL_ADDR="127.0.0.1",
        **variables,
    )


def world_size(run, size):
    """Whether the run is going on with so many ranks."""
    last = next((r for r in reversed(run.rows("start") + run.rows("resume"))), None)
    return last and last["world_size"] == size and run.rows_since(last["time"])


def lose(machine):
    """End a machine as a cut power line would, but for its ranks, which become orphans."""
    orphans, agent = list(machine.ranks.values()), machine.agent
    kill(machine.script.pid)
    kill(agent)
    return orphans


def test_machines_leave_and_join_and_no_sample_is_lost(undisturbed, tmp_path):
    port = free_port()
    first = machine(tmp_path, port, NODE_RANK="0")
    second = machine(tmp_path, port, NODE_RANK="1")
    first.wait_until(lambda: world_size(first, 2))
    orphans = lose(second)
    instant = time.time()
    first.wait_until(lambda: world_size(first, 1))
    tell(f"alone after {first.rows_since(instant)[-1]['time'] - instant:.1f} s")
    assert not any(map(is_alive, orphans))
    instant = time.time()
    third = machine(tmp_path, port, NODE_RANK="1")
    first.wait_until(lambda: world_size(first, 2))
    (tmp_path / "hurry").touch()
    tell(f"together after {first.rows_since(instant)[-1]['time'] - instant:.1f} s")
    assert [first.end(), third.end()] == [0, 0], first.said + third.said
    sizes = [row["world_size"] for row in first.rows("start") + first.rows("resume")]
    assert sizes[-3:] == [2, 1, 2]
    assert_every_sample_once(first, undisturbed)
    torch.testing.assert_close(weights(first), weights(undisturbed), rtol=1e-6, atol=1e-7)


@soak
def test_run_goes_on_where_the_torchrun_is_killed_that_all_meet_at(undisturbed, tmp_path):
    port = free_port()
    first = machine(tmp_path, port, NODE_RANK="0")
    second = machine(tmp_path, port, NODE_RANK="1")
    first.wait_until(lambda: world_size(first, 2))
    kill(first.agent)
    instant = time.time()
    first.wait_until(lambda: first.rows("resume") and first.rows("resume")[-1]["time"] > instant)
    first.wait_until(lambda: world_size(first, 2))
    tell(f"together after {first.rows_since(instant)[-1]['time'] - instant:.1f} s")
    (tmp_path / "hurry").touch()
    assert [first.end(), second.end()] == [0, 0], first.said + second.said
    assert "torchrun lost the machine where all meet; it is started again" in second.said
    assert_every_sample_once(first, undisturbed)


@soak
def test_machine_where_all_meet_is_lost_for_good(tmp_path):
    port = free_port()
    first = machine(tmp_path, port, "--runtime.timeout_s=15", NODE_RANK="0")
    second = machine(tmp_path, port, "--runtime.timeout_s=15", NODE_RANK="1")
    first.wait_until(lambda: world_size(first, 2))
    orphans = lose(first)
    instant = time.monotonic()
    assert second.end() == ExitCode.PEER, second.said
    tell(f"given up after {time.monotonic() - instant:.1f} s")
    assert "ddp_sgd: error: " in second.said.splitlines()[-2]
    assert not any(map(is_alive, orphans))


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=soak)])
def test_machine_that_finds_no_others_ends_within_the_timeout(rank, tmp_path):
    start = time.monotonic()
    run = Launch(
        tmp_path,
        MULTINODE,
        "--nnodes=2",
        "--nproc=1",
        "--runtime.timeout_s=2.5",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        NODE_RANK=rank,
    )
    assert run.end() == ExitCode.PEER, run.said
    line = next(line for line in run.said.splitlines() if line.startswith("ddp_sgd: error: "))
    assert "2 machines at 127.0.0.1:" in line
    assert "did not come together within 3 s; 127.0.0.1 is another machine on every host" in line
    assert time.monotonic() - start > 3


def test_failure_at_the_same_step_three_times_ends_the_run(tmp_path):
    bad = "--data.train={class_path: user_code.RaisesAt, init_args: {at: 500, samples: 640}}"
    run = Launch(
        tmp_path,
        LOCAL,
        "--nproc=2",
        "--max-restarts=10",
        bad,
        "--model.init_args.inputs=4",
        "--data.eval=null",
    )
    assert run.end() == ExitCode.DATA, run.said
    result = run.result()
    assert (result["status"], result["exit_code"]) == ("failed", ExitCode.DATA)
    assert "data.train[500]" in result["error"]
    failures = (run.run_folder / "failures.jsonl").read_text().splitlines()
    assert ["gives_up" in json.loads(line) for line in failures] == [False, False, True]


@soak
def test_death_without_a_word_is_bounded_by_the_restarts(tmp_path):
    bad = "--data.train={class_path: user_code.DiesAt, init_args: {at: 500, signal: 11}}"
    run = Launch(
        tmp_path,
        LOCAL,
        "--nproc=2",
        "--max-restarts=1",
        bad,
        "--model.init_args.inputs=4",
        "--data.eval=null",
    )
    assert run.end() != ExitCode.DONE
    assert not (run.run_folder / "failures.jsonl").exists()


@pytest.mark.parametrize("restarts", [pytest.param(0, marks=soak), 3])
def test_signal_to_one_rank_stops_all_ranks(restarts, tmp_path):
    run = launch(tmp_path, LOCAL, "--nproc=2", f"--max-restarts={restarts}")
    run.wait_until(lambda: len(run.rows()) > 2 and 1 in run.ranks)
    rank, instant = run.ranks[1], time.time()
    kill(rank, signal.SIGTERM)
    kill(rank, signal.SIGTERM)
    assert run.end() == ExitCode.STOPPED, run.said
    result = run.result()
    assert result["status"] == "stopped"
    stop = run.rows("stop")[-1]  # torchrun may have begun again, and been stopped once more
    assert stop["step"] == result["step"]
    tell(f"stopped after {stop['time'] - instant:.2f} s, ended after {time.time() - instant:.2f} s")


@soak
def test_signal_to_torchrun_stops_all_ranks(tmp_path):
    run = launch(tmp_path, LOCAL, "--nproc=2", "--max-restarts=3")
    run.wait_until(lambda: len(run.rows()) > 2 and run.agent)
    instant = time.time()
    kill(run.agent, signal.SIGTERM)
    assert run.end() == ExitCode.STOPPED, run.said
    assert run.result()["status"] == "stopped"
    tell(f"ended after {time.time() - instant:.2f} s")
