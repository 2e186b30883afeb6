import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from limits import WAIT_S
from wandb_reader import (
    inspect_offline_run,
    offline_folder,
    offline_folders,
    offline_records,
    offline_summary,
)
from wandb_stub import ENTITY, KEY, WandbStub, isolate_wandb

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.plan import make_plan
from ddp_sgd.report import weights_and_biases
from ddp_sgd.report.logger import RunRecord
from ddp_sgd.report.wandb_arguments import git_commit
from ddp_sgd.report.weights_and_biases import WeightsAndBiases, start_ahead

CONFIG = RunConfig(name="trial", epochs=2)
OFFLINE = WandbConfig(mode="offline")
RESULT = {"status": "finished", "exit_code": 0, "weights_digest": "5ca1e", "wall_s": 1.5}
AXES = {"time": 1.7e9, "step": 0, "epoch": 0.0, "samples": 0}
ROWS = [
    ("train", {"time": 1.7e9, "step": 10, "epoch": 0.5, "samples": 320, "train/loss": 2.25}),
    ("eval", {"time": 1.7e9, "step": 20, "epoch": 1.0, "samples": 640, "eval/accuracy": 0.75}),
    ("train", {"time": 1.7e9, "step": 30, "epoch": 1.5, "samples": 960, "train/loss": 1.125}),
    ("eval", {"time": 1.7e9, "step": 40, "epoch": 2.0, "samples": 1280, "eval/accuracy": 0.5}),
]
LOGGED = [{key: value for key, value in row.items() if key != "time"} for _, row in ROWS]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    isolate_wandb(monkeypatch, folder)
    monkeypatch.setattr(weights_and_biases, "_NICENESS", 0)  # other tests take the CPUs
    return folder


@pytest.fixture
def record(tmp_path):
    folder = tmp_path / "trial"
    folder.mkdir()
    return RunRecord(
        folder=folder,
        name="trial",
        config=CONFIG.model_dump(mode="json"),
        plan=make_plan(CONFIG, samples=1437, world_size=2),
        world_size=2,
        run_id="cafe0123",
        resumed=False,
    )


@pytest.fixture
def said():
    return []


@pytest.fixture
def stub(monkeypatch):
    with WandbStub() as server:
        _use(monkeypatch, server.url)
        yield server


def _use(monkeypatch, url, key=KEY):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", key)


def _report(record, said, config=None, result=RESULT, rows=ROWS):
    sink = WeightsAndBiases(config or WandbConfig(), say=said.append)
    sink.start(record)
    sink.write(rows)
    sink.finish(result)
    return sink


STOPPED = {**RESULT, "status": "stopped", "exit_code": 75}


def _rows(first, last):
    """Rows of every tenth step, each third one an evaluation after the same samples."""
    rows = []
    for step in range(first, last + 1, 10):
        axes = {"time": 1.7e9 + step, "step": step, "epoch": step / 40, "samples": 32 * step}
        rows.append(("train", {**axes, "train/loss": 1 / step}))
        if step % 30 == 0:
            rows.append(("eval", {**axes, "eval/accuracy": 1 - step / 100}))
    return rows


def _places(rows):
    return [(row["step"], "eval/accuracy" in row) for row in rows]


EACH_ONCE = _places(row for _, row in _rows(10, 60))


def _files(*folders):
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_an_offline_run_holds_the_rows_that_were_written(record, said, capfd):
    _report(record, said)
    assert inspect_offline_run(record.folder) == LOGGED
    folder = offline_folder(record.folder)
    assert said == [f"W&B: offline (no API key), in {folder}; send it later: wandb sync {folder}"]
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_row_keeps_its_time_and_the_axes_are_named(record, said):
    _report(record, said)
    history = offline_records(record.folder, "history")
    assert {item["history"]["item"]["_timestamp"] for item in history} == {1.7e9}
    metrics = [item["metric"] for item in offline_records(record.folder, "metric")]
    assert {metric["name"] for metric in metrics if "name" in metric} >= {"step", "samples"}
    assert {m.get("step_metric") for m in metrics if m.get("glob_name") == "*"} == {"step"}


