import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_sgd.config import RunConfig, dump_yaml, load_config, read_command_line
from ddp_sgd.errors import ConfigError


def _add_options(parser):
    parser.add_argument("--world_size", type=int, default=1, metavar="N", help="Ranks: 100 %%.")
    parser.add_argument("--samples", type=int, help="Samples.")


def _read(*argv, environ=None):
    return read_command_line(
        argv, environ or {}, program="python -m x", about="About x.", add_options=_add_options
    )


def test_nothing_given_is_the_defaults():
    line = _read()
    assert line.config == RunConfig()
    assert line.options == {"debug": False, "world_size": 1, "samples": None}
    assert line.text is None


def test_both_ways_of_writing_a_value(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 3\noptim: {lr: 7}")
    other = tmp_path / "b.yaml"
    other.write_text("epochs: 4")
    line = _read("--config", str(file), f"--config={other}", "--optim.momentum", "0.5", "--seed=3")
    config = line.config
    assert (config.epochs, config.optim.lr, config.optim.momentum, config.seed) == (4, 7.0, 0.5, 3)
    assert _read("--world_size", "8", "--samples=9", "--debug").options == {
        "debug": True,
        "world_size": 8,
        "samples": 9,
    }


def test_flags_win_over_files_wherever_they_stand(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 3")
    assert _read("--epochs=5", "--config", str(file)).config.epochs == 5


def test_flags_win_over_the_environment():
    environ = {"DDP_SGD_EPOCHS": "3", "DDP_SGD_OPTIM__LR": "2", "OTHER": "1"}
    config = _read("--epochs=5", environ=environ).config
    assert (config.epochs, config.optim.lr) == (5, 2.0)


def test_a_value_may_hold_an_equals_sign_and_the_last_one_wins():
    line = _read("--model.init_args.x=a=b", "--world_size=2", "--world_size=3")
    assert line.config.model.init_args["x"] == "a=b"
    assert line.options["world_size"] == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x.yaml"], "argument 'x.yaml' stands alone; write --config=x.yaml."),
        (["optim.lr=3"], "argument 'optim.lr=3' stands alone; write --optim.lr=3."),
        (["-epochs=3"], "argument '-epochs=3' stands alone; write --epochs=3."),
        (["x"], "argument 'x' stands alone; write --key=value, or --help to see the keys."),
        (["--"], "argument '--' stands alone; "),
        (["--optim.nesterov"], "--optim.nesterov has no value; write --optim.nesterov=true."),
        (["--optim.lr", "--debug"], "--optim.lr has no value; write --optim.lr=0.05."),
        (["--optim.scaling"], "--optim.scaling has no value; write --optim.scaling=linear."),
        (["--optim"], "--optim has no value; write --optim.lr=0.05."),
        (["--model"], "--model has no value; write --model.class_path=ddp_sgd.models.MLP."),
        (["--optim.lr", "-x"], "--optim.lr has no value; write --optim.lr=0.05."),
        (["--config"], "argument --config: expected one argument; see python -m x --help."),
        (["--config="], "--config is empty; write --config=configs/digits.yaml."),
        (["--world_size"], "argument --world_size: expected one argument; see python -m x --help."),
        (
            ["--debug=no"],
            "argument --debug: ignored explicit argument 'no'; see python -m",
        ),
        (["--help=no"], "argument -h/--help: ignored explicit argument 'no'; see python -m x"),
        (["--confg=x.yaml"], "unknown key confg; did you mean --config?"),
        (["--world-size"], "unknown option --world-size; did you mean --world_size?"),
        (["--momentum"], "unknown option --momentum; did you mean --optim.momentum?"),
        (["--zzzzzz"], "unknown option --zzzzzz; see --help."),
        (["--world-size=3"], "unknown key world-size; did you mean --world_size?"),
        (["--optim.lrr=3"], "unknown key optim.lrr; did you mean optim.lr?"),
        (["--world_size=x"], "argument --world_size: invalid int value: 'x'; see python -m x"),
        (["--optim.lr", "-1"], "optim.lr is -1; choose a number above 0, such as 0.05."),
        (["--optim=3"], "optim is 3; set its keys, such as optim.lr=0.05."),
        (["--=3"], "-- names no key; "),
        (["--config=no.yaml"], "no.yaml does not exist; "),
    ],
)
def test_a_wrong_command_line_has_a_remedy(argv, message):
    with pytest.raises(ConfigError) as caught:
        _read(*argv)
    assert message in str(caught.value)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_home_folder_in_options_variables_and_files(home):
    (home / "a.yaml").write_text("output_dir: ~/runs")
    wanted = f"{home}/runs"
    for argv, environ in (
        (["--output_dir=~/runs"], {}),
        ([], {"DDP_SGD_OUTPUT_DIR": "~/runs"}),
        (["--config=~/a.yaml"], {}),
        (["--config", "~/a.yaml"], {}),
    ):
        config = _read(*argv, environ=environ).config
        assert config.output_dir == wanted
        assert f"output_dir: {wanted}\n" in dump_yaml(config)
    assert _read("--resume=~/a/b").config.resume == f"{home}/a/b"
    assert _read("--output_dir=~").config.output_dir == str(home)


