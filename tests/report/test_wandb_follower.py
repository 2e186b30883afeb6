"""A W&B run that is resumed, killed or completed by hand has every row of the journal once.

``RESTARTS=20 python -m pytest tests/report/test_wandb_follower.py`` kills twenty times.
"""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import commands
import pytest
from launching import ROOT, children, environment, is_alive, kill
from limits import WAIT_S
from wandb_reader import inspect_offline_run, offline_folders, offline_records, offline_summary
from wandb_runs import OFFLINE, RESULT, STOPPED, TrackedRun, make_record, places, resumed, rows_of
from wandb_stub import ENTITY, KEY, WandbStub, isolate_wandb

from ddp_sgd.config import RunConfig, WandbConfig
from ddp_sgd.report import wandb_logger
from ddp_sgd.report.journal import Origin, read_journal
from ddp_sgd.report.wandb_follower import _numbers
from ddp_sgd.report.wandb_logger import PROGRAM

KILLS = int(os.environ.get("RESTARTS", "3"))
EACH_ONCE = places(row for _, row in rows_of(10, 60))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    isolate_wandb(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(wandb_logger, "_NICENESS", 0)  # other tests take the CPUs
    monkeypatch.setattr(wandb_logger, "subprocess", commands)  # forks have imported wandb


@pytest.fixture
def record(tmp_path):
    return make_record(tmp_path / "trial")


@pytest.fixture
def said():
    return []


@pytest.fixture
def stub(monkeypatch):
    with WandbStub() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def attempt(record, said, config=None, *, rows, result=RESULT):
    run = TrackedRun(record, said.append, config)
    run.write(rows)
    run.finish(result)


def command(*arguments):
    return [sys.executable, "-m", "ddp_sgd.report.wandb_follower", *map(str, arguments)]


def by_hand(*arguments):
    return commands.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=WAIT_S
    )


def ids(folder):
    return {item["run"]["run_id"] for item in offline_records(folder, "run")}


def in_journal(folder):
    rows = read_journal(folder / "metrics.jsonl")
    return [(row["samples"], row["event"]) for row in rows if row["event"] in ("train", "eval")]


def in_wandb(folder):
    return [
        (row["samples"], "eval" if any(key.startswith("eval/") for key in row) else "train")
        for row in inspect_offline_run(folder)
    ]


def end_of(pid):
    deadline = time.monotonic() + WAIT_S
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.01)


TRAINER = """
import os, pickle, signal, sys
from pathlib import Path
from wandb_runs import TrackedRun

def say(line):
    print(run.logger._process.pid, flush=True)

record, rows = pickle.loads(Path(sys.argv[1]).read_bytes())
run = TrackedRun(record, say)
if os.fork() == 0:  # as the worker of a loader
    signal.pause()
run.write(rows)
sys.stdin.read()
"""


def train_until_killed(record, rows, path):
    """Write rows in a trainer that is killed at once; its fork outlives the follower."""
    path.write_bytes(pickle.dumps((record, rows)))
    program = [sys.executable, "-c", TRAINER, str(path)]
    environ = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    pipe = subprocess.PIPE
    with subprocess.Popen(program, env=environ, stdin=pipe, stdout=pipe) as trainer:
        follower = int(trainer.stdout.readline())
        (fork,) = (pid for pid in children(trainer.pid) if pid != follower)
        trainer.kill()
        end_of(follower)
        kill(fork)


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_resumed_run_has_every_row_once(record, said, tmp_path, end):
    if end == "stopped":
        attempt(record, said, rows=rows_of(10, 40), result=STOPPED)
    else:
        train_until_killed(record, rows_of(10, 40), tmp_path / "rows")
        assert places(inspect_offline_run(record.folder)) == EACH_ONCE[:5], "sent by its follower"
    attempt(resumed(record, 20), said, rows=rows_of(30, 60))
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE
    history = [item["history"]["item"] for item in offline_records(record.folder, "history")]
    steps = [row["_step"] for row in history]
    assert steps == sorted(set(steps))
    assert len(offline_folders(record.folder)) == 2
    assert ids(record.folder) == {"cafe0123"}
    assert len(offline_records(record.folder, "preempting")) == (end == "stopped")
    codes = [item["exit"].get("exit_code", 0) for item in offline_records(record.folder, "exit")]
    assert codes == [75 if end == "stopped" else 69, 0]