def test_only_numbers_of_train_and_eval_are_logged(record, said):
    sink = WeightsAndBiases(OFFLINE, say=said.append)
    sink.start(record)
    sink.write([("start", {**AXES, "world_size": 2})])
    sink.write([("train", {**AXES, "train/loss": None, "train/lr": 0.5, "note": "first"})])
    sink.write([("end", {**AXES, "wall_s": 3.0})])
    sink.finish(RESULT)
    rows = inspect_offline_run(record.folder)
    assert rows == [{"step": 0, "epoch": 0.0, "samples": 0, "train/lr": 0.5}]


def test_the_summary_has_the_best_and_the_last_accuracy_and_how_the_run_ended(record, said):
    _report(record, said, result={**RESULT, "status": "stopped", "exit_code": 75})
    summary = offline_summary(record.folder)
    assert summary["best/eval/accuracy"] == 0.75
    assert summary["eval/accuracy"] == 0.5
    assert summary["status"] == "stopped"
    assert summary["weights_digest"] == "5ca1e"
    (end,) = offline_records(record.folder, "exit")
    assert end["exit"]["exit_code"] == 75


def test_the_configuration_the_plan_the_commit_and_the_world_size_are_recorded(record, said):
    _report(record, said)
    (run,) = offline_records(record.folder, "run")
    config = run["run"]["config"]["update"]
    assert config["optim"] == record.config["optim"]
    assert config["plan"] == asdict(record.plan)
    assert set(config["plan"]) == {field.name for field in fields(record.plan)}
    assert config["git_commit"] == git_commit()
    assert config["world_size"] == 2
    assert run["run"]["project"] == "ddp_sgd"
    assert run["run"]["display_name"] == "trial"
    kept = (record.folder / "wandb" / "run_id").read_text().strip()
    assert run["run"]["run_id"] == kept


def test_no_code_and_no_environment_is_saved(record, said):
    _report(record, said)
    names = {path.name for path in _files(record.folder)}
    assert not names & {"diff.patch", "requirements.txt", "conda-environment.yaml"}
    assert not list(record.folder.rglob("*.py"))


def test_an_online_run_holds_the_same_rows(stub, record, said, capfd):
    _report(record, said, result={**RESULT, "exit_code": 3})
    run_id = (record.folder / "wandb" / "run_id").read_text().strip()
    rows = stub.rows[run_id]
    assert [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows] == LOGGED
    assert stub.summaries[run_id]["best/eval/accuracy"] == 0.75
    assert stub.exit_code == 3
    assert said == [f"W&B: online, {stub.url}/{ENTITY}/ddp_sgd/runs/{run_id}"]
    assert tuple(capfd.readouterr()) == ("", "")
    names = {Path(name).name for name in stub.uploads}
    assert not names & {"diff.patch", "requirements.txt", "conda-environment.yaml"}