@pytest.mark.parametrize("path", ["./~/runs", "a/~", "/~", "a~b", "runs/"])
def test_other_paths_stay_as_they_are(path):
    config = _read(f"--output_dir={path}", f"--resume={path}").config
    assert (config.output_dir, config.resume) == (path, path)


@pytest.mark.parametrize("name", ["output_dir", "resume", "config"])
def test_home_folder_that_does_not_exist(name):
    with pytest.raises(ConfigError) as caught:
        _read(f"--{name}=~no_such_user/x")
    assert str(caught.value) == (
        f"{'--config' if name == 'config' else name} is '~no_such_user/x'; "
        "name a user who has a home folder here, or write the path out."
    )


def test_home_folder_that_does_not_exist_in_a_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("output_dir: ~no_such_user/x")
    with pytest.raises(ConfigError, match=rf"or write the path out \(set in {file}\)\.$"):
        _read(f"--config={file}")


def test_an_unknown_variable_is_named():
    with pytest.raises(ConfigError) as caught:
        _read(environ={"DDP_SGD_OPTIM__LRR": "3"})
    wanted = "unknown key optim.lrr (set in DDP_SGD_OPTIM__LRR); did you mean optim.lr?"
    assert str(caught.value) == wanted


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_answers_before_anything_is_read(flag, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    line = _read("--config=no.yaml", flag, environ={"DDP_SGD_X": "3"})
    assert line.text.startswith("usage: python -m x ")
    assert "About x." in line.text
    assert "  --world_size N\n      Ranks: 100 %.\n" in line.text
    assert "  --config FILE\n" in line.text
    assert "  --optim.momentum: a value in [0, 1), default 0.9\n" in line.text


def _read_alone(*argv, environ=None):
    return read_command_line(
        argv, environ or {}, program="python -m x", about="About x.", argument="PLACE"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["here", "--epochs=3", "--debug"],
        ["--epochs", "3", "here", "--debug"],
        ["--debug", "here", "--epochs=3"],
    ],
)
def test_one_argument_may_stand_alone_anywhere(argv):
    line = _read_alone(*argv)
    assert (line.argument, line.config.epochs) == ("here", 3)
    assert line.options == {"debug": True, "print_config": False}
    assert _read().argument == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: PLACE; see python -m x --help."),
        (["here", "there"], "argument 'there' stands alone; "),
        (["here", "-x"], "argument '-x' stands alone; "),
        (["-x"], "the following arguments are required: PLACE; see python -m x --help."),
    ],
)
def test_the_argument_that_stands_alone_is_one(argv, message):
    with pytest.raises(ConfigError) as caught:
        _read_alone(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_fits_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = _read("--help").text
    listing = text[text.index("options:") :]
    assert max(len(line) for line in listing.splitlines()) <= max(60, min(100, width))


def test_help_names_the_argument_that_stands_alone():
    assert _read_alone("--help").text.startswith("usage: python -m x PLACE ")


def test_a_configuration_that_depends_on_an_argument_is_not_printed_here():
    line = _read_alone("here", "--print_config")
    assert line.text is None
    assert line.options["print_config"] is True


def test_what_is_given_is_laid_over_another_configuration(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data: {batch_size: 7, eval: {init_args: {x: {}, y.z: [1]}}}")
    basis = RunConfig(
        epochs=9,
        loss={"class_path": "a.B", "init_args": {"c": 1}},
        data={"batch_size": 5, "eval": {"class_path": "d.E", "init_args": {"f": 1}}},
    ).model_dump(mode="json")
    line = _read_alone(
        "here", f"--config={file}", "--loss.class_path=g.H", environ={"DDP_SGD_SEED": "3"}
    )
    config = line.over(basis)
    assert (config.epochs, config.seed, config.data.batch_size) == (9, 3, 7)
    assert (config.loss.class_path, config.loss.init_args) == ("g.H", {})
    assert config.data.eval.init_args == {"f": 1, "x": {}, "y.z": [1]}
    assert _read_alone("here").over(basis) == RunConfig.model_validate(basis)


def test_what_does_not_fit_the_other_configuration_is_a_fault():
    line = _read_alone("here", "--parallel.static_graph=true")
    with pytest.raises(ConfigError, match="parallel.static_graph is true while"):
        line.over(RunConfig(data={"accumulate": 2}).model_dump(mode="json"))


def test_what_print_config_prints_resolves_to_the_same(tmp_path):
    argv = ["--epochs=90", "--schedule={name: step, milestones: [30, 60]}", "--optim.lr=1e-5"]
    argv += ["--wandb.group='1e-3'", "--wandb.name=on", "--data.eval=null"]
    line = _read(*argv, "--print_config")
    file = tmp_path / "config.yaml"
    file.write_text(line.text)
    assert load_config([f"--config={file}"], {}) == line.config


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1),
        st.floats(allow_nan=False) | st.sampled_from(["on", "1e-3", "010", "1:30", ""]) | st.text(),
        max_size=4,
    ),
    st.floats(0, exclude_min=True, allow_infinity=False),
)
def test_any_configuration_survives_its_yaml(tmp_path_factory, init_args, lr):
    config = RunConfig.model_validate(
        {"model": {"class_path": "a.B", "init_args": init_args}, "optim": {"lr": lr}}
    )
    file = tmp_path_factory.mktemp("config") / "a.yaml"
    file.write_bytes(dump_yaml(config).encode("utf-8"))
    assert load_config(["--config", str(file)], {}) == config


def test_components_survive_their_yaml(tmp_path):
    model = {
        "class_path": "torch.nn.Sequential",
        "args": [{"class_path": "torch.nn.Linear", "args": [64, 10]}, 1, [2, None], "null"],
    }
    loss = {"class_path": "torch.nn.functional.cross_entropy", "call": False}
    config = RunConfig.model_validate({"model": model, "loss": loss})
    file = tmp_path / "a.yaml"
    file.write_text(dump_yaml(config))
    assert load_config([f"--config={file}"], {}) == config
    assert config.model.args[2:] == ([2, None], "null")


def test_load_config_takes_the_environment_of_the_process(monkeypatch):
    monkeypatch.setenv("DDP_SGD_EPOCHS", "7")
    assert load_config().epochs == 7
    assert load_config(environ={}).epochs == 20


def test_load_config_prints_nothing():
    with pytest.raises(ConfigError, match="give them to a command instead"):
        load_config(["--help"], {})


def test_importing_leaves_the_heavy_packages_alone():
    code = "import sys, ddp_sgd.config; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "wandb"}.isdisjoint(done.stdout.split())