def test_an_attempt_that_does_not_come_as_far_as_the_one_before_adds_no_row(record, said):
    attempt(record, said, rows=rows_of(10, 40), result=STOPPED)
    attempt(resumed(record, 10), said, rows=rows_of(20, 30), result={**RESULT, "exit_code": 1})
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE[:5]
    attempt(resumed(record, 10), said, rows=rows_of(20, 60))
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE


def test_the_best_accuracy_is_that_of_all_attempts(record, said):
    attempt(record, said, rows=rows_of(10, 40), result=STOPPED)
    earlier = len(offline_records(record.folder, "summary"))
    attempt(resumed(record, 30), said, rows=rows_of(40, 60))
    summary = {}
    for item in offline_records(record.folder, "summary")[earlier:]:
        summary.update(item["summary"]["update"])
    assert (summary["best/eval/accuracy"], summary["eval/accuracy"]) == (0.7, 0.4)


def test_the_first_of_several_sets_has_the_best_accuracy_and_the_test_set_a_row(record, said):
    """The test set is scored where the last evaluation is: its row comes after that."""

    def scores(step, share):
        place = {"time": 1.7e9 + step, "step": step, "epoch": step / 60, "samples": 32 * step}
        named = {"eval/b/accuracy": share, "eval/a/loss": 0.1, "eval/a/accuracy": 1.0}
        return "eval", {**place, "eval/b/loss": 0.5, **named}

    _, last = scores(60, 0.5)
    place = {key: last[key] for key in ("time", "step", "epoch", "samples")}
    tested = "eval", {**place, "test/step": 30, "test/loss": 0.2, "test/count": 8}
    attempt(record, said, rows=[scores(30, 0.75), ("eval", last), tested])
    summary = {}
    for item in offline_records(record.folder, "summary"):
        summary.update(item["summary"]["update"])
    assert summary["best/eval/b/accuracy"] == 0.75
    assert "best/eval/a/accuracy" not in summary
    assert (summary["eval/b/accuracy"], summary["test/loss"], summary["test/step"]) == (
        0.5,
        0.2,
        30,
    )
    history = [item["history"]["item"] for item in offline_records(record.folder, "history")]
    assert [row["_step"] for row in history] == [1921, 3841, 3842]


def test_the_journal_is_followed_where_a_resumed_run_has_replaced_it(record, said):
    """By hand, over two attempts of a trainer that has W&B disabled."""
    off = WandbConfig(mode="disabled")
    first = TrackedRun(record, said.append, off)
    first.write(rows_of(10, 40))
    note = {"host": "elsewhere", "boot": "", "pid": 1, "job": None, "restarts": 0, "token": ""}
    (record.folder / ".owner.json").write_text(json.dumps(note))
    program = command(record.folder, "--mode=offline")
    with commands.Popen(program, stdout=subprocess.DEVNULL) as follower:
        wait_for(lambda: len(inspect_offline_run(record.folder)) == 5, follower)
        first.journal.finish(STOPPED)
        second = TrackedRun(resumed(record, 20), said.append, off)
        second.write(rows_of(30, 60))
        wait_for(lambda: len(inspect_offline_run(record.folder)) == 8, follower)
        second.finish(RESULT)
        (record.folder / ".owner.json").unlink()
        assert follower.wait(WAIT_S) == 0
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE
    assert offline_summary(record.folder)["status"] == "finished"
    assert not said


def wait_for(holds, process):
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_new_run_in_an_old_folder_leaves_nothing_out(record, said):
    attempt(record, said, rows=rows_of(10, 40), result=STOPPED)
    (record.folder / "metrics.jsonl").unlink()
    new = replace(record, origin=Origin(run_id="d00d4567"))
    attempt(new, said, rows=rows_of(10, 20))
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE[:5] + EACH_ONCE[:2]
    assert ids(record.folder) == {"cafe0123", "d00d4567"}