def test_a_key_in_the_environment_is_nowhere_on_disk(stub, record, said, home):
    _report(record, said)
    assert stub.ended.is_set()
    files = _files(record.folder, home)
    assert files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_key_in_the_netrc_file_makes_the_run_online(stub, record, said, home, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = home / ".netrc"
    netrc.write_text(
        f"machine {stub.url.removeprefix('http://')}\n  login user\n  password {KEY}\n"
    )
    netrc.chmod(0o600)
    _report(record, said)
    assert stub.ended.is_set()


def test_the_users_variables_are_followed(stub, record, said, monkeypatch):
    for name, value in {
        "WANDB_PROJECT": "theirs",
        "WANDB_NAME": "their name",
        "WANDB_RUN_ID": "their-id",
        "WANDB_ENTITY": "team",
        "WANDB_RUN_GROUP": "their group",
        "WANDB_TAGS": "one,two",
    }.items():
        monkeypatch.setenv(name, value)
    _report(record, said)
    run = stub.runs["their-id"]
    assert (run["project"], run["displayName"], run["groupName"]) == (
        "theirs",
        "their name",
        "their group",
    )
    assert run["entity"] == "team"
    assert run["tags"] == ["one", "two"]
    assert (record.folder / "wandb" / "run_id").read_text() == "their-id\n"


def test_the_configuration_goes_before_the_users_variables(stub, record, said, monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = WandbConfig(mode="online", project="p", name="n", group="g", tags=("t",))
    _report(record, said, config)
    (run,) = stub.runs.values()
    assert (run["project"], run["displayName"], run["groupName"]) == ("p", "n", "g")
    assert run["tags"] == ["t"]


@pytest.mark.parametrize("mode", ["offline", "dryrun"])
def test_the_users_mode_is_followed(stub, record, said, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_DISABLED", "false")
    _report(record, said)
    assert inspect_offline_run(record.folder) == LOGGED
    assert not stub.asked.is_set()


@pytest.mark.parametrize(("mode", "variable"), [("disabled", "online"), ("auto", "disabled")])
def test_disabled_starts_nothing(record, said, monkeypatch, mode, variable):
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setattr(sys, "executable", "no such program")
    _report(record, said, WandbConfig(mode=mode))
    assert not said
    assert not list(record.folder.iterdir())


def test_disabled_in_wandbs_settings_file_is_followed(record, said, home):
    (home / "config").mkdir()
    (home / "config" / "settings").write_text("[default]\nmode = disabled\n")
    _report(record, said)
    assert not said
    assert not list(record.folder.iterdir())


def test_a_server_that_refuses_connections_leads_offline(record, said, monkeypatch, capfd):
    monkeypatch.setattr(weights_and_biases, "INIT_TIMEOUT_S", 1.0)
    with WandbStub() as closed:
        pass
    _use(monkeypatch, closed.url)
    _report(record, said)
    (line,) = said
    assert line.startswith("W&B: offline (")
    assert "connection refused" in line
    assert inspect_offline_run(record.folder) == LOGGED
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_server_that_never_answers_holds_nobody(record, said, monkeypatch):
    monkeypatch.setattr(weights_and_biases, "INIT_TIMEOUT_S", 1.0)
    sink = WeightsAndBiases(WandbConfig(), say=said.append)
    with WandbStub(hold=True) as server:
        _use(monkeypatch, server.url)
        sink.start(record)
        assert server.asked.wait(WAIT_S)
        sink.write(ROWS)  # the server holds the request until the `with` ends
        sink.finish(RESULT)
        assert not server.operations  # it has answered nothing
    assert set(server.paths) == {"/graphql"}  # nothing more was sent at exit
    (line,) = said
    assert line.startswith("W&B: offline (")
    assert inspect_offline_run(record.folder) == LOGGED


def test_a_server_that_falls_silent_does_not_hold_the_end(stub, record, said, monkeypatch):
    monkeypatch.setattr(weights_and_biases, "UPLOAD_TIMEOUT_S", 1.0)
    opened = threading.Event()
    sink = WeightsAndBiases(WandbConfig(), say=lambda line: (said.append(line), opened.set()))
    sink.start(record)
    assert opened.wait(WAIT_S)
    stub.hold = True
    sink.write(ROWS)
    sink.finish(RESULT)
    (folder,) = (record.folder / "wandb").glob("run-*")
    assert said[1:] == [f"W&B: not all sent after 10 s; the rest: wandb sync {folder}"]


def test_a_wrong_key_leads_offline(stub, record, said, home, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY[::-1])
    _report(record, said)
    (line,) = said
    assert line.startswith("W&B: offline (invalid key), in ")
    assert inspect_offline_run(record.folder) == LOGGED
    assert not [
        path for path in _files(record.folder, home) if KEY[::-1] in path.read_text("latin1")
    ]


def test_a_key_that_is_none_leads_offline(stub, record, said, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    _report(record, said)
    (line,) = said
    assert line.startswith("W&B: offline (")
    assert "s3cret" not in line


def test_online_without_a_key_asks_nobody_and_leads_offline(stub, record, said, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    _report(record, said, WandbConfig(mode="online"))
    (line,) = said
    assert line.startswith("W&B: offline (no API key), in ")


def test_the_command_that_is_said_sends_an_offline_run(stub, record, said):
    _report(record, said, OFFLINE)
    *_, command = said[0].partition("; send it later: ")
    program, *arguments = command.split()
    assert program == "wandb"
    subprocess.run(
        [sys.executable, "-m", "wandb", *arguments], check=True, capture_output=True, timeout=WAIT_S
    )
    (rows,) = stub.rows.values()
    assert [row["step"] for row in rows] == [row["step"] for row in LOGGED]


def test_a_variable_that_wandb_refuses_ends_in_one_line(record, said, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sideways")
    sink = _report(record, said)
    (line,) = said
    assert line.startswith("W&B: stopped (")
    assert "\n" not in line
    sink.write(ROWS[:1])


def _start(record, said, config=OFFLINE):
    """Start a sink, and return it when the run is open, with the process and wandb's helper."""
    opened = threading.Event()
    sink = WeightsAndBiases(config, say=lambda line: (said.append(line), opened.set()))
    sink.start(record)
    process = sink._process.pid
    assert opened.wait(WAIT_S)
    (helper,) = _children(process)
    return sink, process, helper


def _children(process):
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _await_end(*processes):
    for process in processes:
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            continue
        assert select.select([descriptor], [], [], 60)[0], f"process {process} lives on"
        os.close(descriptor)


def test_a_process_that_was_started_ahead_is_taken(record, said):
    start_ahead(OFFLINE)
    start_ahead(OFFLINE)  # for one run only
    (ahead,) = weights_and_biases._ahead
    sink, process, _ = _start(record, said)
    assert process == ahead.pid
    assert not weights_and_biases._ahead
    sink.write(ROWS)
    sink.finish(RESULT)
    assert inspect_offline_run(record.folder) == LOGGED


def test_nothing_is_started_ahead_where_wandb_is_disabled(monkeypatch):
    start_ahead(WandbConfig(mode="disabled"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start_ahead(WandbConfig())
    assert not weights_and_biases._ahead


def test_a_process_that_nobody_takes_ends_with_the_rank():
    code = (
        "from ddp_sgd.config.sections import WandbConfig; "
        "from ddp_sgd.report import weights_and_biases as module; "
        "module.start_ahead(WandbConfig(mode='offline')); print(module._ahead[0].pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _await_end(int(done.stdout))


def test_rows_that_find_no_room_are_left_out_with_one_line(record, said, monkeypatch):
    sink, process, _ = _start(record, said)
    os.kill(process, signal.SIGSTOP)
    os.waitpid(process, os.WUNTRACED)  # it reads no more
    monkeypatch.setattr(weights_and_biases, "MOST_BYTES", 1000)
    for samples in range(3000):  # more than a pipe holds
        sink.write([("train", {**AXES, "samples": samples})])
    os.kill(process, signal.SIGCONT)
    sink.finish(RESULT)
    assert said[1:] == ["W&B: too many rows wait; some are left out, metrics.jsonl has them"]
    kept = [row["samples"] for row in inspect_offline_run(record.folder)]
    assert 100 < len(kept) < 3000
    assert kept == list(range(len(kept)))


def test_many_rows_at_once_are_all_logged(record, said):
    rows = [("train", {**AXES, "samples": samples}) for samples in range(3000)]
    _report(record, said, OFFLINE, rows=rows)
    assert [row["samples"] for row in inspect_offline_run(record.folder)] == list(range(3000))


def test_a_system_without_a_free_thread_is_no_trouble(record, said, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    _report(record, said)
    assert said == ["W&B: not started (can't start new thread); metrics.jsonl has every row"]


def test_a_system_that_starts_no_process_is_no_trouble(record, said, monkeypatch):
    monkeypatch.setattr(sys, "executable", "no such program")
    _report(record, said)
    (line,) = said
    assert line.startswith("W&B: not started ([Errno 2] ")


def test_a_missing_wandb_is_no_trouble(record, said, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')")
    monkeypatch.syspath_prepend(tmp_path)
    _report(record, said)
    assert said == ["W&B: stopped (no wandb here); training goes on, metrics.jsonl has every row"]


def test_the_helper_of_a_run_of_the_users_own_is_not_used(record, said, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "theirs")
    _report(record, said)
    assert inspect_offline_run(record.folder) == LOGGED


def test_signals_to_the_whole_job_do_not_end_it(record, said):
    sink = WeightsAndBiases(OFFLINE, say=said.append)
    sink.start(record)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):  # long before it has loaded anything
        os.kill(sink._process.pid, signal.Signals[name])
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}
    sink.write(ROWS)
    sink.finish(RESULT)
    assert inspect_offline_run(record.folder) == LOGGED


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_lost_helper_stops_only_the_view(record, said, name):
    sink, process, helper = _start(record, said)
    os.kill(helper, signal.Signals[name])
    _await_end(helper)
    sink.write(ROWS)
    _await_end(process)
    sink.write(ROWS)
    sink.finish(RESULT)
    assert len(said) == 2
    assert said[1].startswith("W&B: stopped (")


def test_a_lost_process_stops_only_the_view(record, said):
    sink, process, helper = _start(record, said)
    os.kill(process, signal.SIGKILL)
    _await_end(helper)
    sink.write(ROWS)
    sink.finish(RESULT)
    assert said[1:] == [
        "W&B: stopped (its process ended with code -9); training goes on, metrics.jsonl has every "
        "row"
    ]


@pytest.mark.parametrize("stuck", ["process", "helper"])
def test_what_hangs_does_not_hold_the_end(record, said, monkeypatch, stuck):
    monkeypatch.setattr(weights_and_biases, "FINISH_TIMEOUT_S", 0.5)
    sink, process, helper = _start(record, said)
    os.kill(process if stuck == "process" else helper, signal.SIGSTOP)
    sink.write(ROWS)
    sink.finish(RESULT)
    (folder,) = offline_folders(record.folder)
    sync = record.folder / "wandb" / "latest-run"
    assert said[1:] == [f"W&B: not finished after 5 s; send the rest: wandb sync {sync}"]
    assert sync.resolve() == folder
    if stuck == "helper":
        os.kill(helper, signal.SIGCONT)
    _await_end(process, helper)


def _ids(folder):
    return {item["run"]["run_id"] for item in offline_records(folder, "run")}


LIFE = """
import os, pickle, signal, sys
from pathlib import Path
from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.report.weights_and_biases import WeightsAndBiases, start_ahead

def say(line):
    print(sink._process.pid, fork, flush=True)

sink = WeightsAndBiases(WandbConfig(mode="offline"), say=say)
record, rows = pickle.loads(Path(sys.argv[1]).read_bytes())
sink.start(record)
if (fork := os.fork()) == 0:  # as the worker of a loader
    signal.pause()
sink.write(rows)
sys.stdin.read()
"""


def _live_until_killed(record, rows, path):
    """Log rows in a rank that is killed when the last one is in wandb's file; a fork lives on."""
    path.write_bytes(pickle.dumps((record, rows)))
    known = len(inspect_offline_run(record.folder))
    command = [sys.executable, "-c", LIFE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        process, fork = map(int, rank.stdout.readline().split())
        (helper,) = _children(process)
        while len(inspect_offline_run(record.folder)) < known + len(rows):
            assert rank.poll() is None
        rank.kill()
        _await_end(process, helper)
        os.kill(fork, signal.SIGKILL)


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_resumed_run_has_every_row_once(record, said, tmp_path, end):
    if end == "stopped":
        _report(record, said, rows=_rows(10, 40), result=STOPPED)
    else:
        _live_until_killed(record, _rows(10, 40), tmp_path / "life")
    _report(replace(record, resumed=True), said, rows=_rows(30, 60))
    assert _places(inspect_offline_run(record.folder)) == EACH_ONCE
    history = [item["history"]["item"] for item in offline_records(record.folder, "history")]
    steps = [row["_step"] for row in history]
    assert steps == sorted(set(steps))
    assert len(offline_folders(record.folder)) == 2
    assert _ids(record.folder) == {"cafe0123"}
    assert len(offline_records(record.folder, "preempting")) == (end == "stopped")


def test_a_life_that_does_not_come_as_far_as_the_one_before_adds_no_row(record, said, tmp_path):
    _live_until_killed(record, _rows(10, 40), tmp_path / "life")
    resumed = replace(record, resumed=True)
    _report(resumed, said, rows=_rows(20, 30), result={**RESULT, "exit_code": 1})
    assert _places(inspect_offline_run(record.folder)) == EACH_ONCE[:5]
    _report(resumed, said, rows=_rows(20, 60))
    assert _places(inspect_offline_run(record.folder)) == EACH_ONCE


def test_the_best_accuracy_is_that_of_all_lives(record, said):
    _report(record, said, rows=_rows(10, 40), result=STOPPED)
    earlier = len(offline_records(record.folder, "summary"))
    _report(replace(record, resumed=True), said, rows=_rows(40, 60))
    summary = {}
    for item in offline_records(record.folder, "summary")[earlier:]:
        summary.update(item["summary"]["update"])
    assert (summary["best/eval/accuracy"], summary["eval/accuracy"]) == (0.7, 0.4)


def test_a_torn_mark_leaves_nothing_out(record, said):
    _report(record, said, rows=_rows(10, 40), result=STOPPED)
    mark = record.folder / "wandb" / "last_row"
    mark.write_bytes(mark.read_bytes()[:-4])
    _report(replace(record, resumed=True), said, rows=_rows(40, 60))
    assert _places(inspect_offline_run(record.folder)) == EACH_ONCE[:5] + EACH_ONCE[4:]


def test_a_mark_that_cannot_be_written_stops_nothing(record, said):
    (record.folder / "wandb" / "last_row").mkdir(parents=True)
    _report(record, said)
    assert inspect_offline_run(record.folder) == LOGGED
    assert len(said) == 1


def test_a_new_run_in_an_old_folder_leaves_nothing_out(record, said):
    _report(record, said, rows=_rows(10, 40), result=STOPPED)
    _report(replace(record, run_id="d00d4567"), said, rows=_rows(10, 20))
    assert _places(inspect_offline_run(record.folder)) == EACH_ONCE[:5] + EACH_ONCE[:2]
    assert _ids(record.folder) == {"cafe0123", "d00d4567"}


def test_a_resumed_run_goes_on_in_the_servers_run(stub, record, said, capfd):
    _report(record, said, rows=_rows(10, 40), result=STOPPED)
    assert stub.preempting == {"cafe0123"}
    assert stub.exit_code == 75
    changed = {**record.config, "epochs": 3, "new": {"key": 1}}
    resumed = replace(record, resumed=True, config=changed, world_size=4)
    _report(resumed, said, rows=_rows(30, 60))
    assert list(stub.rows) == ["cafe0123"]
    assert _places(stub.rows["cafe0123"]) == EACH_ONCE
    assert [row["_step"] for row in stub.rows["cafe0123"]] == [
        64 * step + evaluated for step, evaluated in EACH_ONCE
    ]
    assert stub.summaries["cafe0123"]["best/eval/accuracy"] == 0.7
    config = json.loads(stub.runs["cafe0123"]["config"])
    assert (config["epochs"]["value"], config["world_size"]["value"]) == (3, 4)
    assert said == 2 * [f"W&B: online, {stub.url}/{ENTITY}/ddp_sgd/runs/cafe0123"]
    assert tuple(capfd.readouterr()) == ("", "")


def test_rows_that_never_came_to_the_server_are_sent_again(stub, record, said):
    _report(record, said, rows=_rows(10, 40), result=STOPPED)
    del stub.rows["cafe0123"][3:]  # as if the process had been killed before the rest was sent
    del stub.summaries["cafe0123"]
    _report(replace(record, resumed=True), said, rows=_rows(20, 60))
    assert _places(stub.rows["cafe0123"]) == EACH_ONCE


def test_lives_on_and_off_line_have_every_row_once(stub, record, said):
    resumed = replace(record, resumed=True)
    _report(record, said, rows=_rows(10, 20), result=STOPPED)
    _report(resumed, said, OFFLINE, rows=_rows(20, 40), result=STOPPED)
    _report(resumed, said, rows=_rows(30, 60))
    on_server = _places(stub.rows["cafe0123"])
    in_file = _places(inspect_offline_run(record.folder))
    assert sorted(on_server + in_file) == EACH_ONCE
    assert in_file == EACH_ONCE[2:5]


def test_offline_lives_are_sent_as_one_run(stub, record, said):
    _report(record, said, OFFLINE, rows=_rows(10, 40), result=STOPPED)
    _report(replace(record, resumed=True), said, OFFLINE, rows=_rows(30, 60))
    command = [sys.executable, "-m", "wandb", "sync", *map(str, offline_folders(record.folder))]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)
    assert "RunResumeStatus" in stub.operations  # else the second one would start the run again
    assert list(stub.rows) == ["cafe0123"]
    assert _places(stub.rows["cafe0123"]) == EACH_ONCE
    assert stub.summaries["cafe0123"]["best/eval/accuracy"] == 0.7
    assert stub.preempting == {"cafe0123"}
    assert stub.exit_code == 0


def test_a_resumed_run_keeps_the_id_that_the_user_gave_it(record, said, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "their-id")
    _report(record, said, rows=_rows(10, 40), result=STOPPED)
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    _report(replace(record, resumed=True), said, rows=_rows(40, 60))
    assert _ids(record.folder) == {"their-id"}


def test_its_process_steps_back_where_cpus_are_short(monkeypatch):
    asked = []

    def refuse(module, *, niceness):
        asked.append(niceness)
        raise OSError

    monkeypatch.undo()
    monkeypatch.setattr(weights_and_biases, "start_child_process", refuse)
    start_ahead(OFFLINE)
    assert asked == [10]
