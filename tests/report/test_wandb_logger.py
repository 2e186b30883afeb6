import os
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, fields
from pathlib import Path

import commands
import pytest
from limits import WAIT_S
from wandb_reader import (
    inspect_offline_run,
    offline_folder,
    offline_folders,
    offline_records,
    offline_summary,
)
from wandb_runs import (
    COMMIT,
    OFFLINE,
    RESULT,
    STOPPED,
    TrackedRun,
    make_record,
    places,
    resumed,
    rows_of,
)
from wandb_stub import ENTITY, KEY, WandbStub, isolate_wandb

from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.report import wandb_logger
from ddp_sgd.report.wandb_logger import start_ahead

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
    monkeypatch.setattr(wandb_logger, "_NICENESS", 0)  # other tests take the CPUs
    monkeypatch.setattr(wandb_logger, "subprocess", commands)  # forks have imported wandb
    return folder


@pytest.fixture
def _real_start(home, monkeypatch):
    monkeypatch.setattr(wandb_logger, "subprocess", subprocess)


@pytest.fixture
def record(tmp_path):
    return make_record(tmp_path / "trial")


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
    run = TrackedRun(record, said.append, config)
    run.write(rows)
    run.finish(result)
    return run


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
    row = {**AXES, "train/loss": None, "train/lr": 0.5, "note": "first"}
    _report(record, said, OFFLINE, rows=[("train", row), ("end", {**AXES, "wall_s": 3.0})])
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
    assert config["optim"] == record.config.model_dump(mode="json")["optim"]
    assert config["plan"] == asdict(record.plan)
    assert set(config["plan"]) == {field.name for field in fields(record.plan)}
    (changed,) = offline_records(record.folder, "config")
    assert changed["config"]["update"]["git_commit"] == COMMIT
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


def test_an_online_run_holds_the_samerows_of(stub, record, said, capfd):
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
    assert not (record.folder / "wandb").exists()


@pytest.mark.parametrize("value", ["true", "1"])
def test_wandb_disabled_is_followed(record, said, monkeypatch, value):
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setattr(sys, "executable", "no such program")
    _report(record, said)
    assert not said
    assert not (record.folder / "wandb").exists()