def test_a_resumed_run_goes_on_in_the_servers_run(stub, record, said, capfd):
    attempt(record, said, rows=rows_of(10, 40), result=STOPPED)
    assert stub.preempting == {"cafe0123"}
    assert stub.exit_code == 75
    changed = RunConfig(name="trial", epochs=3, model={"class_path": "x.Y"})
    attempt(resumed(record, 20, config=changed), said, rows=rows_of(30, 60))
    assert list(stub.rows) == ["cafe0123"]
    assert places(stub.rows["cafe0123"]) == EACH_ONCE
    assert [row["_step"] for row in stub.rows["cafe0123"]] == [
        64 * step + evaluated for step, evaluated in EACH_ONCE
    ]
    assert stub.summaries["cafe0123"]["best/eval/accuracy"] == 0.7
    config = json.loads(stub.runs["cafe0123"]["config"])
    assert (config["epochs"]["value"], config["world_size"]["value"]) == (3, 2)
    assert config["model"]["value"]["class_path"] == "x.Y"
    assert said == 2 * [f"W&B: online, {stub.url}/{ENTITY}/ddp_sgd/runs/cafe0123"]
    assert tuple(capfd.readouterr()) == ("", "")


def test_rows_that_never_came_to_the_server_are_sent_again(stub, record, said):
    attempt(record, said, rows=rows_of(10, 40), result=STOPPED)
    del stub.rows["cafe0123"][3:]  # as if the process had been killed before the rest was sent
    del stub.summaries["cafe0123"]
    attempt(resumed(record, 10), said, rows=rows_of(20, 60))
    assert places(stub.rows["cafe0123"]) == EACH_ONCE


def test_attempts_on_and_off_line_have_every_row_once(stub, record, said):
    attempt(record, said, rows=rows_of(10, 20), result=STOPPED)
    attempt(resumed(record, 10), said, OFFLINE, rows=rows_of(20, 40), result=STOPPED)
    attempt(resumed(record, 20), said, rows=rows_of(30, 60))
    on_server = places(stub.rows["cafe0123"])
    in_file = places(inspect_offline_run(record.folder))
    assert sorted(on_server + in_file) == EACH_ONCE
    assert in_file == EACH_ONCE[2:5]


def test_offline_attempts_are_sent_as_one_run(stub, record, said):
    attempt(record, said, OFFLINE, rows=rows_of(10, 40), result=STOPPED)
    attempt(resumed(record, 20), said, OFFLINE, rows=rows_of(30, 60))
    sync = [sys.executable, "-m", "wandb", "sync", *map(str, offline_folders(record.folder))]
    commands.run(sync, check=True, capture_output=True, timeout=WAIT_S)
    assert "RunResumeStatus" in stub.operations  # else the second one would start the run over
    assert list(stub.rows) == ["cafe0123"]
    assert places(stub.rows["cafe0123"]) == EACH_ONCE
    assert stub.summaries["cafe0123"]["best/eval/accuracy"] == 0.7
    assert stub.preempting == {"cafe0123"}
    assert stub.exit_code == 0


@pytest.mark.parametrize("kept", [b"their-id\n", b"", b"\xff\xfe"])
def test_a_resumed_run_keeps_the_id_that_the_user_gave_it(record, said, monkeypatch, kept):
    monkeypatch.setenv("WANDB_RUN_ID", "their-id")
    attempt(record, said, rows=rows_of(10, 40), result=STOPPED)
    (record.folder / "wandb" / "run_id").write_bytes(kept)
    if kept == b"their-id\n":
        monkeypatch.setenv("WANDB_RUN_ID", "another")
    attempt(resumed(record, 30), said, rows=rows_of(40, 60))
    assert ids(record.folder) == {"their-id"}


