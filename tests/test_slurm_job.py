import shlex
import socket
import subprocess

import pytest
from limits import WAIT_S

from ddp_sgd.errors import ConfigError, ExitCode
from ddp_sgd.requeue import describe_job, find_port, main

JOB = {
    "SLURM_JOB_ID": "40017",
    "SLURM_JOB_NODELIST": "node[03-05,7],other",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}


@pytest.fixture(autouse=True)
def _job(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)


def test_ranks_meet_on_the_first_node_at_a_port_of_the_job(tmp_path):
    found = describe_job(JOB, tmp_path / "runs" / "x", 7)
    port = int(found.pop("MASTER_PORT"))
    assert (port - 10_017) % 1009 == 0
    logs = tmp_path / "runs" / "x.logs" / "40017.0"
    assert found == {
        "job": "40017",
        "attempt": "40017.0",
        "folder": str(tmp_path / "runs" / "x"),
        "logs": str(logs),
        "MASTER_ADDR": "node03",
        "TIMEOUT_S": "7",
        "RANKS_OF_NODES": "2 2 1",
        "LAUNCH_EXIT_CODE_FILE": str(logs / "exit_code"),
    }


def test_a_task_of_an_array_has_a_name_of_its_own_and_a_number_too(tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "40015", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "3"}
    found = describe_job(JOB | array, tmp_path, 7)
    assert (found["job"], found["attempt"]) == ("40015_2", "40017.3")


def test_a_port_that_another_program_listens_on_is_passed_over():
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        if port + 1009 > 65_535:
            pytest.skip("there is no port above this one")
        assert find_port(port) > port
    with socket.socket() as free:
        free.bind(("localhost", 0))
        assert find_port(free.getsockname()[1]) == free.getsockname()[1]


def test_a_shell_takes_what_is_printed(capsys, tmp_path):
    folder = "runs of 'mine'; echo $HOME"
    assert main(["--prepare", f"--output_dir={folder}", "--name=x", "--runtime.timeout_s=2.5"]) == 0
    script = (
        f'{capsys.readouterr().out}printf "%s|" "$folder" "$logs" "$TIMEOUT_S" "$RANKS_OF_NODES"'
    )
    done = subprocess.run(
        ["bash", "-uec", script], capture_output=True, text=True, check=True, timeout=WAIT_S
    )
    assert done.stdout == f"{folder}/x|{folder}/x.logs/40017.0|3|2 2 1|"
    assert (tmp_path / folder / "x.logs" / "40017.0").is_dir()


def test_tasks_of_the_batch_script_count_more_than_those_of_a_step(capsys):
    assert main(["--prepare", "--tasks_per_node=3,1(x2)"]) == 0
    lines = dict(
        shlex.split(line)[0].split("=", 1) for line in capsys.readouterr().out.splitlines()
    )
    assert lines["RANKS_OF_NODES"] == "3 1 1"


def test_outside_of_slurm_the_launcher_is_named():
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set; submit a script of slurm/"):
        describe_job({}, JOB, 7)


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert main(["--prepare"]) == ExitCode.OUTPUT
    assert "runs/digits.logs/40017.0 cannot be written; set output_dir" in capsys.readouterr().err
