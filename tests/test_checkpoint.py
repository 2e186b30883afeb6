"""The command as a user calls it."""

import shutil
import subprocess
import sys

import pytest
import torch
from limits import WAIT_S
from ranks import run_ranks
from safetensors.torch import load_file
from saved_run import cut_short, files_of, flip_a_bit, plant_a_bomb, train, vouch_for

from ddp_sgd.checkpoint import main
from ddp_sgd.config import read_yaml_file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    digests = run_ranks(1, train, folder)
    return folder / "tiny", digests[0]


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "tiny", symlinks=True)


def call(*argv):
    return main([str(argument) for argument in argv])


def test_ls_is_a_table(run, capsys):
    assert call("ls", run) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("checkpoint ")
    assert [line.split()[0] for line in lines] == [file.name for file in files_of(run)]
    (run / "checkpoints").rename(run / "aside")
    assert call("ls", run) == 0
    assert capsys.readouterr().out == f"{run} holds no checkpoints\n"


def test_ls_and_verify_need_neither_torch_nor_pydantic_nor_numpy(run):
    """Each would take most of the time of the command."""
    program = (
        "import sys; from ddp_sgd.checkpoint import main; code = main(sys.argv[1:]); "
        "sys.exit(code or (9 if {'torch', 'pydantic', 'numpy'} & set(sys.modules) else 0))"
    )
    for command in ("ls", "verify"):
        subprocess.run(
            [sys.executable, "-c", program, command, run],
            capture_output=True,
            check=True,
            timeout=WAIT_S,
        )


def test_verify_looks_at_all(run, capsys):
    first, second, third = files_of(run)
    assert call("verify", run, run / "checkpoints" / "best") == 0
    out, err = capsys.readouterr()
    assert out.count(" is whole\n") == 4
    assert err == ""
    flip_a_bit(first)
    cut_short(second)
    assert call("verify", run) == 65
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{first} is damaged: its SHA-256 is not that of the manifest",
        f"{second} has {second.stat().st_size} bytes instead of {second.stat().st_size + 100}",
        f"{third} is whole",
    ]
    assert err == f"ddp_sgd: error: {run} has 2 of 3 damaged; go on from one that is whole.\n"


def test_verify_of_nothing_is_no_success(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert call("verify", tmp_path / "empty") == 65
    assert "has no checkpoint at all; " in capsys.readouterr().err
    assert call("verify", tmp_path / "nothing.pt") == 65
    assert capsys.readouterr().out == f"{tmp_path}/nothing.pt is not there\n"


def test_export_gives_the_weights_and_the_digest(run, saved, tmp_path, capsys):
    output = tmp_path / "x.safetensors"
    assert call("export", run, output) == 0
    assert capsys.readouterr().out == f"{output}: weights of step 45 from {files_of(run)[-1]}\n"
    model = torch.load(files_of(run)[-1], weights_only=True)["model"]
    back = load_file(output)
    assert all(torch.equal(back[name], value) for name, value in model.items())
    assert read_yaml_file(output.with_suffix(".yaml")) == read_yaml_file(run / "config.yaml")
    assert saved[1].encode() in output.read_bytes()
    assert call("export", run, output) == 73
    assert "is there already; choose another name, or add --force." in capsys.readouterr().err
    assert call("export", run, output, "--force") == 0


def test_average_is_a_checkpoint_of_its_own(run, tmp_path, capsys):
    output = tmp_path / "mean"
    assert call("average", run, "--last=2", f"--output={output}") == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert (first.split()[1:], second.split()[1:]) == (
        ["(step", "30,", "epoch", "2)"],
        ["(step", "45,", "epoch", "3)"],
    )
    assert last == f"{output}/step-00000045.pt: the mean of these 2"
    assert call("verify", output) == 0
    assert call("average", run, f"--output={output}") == 73
    assert "is there already" in capsys.readouterr().err


def test_diff_says_what_differs(run, tmp_path, capsys):
    first, _, third = files_of(run)
    assert call("diff", run, third) == 0
    assert capsys.readouterr().out == "settings: equal; weights: equal; momentum: equal\n"
    assert call("diff", first, third) == 1
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step: 15 -> 45", "samples: 1437 -> 4311"]
    assert last.startswith("settings: 2 differ; weights: ")
    buffers = torch.load(first, weights_only=True)["optimizer"]["momentum_buffer"]
    assert sum(line.startswith("momentum of ") for line in lines) == len(buffers)


def test_diff_names_other_shapes(run, capsys):
    first, second, _ = files_of(run)
    content = torch.load(first, weights_only=True)
    name, weight = next(iter(content["model"].items()))
    content["model"][name] = weight.double()[:2]
    torch.save(content, first)
    vouch_for(first)
    assert call("diff", first, second) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    shape = ", ".join(map(str, weight.shape[1:]))
    assert row.endswith(f"float64 (2, {shape}) -> float32 ({len(weight)}, {shape})")


@pytest.mark.parametrize("spoil", [flip_a_bit, cut_short])
@pytest.mark.parametrize("command", [("diff", "FILE", "FILE"), ("export", "FILE", "x.safetensors")])
def test_damage_ends_with_65(run, command, spoil, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = files_of(run)[0]
    spoil(file)
    assert call(*(argument.replace("FILE", str(file)) for argument in command)) == 65
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ("ls", "RUN"),
        ("verify", "RUN"),
        ("export", "RUN", "x.safetensors"),
        ("average", "RUN", "--output=x"),
        ("diff", "RUN", "RUN"),
    ],
)
def test_a_bomb_never_goes_off(run, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    plant_a_bomb(files_of(run)[-1], tmp_path / "trace")
    code = call(*(argument.replace("RUN", str(run)) for argument in command))
    assert code == (0 if command[0] in ("ls", "verify") else 65)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lss", "x"], "unknown command lss; did you mean ls?"),
        (["zzz"], "unknown command zzz; choose ls, verify, export, average, diff."),
        ([], "COMMAND; see python -m ddp_sgd.checkpoint --help."),
        (["ls"], "RUN; see python -m ddp_sgd.checkpoint ls --help."),
        (["ls", "x", "--al"], "unrecognized arguments: --al; see python -m ddp_sgd.checkpoint"),
        (["average", "x"], "--output; see python -m ddp_sgd.checkpoint average --help."),
        (["average", "x", "--output=y", "--last=z"], "invalid int value: 'z'; see"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, message, capsys):
    assert main(argv) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddp_sgd: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("command", [[], ["ls"], ["verify"], ["export"], ["average"], ["diff"]])
def test_help_is_there_for_each(command, capsys):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(" ".join(["usage: python -m ddp_sgd.checkpoint", *command]))


def test_module_runs_as_a_command(run):
    done = subprocess.run(
        [sys.executable, "-m", "ddp_sgd.checkpoint", "verify", run / "nothing"],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert done.returncode == 65
    assert done.stderr.startswith("ddp_sgd: error: ")