def test_a_lost_follower_is_replaced_by_hand(record, said):
    run = TrackedRun(record, said.append, OFFLINE)
    run.write(rows_of(10, 20))
    kill(run.logger._process.pid)
    run.write(rows_of(30, 60))
    run.finish(RESULT)
    assert len(said) <= 2
    done = by_hand(record.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("W&B: offline, in ")
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE
    summary = offline_summary(record.folder)
    assert (summary["status"], summary["best/eval/accuracy"]) == ("finished", 0.7)


def test_the_process_of_the_first_attempt_may_come_last(record, said):
    """On a busy machine it may wait while that of a later attempt sends all."""
    attempt(record, said, WandbConfig(mode="disabled"), rows=rows_of(10, 60))
    first = TrackedRun(record, said.append, OFFLINE)  # it has no journal of before, or it seems so
    assert not record.origin.has_rows
    first.finish(RESULT)
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE
    again = TrackedRun(record, said.append, OFFLINE)
    again.finish(RESULT)
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE
    assert len(ids(record.folder)) == 1


def test_a_run_that_trained_with_wandb_disabled_is_sent_by_hand(stub, record, said):
    attempt(record, said, WandbConfig(mode="disabled"), rows=rows_of(10, 60))
    assert not (record.folder / "wandb").exists()
    for _ in range(2):  # a second time adds nothing
        done = by_hand(record.folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"W&B: online, {stub.url}/{ENTITY}/ddp_sgd/runs/cafe0123\n"
        assert places(stub.rows["cafe0123"]) == EACH_ONCE
    config = json.loads(stub.runs["cafe0123"]["config"])
    assert config["world_size"]["value"] == 2
    assert config["git_commit"]["value"] == 40 * "c"
    assert stub.exit_code == 0


def test_a_row_without_its_newline_is_sent_after_a_crash(record, said):
    attempt(record, said, OFFLINE, rows=rows_of(10, 30))
    journal = record.folder / "metrics.jsonl"
    rows = rows_of(40, 60)
    whole = "".join(f"{json.dumps({'event': event, **row})}\n" for event, row in rows)
    with journal.open("a") as stream:
        stream.write(whole[:-1])
    assert by_hand(record.folder).returncode == 0
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE
    with journal.open("a") as stream:
        stream.write('\n{"event": "tra')
    assert by_hand(record.folder).returncode == 0
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ((), 64, f"the following arguments are required: RUN; see {PROGRAM} --help."),
        (("x", "--mode=none"), 64, "argument --mode: invalid choice: 'none' "),
        (("no-folder",), 65, "no-folder is no folder with a metrics.jsonl; name a run folder."),
    ],
)
def test_bad_input_by_hand_is_one_line(arguments, code, line):
    done = by_hand(*arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith(f"ddp_sgd: error: {line}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")]
)
def test_a_user_who_disables_wandb_is_asked_for_a_mode(record, said, monkeypatch, name, value):
    attempt(record, said, WandbConfig(mode="disabled"), rows=rows_of(10, 60))
    monkeypatch.setenv(name, value)
    done = by_hand(record.folder)
    assert done.returncode == 64
    assert done.stderr == (
        "ddp_sgd: error: W&B is disabled by WANDB_MODE, WANDB_DISABLED or wandb's settings file; "
        "give --mode=online or --mode=offline.\n"
    )
    assert by_hand(record.folder, "--mode=offline").returncode == 0
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE


