import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import python_folder
from launching import LOCAL, MULTINODE, ROOT, Launch, environment, is_alive, kill
from limits import WAIT_S

from ddp_sgd.errors import ExitCode
from ddp_sgd.host import free_port
from ddp_sgd.launch import main

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
STARTED = []
ENDLESS = ("--epochs=100000", "--eval.every_epochs=100000", "--log.every_steps=1")


def _start(folder, script, *options, **variables):
    process = subprocess.Popen(
        [str(script), *options],
        cwd=folder,
        env=environment(**{"PYTHON": str(python_folder() / "python")} | variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    for process in STARTED:
        if process.poll() is None:
            process.terminate()  # the script ends its ranks; if it were killed, they would go on
            process.communicate(timeout=WAIT_S)
    STARTED.clear()


def _end(process):
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


def _run(folder, script, *options, **variables):
    return _end(_start(folder, script, *options, **variables))


def _result(folder, name="digits"):
    return json.loads((folder / "runs" / name / "result.json").read_text())


def _wait_until(holds, process):
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _num_rows(folder):
    journal = folder / "runs" / "digits" / "metrics.jsonl"
    return journal.read_text().count('"event": "train"') if journal.exists() else 0


def _has_trained(folder):
    return _num_rows(folder) > 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    code, out, err = _run(folder, LOCAL, "--nproc", "2", "--epochs=1")
    return folder, code, out, err


def _tool(name):
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path, f"{name} is not installed, though the extra [dev] names it"
    return path


@pytest.mark.parametrize("command", [("shellcheck", "-x"), ("shfmt", "-i", "4", "-d")])
def test_scripts_are_clean(command):
    name, *flags = command
    done = subprocess.run(
        [_tool(name), *flags, *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


NOT_IN_BASH_3_2 = {
    "a pattern list outside extglob": r"[!=]= *[@+?*!]\(",
    "a group in a regular expression that is no variable": r"=~ [^\"$ ]*\(",
    "a list of lines": r"\b(mapfile|readarray|coproc)\b",
    "an associative array": r"(declare|local) -[gAn]",
    "upper and lower case": r"\$\{\w+(\[.\])?(,|\^)",
    "a quoted value": r"\$\{\w+@[A-Za-z]\}",
    "a wait for any": r"\bwait -",
    "a variable that is set": r"\[\[ (! )?-v ",
    "redirection of both to the end, or into a pipe": r"&>>|\|&",
    "the last of an array": r"\[-\d+\]",
    "a case that goes on": r";;?&",
    "the time": r"%\([^)]*\)T|EPOCH(SECONDS|REALTIME)|BASHPID",
}
ONLY_GNU = {
    "sed": r"\bsed .*(\\\||\\\+|\\\?| -i|--)",
    "a tool that macOS lacks": r"(^|[ (|])(timeout|setsid|tac|flock|taskset|stat|realpath) ",
    "an option": r"readlink -f|grep -\w*P|xargs -r|head -n -|date .*%N|(cp|ls|mktemp) --|sort -V",
}


@pytest.mark.parametrize("what", [*NOT_IN_BASH_3_2, *ONLY_GNU])
def test_scripts_keep_to_what_macos_has(what):
    """Its bash is 3.2, its tools are those of BSD."""
    pattern = re.compile((NOT_IN_BASH_3_2 | ONLY_GNU)[what])
    lines = [
        f"{script.name}:{number}: {line}"
        for script in SCRIPTS
        for number, line in enumerate(script.read_text().splitlines(), 1)
        if pattern.search(re.sub(r"(^|\s)#.*", "", line))
    ]
    assert lines == []


@pytest.mark.parametrize("script", [LOCAL, MULTINODE])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_head_of_the_script(script, flag, tmp_path):
    code, out, err = _run(tmp_path, script, flag)
    assert (code, err) == (0, "")
    assert f"launch/{script.name} " in out
    assert "[--key=value of" in out
    assert "set -euo" not in out


def test_local_trains_on_two_processes(finished):
    folder, code, out, err = finished
    assert code == ExitCode.DONE, err
    assert _result(folder)["status"] == "finished"
    assert _result(folder)["world_size"] == 2
    assert "finished: 23 steps" in out
    assert "OMP_NUM_THREADS" not in err


def test_output_of_every_rank_ends_up_in_the_run_folder(finished):
    folder, *_ = finished
    logs = folder / "runs" / "digits" / "logs"
    assert sorted(path.parent.name for path in logs.glob("*/*/*/stdout.log")) == ["0", "1"]
    assert [path.name for path in (folder / "runs").iterdir()] == ["digits"]
    (said,) = (path.read_text() for path in logs.glob("*/attempt_0/0/stdout.log"))
    assert "finished: 23 steps" in said


def test_the_module_trains_without_the_scripts(finished, tmp_path):
    command = (
        python_folder() / "python",
        "-m",
        "ddp_sgd.launch",
        "--nproc",
        "2",
        "--",
        "--epochs=1",
    )
    code, out, err = _run(tmp_path, *command)
    assert code == ExitCode.DONE, err
    assert "finished: 23 steps" in out
    assert _result(tmp_path)["weights_digest"] == _result(finished[0])["weights_digest"]


def test_help_of_the_module_names_every_option(capsys):
    assert main(["--nproc=2", "--help"]) == 0
    shown = capsys.readouterr().out
    options = ("--nproc", "--nnodes", "--standalone", "--max-restarts", "MASTER_ADDR", "NODE_RANK")
    assert [name for name in options if name not in shown] == []


def test_the_launcher_imports_no_torch_and_listens_before_it_imports_what_takes_long():
    code = "import sys; from ddp_sgd.launch import main; print('pydantic' in sys.modules); "
    code += "main(['--nproc=1', '--optim.lrr=1']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    )
    assert done.stdout == "False\nFalse\n"
    assert "unknown key optim.lrr" in done.stderr


def test_options_of_local_come_first_and_the_rest_is_the_runs(tmp_path):
    code, out, err = _run(
        tmp_path, LOCAL, "--nproc=1", "--max-restarts=0", "--", "--epochs=7", "--print_config"
    )
    assert (code, err) == (0, "")
    assert "epochs: 7" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
        (["--nproc=two"], "the number of processes is 'two'; set NPROC=2"),
        (["--nproc"], "the number of processes is 'none'; set NPROC=2"),
        (["--max-restarts", "often"], "--max-restarts is 'often'; give a number"),
    ],
)
def test_wrong_call_of_local_is_one_line(options, words, tmp_path):
    code, out, err = _run(tmp_path, LOCAL, *options)
    assert (code, out) == (ExitCode.CONFIG, "")
    assert err.startswith("ddp_sgd: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_found_before_the_start(tmp_path):
    (tmp_path / "runs").write_text("a file")
    code, _, err = _run(tmp_path, LOCAL, "--nproc=1")
    assert code == ExitCode.OUTPUT
    assert "ddp_sgd: error: runs/digits cannot be written; set output_dir to a folder" in err


def test_divergence_is_the_exit_code_though_torchrun_exits_with_1(tmp_path):
    code, _, err = _run(
        tmp_path, LOCAL, "--nproc=2", "--epochs=1", "--optim.lr=1e30", "--log.every_steps=1"
    )
    assert code == ExitCode.DIVERGED
    assert _result(tmp_path)["status"] == "failed"
    assert err.count("ddp_sgd: error: ") == 1
    assert "lower optim.lr" in err
    assert err.splitlines()[-1].endswith("is in runs/digits/logs")


def test_fault_of_another_rank_than_0_is_shown(tmp_path):
    fault = (
        "--data.train={class_path: user_code.FailsOnRank, init_args: {rank: 1}}",
        "--model.init_args.inputs=4",
        "--data.eval=null",
    )
    code, _, err = _run(tmp_path, LOCAL, "--nproc=2", *fault)
    assert code == ExitCode.DATA
    assert err.count("ddp_sgd: error: ") == 1
    assert "data.train[" in err


def test_stale_result_is_not_taken(finished):
    folder, *_ = finished
    before = _result(folder)
    code, _, err = _run(folder, LOCAL, "--nproc=1", "--runtime.device=mps")
    assert _result(folder) == before
    assert before["exit_code"] == 0
    assert code == ExitCode.CONFIG
    assert "ddp_sgd: error: runtime.device is mps" in err
    (logs,) = (folder / "runs").glob("digits.logs.*")
    assert f"is in runs/{logs.name}" in err.splitlines()[-1]
    shutil.rmtree(logs)


def test_a_run_that_is_refused_or_has_nothing_left_to_do(finished):
    folder, *_ = finished
    before = _result(folder)
    code, _, err = _run(folder, LOCAL, "--nproc=1", "--epochs=1", "--seed=1")
    assert (code, _result(folder)) == (ExitCode.REFUSED, before)
    assert "seed was 0, is 1" in err
    for logs in (folder / "runs").glob("digits.logs.*"):
        shutil.rmtree(logs)
    code, out, _ = _run(folder, LOCAL, "--nproc=1", "--epochs=1")
    assert (code, _result(folder)) == (ExitCode.DONE, before)
    assert "nothing is left to do" in out
    assert not list((folder / "runs").glob("digits.logs.*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_to_the_script_ends_the_run_between_two_steps(number, tmp_path):
    process = _start(tmp_path, LOCAL, "--nproc=2", *ENDLESS)
    _wait_until(lambda: _has_trained(tmp_path), process)
    process.send_signal(number)
    if number != signal.SIGINT:  # a second Ctrl-C does not wait
        process.send_signal(number)
    code, out, err = _end(process)
    assert code == ExitCode.STOPPED, err
    result = _result(tmp_path)
    assert (result["status"], result["exit_code"]) == ("stopped", 75)
    assert result["step"] > 0
    assert "stopping after step" in out


def test_signal_before_the_ranks_are_there_is_a_stop_too(tmp_path):
    process = _start(tmp_path, LOCAL, "--nproc=1", *ENDLESS, PYTHON=sys.executable)
    _wait_until(lambda: list(tmp_path.glob("runs/digits.logs.*")), process)
    process.send_signal(signal.SIGTERM)
    code, _, err = _end(process)
    assert code == ExitCode.STOPPED, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_launcher_in_the_background_of_a_script_stops_as_any_other(number, tmp_path):
    """nohup and ``&`` have SIGINT and SIGHUP ignored, and they stay so."""
    script = f"trap '' INT HUP; exec {LOCAL} --nproc=2 {' '.join(ENDLESS)}"
    process = _start(tmp_path, "/bin/bash", "-c", script)
    _wait_until(lambda: _has_trained(tmp_path), process)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGINT):
        process.send_signal(ignored)
    rows = _num_rows(tmp_path)
    _wait_until(lambda: _num_rows(tmp_path) > rows + 10, process)
    process.send_signal(number)
    code, _, err = _end(process)
    assert code == ExitCode.STOPPED, err
    assert _result(tmp_path)["status"] == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_second_interrupt_ends_all_processes_at_once(tmp_path):
    hurry = tmp_path / "hurry"
    hurry.touch()
    slow = f"--model={{class_path: user_code.Slow, init_args: {{pause_s: 100.0, until: {hurry}}}}}"
    run = Launch(tmp_path, LOCAL, "--nproc=2", slow, *ENDLESS)
    try:
        run.wait_until(lambda: run.rows() and len(run.ranks) == 2)
        hurry.unlink()  # the next step takes longer than anybody waits
        processes = [run.agent, *run.ranks.values()]
        run.script.send_signal(signal.SIGINT)
        run.wait_until(lambda: "closing signal SIGTERM" in run.said)
        run.script.send_signal(signal.SIGINT)
        assert run.end() == 128 + signal.SIGINT, run.said
        assert not any(map(is_alive, processes))
    finally:
        run.clean_up()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_stop_that_races_a_restart_leaves_a_result(tmp_path):
    """The workers of the next attempt end before they can write one."""
    options = ("--max-restarts=3", *ENDLESS, "--checkpoint.every_steps=5")
    run = Launch(tmp_path, LOCAL, "--nproc=2", *options)
    try:
        run.wait_until(lambda: run.rows("checkpoint") and 1 in run.ranks)
        kill(run.ranks[1])
        run.wait_until(lambda: list(tmp_path.glob("runs/digits.logs.*/*/attempt_1")))
        run.script.send_signal(signal.SIGTERM)
        assert run.end() == ExitCode.STOPPED, run.said
    finally:
        run.clean_up()
    result = run.result()
    assert (result["status"], result["exit_code"]) == ("stopped", 75)
    newest = max((run.run_folder / "checkpoints").glob("step-*.pt"), key=lambda path: path.name)
    assert result["step"] == int(newest.stem.removeprefix("step-")) > 0
    assert result["world_size"] == 2
    assert run.said.splitlines()[-1].endswith("is in runs/digits/logs")


def test_two_machines_take_the_same_steps_as_two_processes(finished, tmp_path):
    variables = {
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NPROC": "1",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }
    machines = [
        _start(tmp_path, MULTINODE, "--epochs=1", **variables, NODE_RANK=rank)
        for rank in ("0", "1")
    ]
    for code, _, err in [_end(machine) for machine in machines]:
        assert code == ExitCode.DONE, err
    result = _result(tmp_path)
    assert result["world_size"] == 2
    assert result["weights_digest"] == _result(finished[0])["weights_digest"]
    logs = tmp_path / "runs" / "digits" / "logs"
    assert len(list(logs.glob("*/attempt_0/0/stdout.log"))) == 2


def test_exit_code_is_known_on_a_machine_without_the_run_folder(tmp_path):
    variables = {
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NPROC": "1",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }
    machines = []
    for rank in ("0", "1"):
        folder = tmp_path / rank
        folder.mkdir()
        options = ("--epochs=1", "--optim.lr=1e30", "--log.every_steps=1")
        machines.append(_start(folder, MULTINODE, *options, **variables, NODE_RANK=rank))
    ends = [_end(machine) for machine in machines]
    assert [code for code, *_ in ends] == [ExitCode.DIVERGED] * 2, ends
    assert len(list(tmp_path.glob("*/runs/digits/result.json"))) == 1


def test_port_that_is_taken_is_told_where_all_meet(tmp_path):
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        code, _, err = _run(tmp_path, MULTINODE, "--nnodes=2", "--nproc=1", **variables)
    assert code == ExitCode.PEER, err
    line = f"ddp_sgd: error: port {port} on 127.0.0.1 is held by another program; set MASTER_PORT"
    assert sum(text.startswith(line) for text in err.splitlines()) == 1


def test_name_that_nobody_knows_is_told_of(tmp_path):
    variables = {"MASTER_ADDR": "nosuch.invalid", "DDP_SGD_RUNTIME__TIMEOUT_S": "1"}
    code, _, err = _run(tmp_path, MULTINODE, "--nnodes=2", "--nproc=1", **variables)
    assert code == ExitCode.PEER, err
    assert "this host does not know nosuch.invalid; set MASTER_ADDR to a name that every" in err


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "NNODES is not set; set it to the number of machines, such as NNODES=2."),
        ({"NNODES": "many"}, "NNODES is 'many'; set a number of machines, such as NNODES=2, or"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set; set it, on every machine, to the name"),
        (
            {"NNODES": "1:2", "MASTER_ADDR": "here", "MASTER_PORT": "http"},
            "MASTER_PORT is 'http'; set a port that is free on here, such as MASTER_PORT=29400.",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "here", "NODE_RANK": "first"},
            "NODE_RANK is 'first'; set 0 on here and 1, 2, ... elsewhere, or unset it.",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "here", "NPROC": "0"},
            "the number of processes is '0'; set NPROC=2, for example.",
        ),
    ],
)
def test_half_set_environment_of_multinode_is_one_line(variables, words, tmp_path):
    code, out, err = _run(tmp_path, MULTINODE, **variables)
    assert (code, out) == (ExitCode.CONFIG, "")
    assert err.startswith(f"ddp_sgd: error: {words}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("where", ["2>&1 | true", "2> /dev/full > /dev/full", ">&- 2>&-"])
@pytest.mark.parametrize(("option", "code"), [("--nproc=x", 64), ("--resume=must", 65)])
def test_the_code_of_a_script_does_not_depend_on_its_console(option, code, where, tmp_path):
    words = f"{LOCAL} --nproc=1 {option} {where}"
    done = subprocess.run(
        ["bash", "-c", f'{words}; echo "${{PIPESTATUS[0]}}" > code'],
        cwd=tmp_path,
        env=environment(PYTHON=sys.executable),
        stdout=subprocess.DEVNULL,
        check=False,
        timeout=WAIT_S,
    )
    assert done.returncode == 0
    assert int((tmp_path / "code").read_text()) == code