def test_wandb_dir_is_where_wandbs_files_go(record, said, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("WANDB_DIR", str(elsewhere))
    _report(record, said, rows=rows_of(10, 40), result=STOPPED)
    assert offline_folders(record.folder) == []
    assert f"in {elsewhere / 'wandb'}" in said[0]
    _report(resumed(record, 20), said, rows=rows_of(30, 60))
    assert places(inspect_offline_run(elsewhere)) == places(row for _, row in rows_of(10, 60))


def test_an_unwritable_home_prints_nothing_of_wandbs_own(record, said, monkeypatch, capfd):
    monkeypatch.setenv("HOME", "/proc/nobody")
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.delenv(f"WANDB_{name}_DIR")
    _report(record, said)
    (line,) = said
    assert line.startswith("W&B: offline (no API key), in ")
    assert tuple(capfd.readouterr()) == ("", "")
    assert inspect_offline_run(record.folder) == LOGGED


def test_disabled_in_wandbs_settings_file_is_followed(record, said, home):
    (home / "config").mkdir()
    (home / "config" / "settings").write_text("[default]\nmode = disabled\n")
    _report(record, said)
    assert not said
    assert {path.name for path in (record.folder / "wandb").iterdir()} == {".lock"}


def test_a_server_that_refuses_connections_leads_offline(record, said, monkeypatch, capfd):
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT_S", 0.3)
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
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT_S", 0.3)
    with WandbStub(hold=True) as server:
        _use(monkeypatch, server.url)
        sink = TrackedRun(record, said.append)
        assert server.asked.wait(WAIT_S)
        sink.write(ROWS)  # the server holds the request until the `with` ends
        sink.finish(RESULT)
        assert not server.operations  # it has answered nothing
    assert set(server.paths) == {"/graphql"}  # nothing more was sent at exit
    (line,) = said
    assert line.startswith("W&B: offline (")
    assert inspect_offline_run(record.folder) == LOGGED


def test_a_server_that_falls_silent_does_not_hold_the_end(stub, record, said, monkeypatch):
    monkeypatch.setattr(wandb_logger, "UPLOAD_TIMEOUT_S", 0.2)
    opened = threading.Event()
    sink = TrackedRun(record, lambda line: (said.append(line), opened.set()))
    assert opened.wait(WAIT_S)
    stub.hold = True
    sink.write(ROWS)
    sink.finish(RESULT)
    (folder,) = (record.folder / "wandb").glob("run-*")
    assert said[1:] == [f"W&B: not all sent after 2 s; the rest: wandb sync {folder}"]


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
    commands.run(
        [sys.executable, "-m", "wandb", *arguments], check=True, capture_output=True, timeout=WAIT_S
    )
    (rows,) = stub.rows.values()
    assert [row["step"] for row in rows] == [row["step"] for row in LOGGED]


def test_a_variable_that_wandb_refuses_ends_in_one_line(record, said, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sideways")
    _report(record, said)
    (line,) = said
    assert line.startswith("W&B: stopped (")
    assert "\n" not in line


def _start(record, said, config=OFFLINE):
    """Start a sink, and return it when the run is open, with the process and wandb's helper."""
    opened = threading.Event()
    sink = TrackedRun(record, lambda line: (said.append(line), opened.set()), config)
    process = sink.logger._process.pid
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
    (ahead,) = wandb_logger._ahead
    sink, process, _ = _start(record, said)
    assert process == ahead.pid
    assert not wandb_logger._ahead
    sink.write(ROWS)
    sink.finish(RESULT)
    assert inspect_offline_run(record.folder) == LOGGED


def test_nothing_is_started_ahead_where_wandb_is_disabled(monkeypatch):
    start_ahead(WandbConfig(mode="disabled"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start_ahead(WandbConfig())
    assert not wandb_logger._ahead


def test_a_process_that_nobody_takes_ends_with_the_trainer():
    code = (
        "from ddp_sgd.config.sections import WandbConfig; "
        "from ddp_sgd.report import wandb_logger as module; "
        "module.start_ahead(WandbConfig(mode='offline')); print(module._ahead[0].pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _await_end(int(done.stdout))


def test_many_rows_at_once_are_all_logged(record, said):
    rows = [("train", {**AXES, "samples": samples}) for samples in range(1000)]
    _report(record, said, OFFLINE, rows=rows)
    assert [row["samples"] for row in inspect_offline_run(record.folder)] == list(range(1000))


def test_a_system_without_a_free_thread_is_no_trouble(record, said, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    _report(record, said)
    assert said == ["W&B: not started (can't start new thread); metrics.jsonl has every row"]


@pytest.mark.usefixtures("_real_start")
def test_a_system_that_starts_no_process_is_no_trouble(record, said, monkeypatch):
    monkeypatch.setattr(sys, "executable", "no such program")
    _report(record, said)
    (line,) = said
    assert line.startswith("W&B: not started ([Errno 2] ")


@pytest.mark.usefixtures("_real_start")
def test_a_missing_wandb_is_no_trouble(record, said, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')")
    monkeypatch.syspath_prepend(tmp_path)
    _report(record, said)
    assert said == ["W&B: stopped (no wandb here); training goes on, metrics.jsonl has every row"]


def test_the_helper_of_a_run_of_the_users_own_is_not_used(record, said, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "theirs")
    _report(record, said)
    assert inspect_offline_run(record.folder) == LOGGED


@pytest.mark.usefixtures("_real_start")
def test_signals_to_the_whole_job_do_not_end_it(record, said):
    sink = TrackedRun(record, said.append, OFFLINE)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):  # long before it has loaded anything
        os.kill(sink.logger._process.pid, signal.Signals[name])
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
    monkeypatch.setattr(wandb_logger, "FINISH_TIMEOUT_S", 0.2)
    sink, process, helper = _start(record, said)
    os.kill(process if stuck == "process" else helper, signal.SIGSTOP)
    sink.write(ROWS)
    sink.finish(RESULT)
    rest = f"python -m ddp_sgd.report.wandb_follower {record.folder}"
    assert said[1:] == [f"W&B: not finished after 2 s; complete it: {rest}"]
    if stuck == "helper":
        os.kill(helper, signal.SIGCONT)
    _await_end(process, helper)


def test_its_process_has_a_low_priority(record, said):
    """In a process of its own, whose niceness is not set to 0 for the tests."""
    code = (
        "import os, time; from ddp_sgd.config.sections import WandbConfig; "
        "from ddp_sgd.report import wandb_logger as module; "
        "module.start_ahead(WandbConfig(mode='offline')); pid = module._ahead[0].pid\n"
        "while os.getpriority(os.PRIO_PROCESS, pid) < min(19, os.nice(0) + 10): time.sleep(0.01)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)