def test_an_unwritable_home_is_one_line_by_hand(record, said, monkeypatch):
    attempt(record, said, WandbConfig(mode="disabled"), rows=rows_of(10, 60))
    monkeypatch.setenv("HOME", "/proc/nobody")
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.delenv(f"WANDB_{name}_DIR")
    done = by_hand(record.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("W&B: offline (no API key), in ")
    assert done.stdout.count("\n") == 1
    assert places(inspect_offline_run(record.folder)) == EACH_ONCE


def test_a_damaged_journal_is_one_line(record, said):
    attempt(record, said, OFFLINE, rows=rows_of(10, 20))
    with (record.folder / "metrics.jsonl").open("a") as stream:
        stream.write("zero\n")
    done = by_hand(record.folder)
    assert done.returncode == 65
    assert ":4 is not a JSON object; take the line out, or restore the file." in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_names_the_run():
    done = by_hand("--help")
    assert done.returncode == 0
    assert "RUN" in done.stdout


@pytest.mark.timeout(600 + 30 * KILLS)
def test_every_row_comes_once_where_the_follower_is_killed_again_and_again(record, said):
    """Half of the times wandb's helper is killed with it, as at the end of a job."""
    instants = random.Random(1)
    attempt(record, said, WandbConfig(mode="disabled"), rows=rows_of(10, 500))
    for number in range(KILLS):
        with commands.Popen(
            command(record.folder, "--mode=offline"), stdout=subprocess.DEVNULL
        ) as follower:
            if number % 2:  # from the first row of this attempt on
                known = len(offline_folders(record.folder))
                wait_for(lambda n=known: len(offline_folders(record.folder)) > n, follower)
            time.sleep(instants.uniform(0.0, 0.2 if number % 2 else 2.0))
            victims = [follower.pid, *(children(follower.pid) if number % 4 < 2 else [])]
            for pid in reversed(victims):
                kill(pid)
        journal_grows(record, 500 + 10 * number)
    assert by_hand(record.folder, "--mode=offline").returncode == 0
    written = in_journal(record.folder)
    assert len(written) > 60 + KILLS
    assert in_wandb(record.folder) == written
    assert ids(record.folder) == {"cafe0123"}


def journal_grows(record, step):
    with (record.folder / "metrics.jsonl").open("a") as stream:
        for event, row in rows_of(step + 10, step + 10):
            stream.write(f"{json.dumps({'event': event, **row})}\n")


@pytest.mark.timeout(600 + 30 * KILLS)
def test_every_row_comes_once_to_a_server_where_the_follower_is_killed(stub, record, said):
    instants = random.Random(2)
    attempt(record, said, WandbConfig(mode="disabled"), rows=rows_of(10, 300))
    for number in range(KILLS):
        with commands.Popen(command(record.folder), stdout=subprocess.PIPE) as follower:
            follower.stdout.readline()  # it is online
            time.sleep(instants.uniform(0.0, 0.5))
            for pid in reversed([follower.pid, *(children(follower.pid) if number % 2 else [])]):
                kill(pid)
        journal_grows(record, 300 + 10 * number)
    assert by_hand(record.folder).returncode == 0
    assert places(stub.rows["cafe0123"]) == places(row for _, row in rows_of(10, 300 + 10 * KILLS))


@pytest.mark.timeout(600 + 60 * KILLS)
def test_every_row_comes_once_where_the_trainer_is_killed_again_and_again(tmp_path):
    instants = random.Random(3)
    hurry, epochs = tmp_path / "hurry", 2 * KILLS  # more than the attempts get to
    patience = f"{{pause_s: 0.02, until: {hurry}}}"
    options = [
        f"--epochs={epochs}", "--log.every_steps=1", "--checkpoint.every_steps=5",
        f"--model={{class_path: user_code.Slow, init_args: {patience}}}",
    ]  # fmt: skip
    environ = environment(DDP_SGD_WANDB__MODE="offline")
    program = [sys.executable, "-m", "ddp_sgd.train", *options]
    folder = tmp_path / "runs" / "digits"
    for _ in range(KILLS):
        rows = count_rows(folder)
        with commands.Popen(
            program, cwd=tmp_path, env=environ, stdout=subprocess.DEVNULL
        ) as trainer:
            wait_for(lambda n=rows: count_rows(folder) != n, trainer)
            time.sleep(instants.uniform(0.0, 1.0))
            trainer.kill()
    hurry.touch()
    commands.run(
        program, cwd=tmp_path, env=environ, check=True, capture_output=True, timeout=WAIT_S
    )
    assert by_hand(folder).returncode == 0  # where its own follower ran out of time
    written = in_journal(folder)
    assert len(written) == epochs * (45 + 1)
    assert in_wandb(folder) == written
    assert len(ids(folder)) == 1


def count_rows(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_follower_that_loses_its_trainer_before_the_run_ends(tmp_path):
    code = "from ddp_sgd.report.wandb_follower import follow_trainer; follow_trainer()"
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"", capture_output=True, check=False, timeout=WAIT_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_it_imports_neither_torch_nor_wandb_before_it_is_asked_to():
    code = (
        "import sys, ddp_sgd.report.wandb_logger; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'wandb', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sigint_by_hand_stops_it_with_one_line(record, said):
    attempt(record, said, WandbConfig(mode="disabled"), rows=rows_of(10, 20))
    note = {"host": "elsewhere", "boot": "", "pid": 1, "job": None, "restarts": 0, "token": ""}
    (record.folder / ".owner.json").write_text(json.dumps(note))
    pipe = subprocess.PIPE
    program = command(record.folder, "--mode=offline")
    with subprocess.Popen(program, stdout=pipe, stderr=pipe) as follower:
        follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        assert follower.wait(WAIT_S) == 75
        assert follower.stderr.read() == (
            b"ddp_sgd: stopped by SIGINT; run it again to send the rest.\n"
        )


def test_numbers_of_a_row_with_its_own_time():
    row = {"time": 5.0, "step": 3, "train/loss": 0.5, "note": "text", "train/lr": None}
    assert _numbers(row) == {"_timestamp": 5.0, "step": 3, "train/loss": 0.5}
    assert row["time"] == 5.0
