"""The command as a user calls it, with real processes."""

import json
import os
import subprocess
import sys

import commands
import pytest
from limits import WAIT_S
from ranks import rank_environment, run_ranks
from saved_run import cut_short, files_of, flip_a_bit, plant_a_bomb, train

from ddp_sgd.config import RunConfig, read_yaml_file
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.evaluate import main
from ddp_sgd.report.journal import read_journal


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, train, folder)
    return folder / "tiny"


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", *rank_environment(0, 1, 1)):
        monkeypatch.delenv(name, raising=False)


def torchrun(ranks, *arguments):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return commands.run(
        [sys.executable, *launch, "-m", "ddp_sgd.evaluate", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )


def contents(folder):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def test_three_ranks_give_what_two_have_written(run):
    before = contents(run)
    done = torchrun(3, run)
    assert done.returncode == 0, done.stderr
    summary, last = done.stdout.splitlines()  # rank 0 only
    score = json.loads(last)
    result = json.loads((run / "result.json").read_text())
    shared = ("step", "epoch", "samples", "weights_digest")
    assert {key: score[key] for key in shared} == {key: result[key] for key in shared}
    assert {k: v for k, v in score.items() if k.startswith("eval/")} == {
        k: v for k, v in result.items() if k.startswith("eval/")
    }
    assert score["world_size"] == 3
    assert score["checkpoint"] == str(files_of(run)[-1])
    assert summary.startswith(f"{files_of(run)[-1]}: 24 steps, eval loss ")
    assert "the run itself" not in summary
    assert contents(run) == before


def test_a_link_leads_to_its_checkpoint(run, capsys):
    assert main([str(run / "checkpoints" / "best")]) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [row for row in read_journal(run / "metrics.jsonl") if row["event"] == "eval"]
    best = max(rows, key=lambda row: row["eval/accuracy"])
    assert (score["step"], score["eval/accuracy"]) == (best["step"], best["eval/accuracy"])


def test_options_are_laid_over_the_run_s_configuration(run, tmp_path, capsys):
    file = tmp_path / "wide.yaml"
    file.write_text("data: {eval: {init_args: {split: train}}}")
    argv = [f"--config={file}", "--data.batch_size=50", str(run)]
    assert main([*argv, "--print_config"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    config = read_yaml_file(run / "config.yaml")
    config["data"]["batch_size"] = 50
    config["data"]["eval"]["init_args"]["split"] = "train"
    assert read_yaml_file(shown) == config
    assert main(argv) == 0
    summary, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["eval/count"] == 1437
    assert "; the run itself wrote eval/loss " in summary


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (
            [],
            64,
            "the following arguments are required: CHECKPOINT; see python -m ddp_sgd.evaluate",
        ),
        (["RUN", "RUN"], 64, "stands alone; write --key=value"),
        (["RUN", "--epoch=3"], 64, "unknown key epoch; did you mean epochs?"),
        (["RUN", "--data.eval=null"], 64, "data.eval is null; name a data set"),
        (["RUN/nothing"], 65, "is not there; name a checkpoint or a run folder."),
        (["RUN/result.json"], 65, "has no valid manifest result.json beside it"),
    ],
)
def test_a_mistake_is_one_line(run, argv, code, message, capsys):
    assert main([argument.replace("RUN", str(run)) for argument in argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddp_sgd: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("spoil", "message"), [(flip_a_bit, "is damaged: its SHA-256"), (cut_short, "bytes instead of")]
)
def test_damage_is_found(run, spoil, message, capsys):
    *_, older, newest = files_of(run)
    spoil(newest)
    assert main([str(newest)]) == 65
    assert message in capsys.readouterr().err
    assert main([str(run)]) == 0  # the newest that is whole
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoint"] == str(older)


def test_two_ranks_tell_of_damage_once(run):
    flip_a_bit(files_of(run)[0])
    done = torchrun(2, files_of(run)[0])
    lines = [line for line in done.stderr.splitlines() if line.startswith("ddp_sgd: error: ")]
    assert len(lines) == 1
    assert "is damaged: its SHA-256 is not that of the manifest" in lines[0]
    assert done.stdout == ""


def test_a_bomb_does_not_go_off(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    plant_a_bomb(files_of(run)[-1], tmp_path / "trace")
    assert main([str(run)]) == 65
    assert "holds more than tensors and plain data, and is not read" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


def test_help_says_what_a_checkpoint_is(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m ddp_sgd.evaluate CHECKPOINT ")
    assert "a link such as" in out


def test_a_wrong_key_is_answered_before_torch_is_imported():
    code = (
        "import sys; from ddp_sgd.evaluate import main; code = main(['x', '--optim.lrr=1']); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert done.returncode == 64
    assert done.stderr == "ddp_sgd: error: unknown key optim.lrr; did you mean optim.lr?\n"


def test_a_model_whose_output_is_the_loss_is_scored_again_with_its_numbers(tmp_path, capsys):
    config = RunConfig(
        name="own", output_dir=str(tmp_path), epochs=1, loss=None, wandb={"mode": "disabled"},
        model={"class_path": "user_code.OwnLoss"},
    )  # fmt: skip
    result = fit(config, Runtime())
    parts = result.scores["eval/fit"] + result.scores["eval/size"]
    assert result.scores["eval/loss"] == pytest.approx(parts, rel=1e-6)  # float32
    capsys.readouterr()
    assert main(["--trust", str(tmp_path / "own")]) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: score[key] for key in result.scores} == result.scores
    row = json.loads((tmp_path / "own" / "result.json").read_text())
    assert {key: row[key] for key in result.scores} == result.scores
