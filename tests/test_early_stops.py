"""Signals before the first step: the run ends within moments, by code 75.

``RESTARTS=20 python -m pytest tests/test_early_stops.py`` sends forty at random moments instead of
four; ``make soak`` does so.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from launching import LOCAL, Launch, children, environment, is_alive, is_running, kill
from limits import WAIT_S, scaled
from ranks import rank_environment

from ddp_sgd.distributed.rendezvous import free_port
from ddp_sgd.errors import ExitCode

MOMENTS = 40 if "RESTARTS" in os.environ else 4
HONOURED_S = scaled(2.0)
GONE_S = scaled(5.0)
LINE = "ddp_sgd: stopped by {} before the first step; start again to go on.\n"
STARTED = []

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
        process.communicate()
    STARTED.clear()


def train(folder, *options, world_size=1, ranks=None, **variables):
    """Start ranks by hand; return the processes."""
    port, started = free_port(), []
    for rank in range(world_size) if ranks is None else ranks:
        ours = rank_environment(rank, world_size, port) if world_size > 1 else {}
        mark = {"MARK": str(folder / "mark")}
        command = [sys.executable, "-m", "ddp_sgd.train", f"--output_dir={folder}/runs", *options]
        started.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment(**ours, **mark, **variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    STARTED.extend(started)
    return started


def wait_for(path, processes):
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(processes, since):
    """Return the codes and what was said to stderr, and how long the ends took."""
    said = [process.communicate(timeout=WAIT_S)[1] for process in processes]
    return [process.returncode for process in processes], said, time.monotonic() - since


STUCK = [
    ("model", "StuckModel", "python"),
    ("model", "StuckModel", "c"),
    ("model", "StuckModel", "swallow"),
    ("model", "StuckForward", "python"),
    ("model", "StuckForward", "c"),
    ("data.train", "StuckData", "python"),
    ("data.train", "StuckSamples", "python"),
]


def _stuck(key, name, how):
    other = "data.train" if key == "model" else "model"
    theirs = {
        "model": "{class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 10}}",
        "data.train": "{class_path: user_code.Zeros, init_args: {samples: 64}}",
    }
    component = f"{{class_path: stuck_code.{name}, init_args: {{how: {how}}}}}"
    return f"--{key}={component}", f"--{other}={theirs[other]}", "--data.eval=null"


@pytest.mark.parametrize(("key", "name", "how"), STUCK)
def test_a_process_alone_ends_wherever_it_is_stuck(key, name, how, tmp_path):
    processes = train(tmp_path, *_stuck(key, name, how))
    wait_for(tmp_path / "mark", processes)
    since = time.monotonic()
    processes[0].send_signal(signal.SIGTERM)
    codes, said, took_s = end(processes, since)
    assert codes == [ExitCode.STOPPED], said
    assert said == [LINE.format("SIGTERM")]
    assert took_s < HONOURED_S
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["step"]) == ("stopped", 75, 0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["python", "c"])
def test_a_signal_to_one_rank_ends_all(rank, how, tmp_path):
    """One rank is stuck, the others wait for it in a collective."""
    processes = train(tmp_path, *_stuck("model", "StuckForward", how), world_size=3, STUCK_RANK="2")
    wait_for(tmp_path / "mark", processes)
    since = time.monotonic()
    processes[rank].send_signal(signal.SIGINT)
    processes[2].send_signal(signal.SIGINT)
    codes, said, took_s = end(processes, since)
    assert codes == [ExitCode.STOPPED] * 3, said
    assert "".join(said) == LINE.format("SIGINT")
    assert took_s < GONE_S


def test_a_rank_that_waits_for_the_others_ends(tmp_path):
    processes = train(tmp_path, world_size=2, ranks=[0])
    time.sleep(scaled(0.5))
    deadline = time.monotonic() + WAIT_S
    while not _listens(processes[0].pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    since = time.monotonic()
    processes[0].send_signal(signal.SIGTERM)
    codes, said, took_s = end(processes, since)
    assert (codes, said) == ([ExitCode.STOPPED], [LINE.format("SIGTERM")])
    assert took_s < HONOURED_S
    assert not (tmp_path / "runs").exists()


def _listens(pid):
    """Whether a process hosts the store."""
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            targets.append(str(link.readlink()))
    sockets = {name.removeprefix("socket:[").rstrip("]") for name in targets if "socket:" in name}
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return any(words[3] == "0A" and words[9] in sockets for words in lines)


def is_pending(pid, number):
    """Whether a signal has been sent to a process, but not delivered."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("ShdPnd:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def assert_ends_at_the_second_interrupt(processes):
    processes[0].send_signal(signal.SIGINT)
    deadline = time.monotonic() + WAIT_S
    while is_pending(processes[0].pid, signal.SIGINT):  # it would swallow the next one
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[0].send_signal(signal.SIGINT)
    codes, said, _ = end(processes, time.monotonic())
    assert (codes, said) == ([128 + signal.SIGINT], [""])


def test_a_second_interrupt_does_not_wait_for_the_end_of_the_step(tmp_path):
    slow = "--model={class_path: user_code.Slow, init_args: {pause_s: 2.0}}"
    processes = train(tmp_path, slow, "--epochs=100000", "--log.every_steps=1")
    journal = tmp_path / "runs" / "digits" / "metrics.jsonl"
    wait_for(journal, processes)
    while '"event": "train"' not in journal.read_text():
        time.sleep(0.01)
    assert_ends_at_the_second_interrupt(processes)


