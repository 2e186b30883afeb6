"""The command as a user calls it, with real processes."""

import json
import os
import subprocess
import sys

import commands
import pytest
from ranks import rank_environment

from ddp_sgd.host import free_port
from ddp_sgd.report.journal import read_journal
from ddp_sgd.train import main


@pytest.fixture
def environment(tmp_path):
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "DDP_SGD_", "WANDB_"))
    }
    for name in rank_environment(0, 1, 1):
        clean.pop(name, None)
    return clean | {
        "OMP_NUM_THREADS": "1",
        "DDP_SGD_OUTPUT_DIR": str(tmp_path),
        "DDP_SGD_WANDB__MODE": "disabled",
    }


def torchrun(ranks, *options, environment):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    return commands.run(
        [*command, "-m", "ddp_sgd.train", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def result(folder, name="digits"):
    return json.loads((folder / name / "result.json").read_text())


def test_four_ranks_under_torchrun_learn_the_digits(environment, tmp_path):
    done = torchrun(4, environment=environment)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path)["world_size"] == 4
    assert result(tmp_path)["eval/accuracy"] >= 0.96
    assert done.stdout.count("finished: 240 steps") == 1  # rank 0 only
    journal = read_journal(tmp_path / "digits" / "metrics.jsonl")
    assert sum(row["event"] == "end" for row in journal) == 1


def test_one_process_learns_the_digits(environment, tmp_path):
    command = [sys.executable, "-m", "ddp_sgd.train"]
    done = commands.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path)["eval/accuracy"] >= 0.96
    assert done.stderr == ""


def test_srun_s_variables_alone_start_two_ranks(environment, tmp_path):
    def start(rank):
        task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
        command = [sys.executable, "-m", "ddp_sgd.train", "--epochs=1"]
        return commands.Popen(command, env=environment | job | task, stdout=subprocess.PIPE)

    job_id = (
        free_port() + 10_000
    )  # so that the port that follows from it, above 10,000, is that one modulo 20,000
    job = {"SLURM_JOB_ID": str(job_id), "SLURM_JOB_NODELIST": "localhost"}
    ranks = [start(rank) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    out = [rank.stdout.read() for rank in ranks]
    for rank in ranks:
        rank.stdout.close()
    assert b"finished: 23 steps" in out[0]
    assert out[1] == b""
    assert result(tmp_path)["world_size"] == 2


def test_an_error_of_all_ranks_is_one_line(environment):
    done = torchrun(3, "--data.train.class_path=ddp_sgd.data.Digitz", environment=environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ddp_sgd: error: ")]
    assert lines == [
        "ddp_sgd: error: data.train.class_path is ddp_sgd.data.Digitz, but ddp_sgd.data has no "
        "Digitz; did you "
        "mean Digits?"
    ]
    assert "/ddp_sgd/" not in done.stderr  # the traceback that follows is torchrun's own


def test_a_wrong_key_is_answered_before_torch_is_imported(environment):
    code = (
        "import sys; from ddp_sgd.train import main; code = main(['--optim.lrr=1']); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 64
    assert done.stderr == "ddp_sgd: error: unknown key optim.lrr; did you mean optim.lr?\n"


def test_help_and_configuration_are_printed(capsys):
    assert main(["--help"]) == 0
    assert "--optim.lr" in capsys.readouterr().out
    assert main(["--print_config", "--optim.lr=0.25"]) == 0
    assert "lr: 0.25" in capsys.readouterr().out


def test_main_in_this_process(monkeypatch, tmp_path, capsys):
    for name in rank_environment(0, 1, 1):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["--epochs=1", "--wandb.mode=disabled"]) == 0
    assert result(tmp_path / "runs")["step"] == 45
    assert "finished: 45 steps" in capsys.readouterr().out


@pytest.mark.parametrize("first", ["", "import torch; "])
def test_what_torch_is_made_of_is_set_aside_unless_others_use_it(first, tmp_path):
    options = [f"--output_dir={tmp_path}", "--epochs=1", "--wandb.mode=disabled"]
    code = f"""{first}import gc
from ddp_sgd.train import main
code = main({options})
print(code, gc.isenabled(), gc.get_freeze_count() > 100_000)"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == f"0 True {not first}"