def wait_until_asleep(pid):
    """Wait until the main thread of a process waits in the system, ten times in a row."""
    path, deadline, seen = Path(f"/proc/{pid}/task/{pid}/stat"), time.monotonic() + WAIT_S, 0
    while seen < 10:
        assert time.monotonic() < deadline
        seen = seen + 1 if path.read_text().rpartition(")")[2].split()[0] == "S" else 0
        time.sleep(0.01)


def test_a_second_interrupt_ends_a_process_that_is_stuck(tmp_path):
    processes = train(tmp_path, *_stuck("model", "StuckModel", "c"))
    wait_for(tmp_path / "mark", processes)
    wait_until_asleep(processes[0].pid)  # before it is in C, the first one ends it
    assert_ends_at_the_second_interrupt(processes)


def test_plain_torchrun_has_the_stop_in_its_error_files(tmp_path):
    port = free_port()
    launch = ["--nproc-per-node=2", f"--master-port={port}", f"--log-dir={tmp_path}/logs"]
    options = [f"--output_dir={tmp_path}/runs", *_stuck("model", "StuckForward", "python")]
    agent = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "ddp_sgd.train", *options],
        cwd=tmp_path,
        env=environment(MARK=str(tmp_path / "mark")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(agent)
    wait_for(tmp_path / "mark", [agent])
    ranks = children(agent.pid)
    since = time.monotonic()
    agent.send_signal(signal.SIGTERM)
    (code,), said, took_s = end([agent], since)
    assert code == 1, said
    assert took_s < GONE_S
    assert not any(map(is_alive, ranks))
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("logs/*/*/*/error.json")]
    assert [report["message"]["errorCode"] for report in reports] == [75, 75]
    for report in reports:
        assert report["message"]["message"].startswith("stopped by SIGTERM before the first step")


def test_a_loader_process_that_ends_along_with_a_stop_belongs_to_it(tmp_path):
    options = _stuck("data.train", "StuckLater", "python")[1:]
    data = ("--data.train.class_path=stuck_code.StuckLater", "--data.workers=1")
    (process,) = train(tmp_path, *options, *data)
    wait_for(tmp_path / "mark", [process])
    (worker,) = [pid for pid in children(process.pid) if is_running(pid, "ddp_sgd.train")]
    process.send_signal(signal.SIGTERM)
    kill(worker)
    codes, said, _ = end([process], time.monotonic())
    assert codes == [ExitCode.STOPPED], said
    assert said[0].startswith("ddp_sgd: stopped by SIGTERM, which ended a loader process")
    assert said[0].count("\n") == 1
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("stopped", 75)


@pytest.fixture(scope="module")
def start_s(tmp_path_factory):
    """How long two ranks take to their first step."""
    folder = tmp_path_factory.mktemp("start")
    since = time.monotonic()
    processes = train(folder, "--epochs=100000", "--log.every_steps=1", world_size=2)
    journal = folder / "runs" / "digits" / "metrics.jsonl"
    wait_for(journal, processes)
    while '"event": "train"' not in journal.read_text():
        time.sleep(0.01)
    for process in processes:
        process.kill()
    return time.monotonic() - since


def check_folder(folder):
    """Nothing is half-made: no folder, an empty one, or one whose result says that it stopped."""
    run = folder / "runs" / "digits"
    if run.exists() and any(path.name not in (".lock", ".owner.json") for path in run.iterdir()):
        result = json.loads((run / "result.json").read_text())
        assert (result["status"], result["exit_code"]) == ("stopped", 75)
    assert not list(folder.glob("runs/*.new")) + list(folder.glob("runs/*/.*.new"))


@pytest.mark.parametrize("number", range(MOMENTS))
def test_ranks_that_were_started_by_hand(number, start_s, tmp_path):
    draw = random.Random(number)
    processes = train(tmp_path, "--epochs=100000", "--log.every_steps=1", world_size=2)
    time.sleep(draw.uniform(0.0, start_s))
    chosen, since = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]), time.monotonic()
    for process in processes:
        process.send_signal(chosen)
    codes, said, took_s = end(processes, since)
    assert set(codes) <= {ExitCode.STOPPED, -chosen, ExitCode.PEER}, said
    if -chosen not in codes:
        assert codes == [ExitCode.STOPPED] * 2, said
    assert took_s < GONE_S
    check_folder(tmp_path)


@pytest.mark.parametrize("number", range(MOMENTS))
def test_the_script(number, start_s, tmp_path):
    draw = random.Random(number)
    run = Launch(tmp_path, LOCAL, "--nproc=2", "--epochs=100000", "--log.every_steps=1")
    time.sleep(draw.uniform(0.3, 2.0 * start_s))
    agent, ranks, since = run.agent, list(run.ranks.values()), time.monotonic()
    run.script.send_signal(draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
    try:
        code = run.end()
    finally:
        for pid in filter(None, [agent, *ranks]):
            if is_alive(pid) and time.monotonic() - since > WAIT_S:
                kill(pid)
    assert code == ExitCode.STOPPED, run.said
    assert time.monotonic() - since < GONE_S
    assert not any(map(is_alive, filter(None, [agent, *ranks])))
    check_folder(tmp_path)
