import json

import pytest

from ddp_sgd.cli import exit_code_of, run_command
from ddp_sgd.config import RunConfig
from ddp_sgd.errors import ConfigError, DataError, ExitCode, OutputError, RemoteError


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def _command(work, argv=(), add_options=None):
    return run_command(
        work, list(argv), program="python -m ddp_sgd.try", about="Try it.", add_options=add_options
    )


def _raising(error):
    def work(line):
        raise error

    return work


def _never(line):
    raise RuntimeError("the command must not run")


def test_work_gets_the_configuration_and_its_own_options(capsys):
    seen = []
    argv = ["--optim.lr=0.25", "--count", "5"]

    def add_options(parser):
        parser.add_argument("--count", type=int, default=3)

    assert _command(seen.append, argv, add_options) == ExitCode.DONE
    assert seen[0].config == RunConfig.model_validate({"optim": {"lr": 0.25}})
    assert seen[0].options["count"] == 5
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_code_is_what_the_work_returns(returned, code):
    assert _command(lambda line: returned) == code


def test_arguments_of_the_process_where_none_are_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["try", "--epochs=7"])
    seen = []
    run_command(lambda line: seen.append(line.config.epochs), None, program="try", about="")
    assert seen == [7]


@pytest.mark.parametrize(
    ("flag", "words"), [("--help", "usage: python -m ddp_sgd.try"), ("--print_config", "epochs:")]
)
def test_text_is_printed_instead_of_working(flag, words, capsys):
    assert _command(_never, [flag]) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert words in out
    assert err == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("model is None;\nname one."), 64),
        (DataError("model is None; name one."), 65),
        (OutputError("model is None; name one."), 73),
    ],
)
def test_error_of_the_user_is_one_line(error, code, capsys):
    assert _command(_raising(error)) == code
    assert capsys.readouterr() == ("", "ddp_sgd: error: model is None; name one.\n")


def test_wrong_configuration_is_one_line_and_nothing_runs(capsys):
    assert _command(_never, ["--epochs=0"]) == ExitCode.CONFIG
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddp_sgd: error: epochs is 0; ")
    assert err.count("\n") == 1


def test_defect_is_one_line_with_its_own_code(capsys):
    assert _command(_raising(KeyError("left\nright"))) == ExitCode.INTERNAL
    assert capsys.readouterr().err == (
        "ddp_sgd: error: KeyError is unexpected: 'left\\nright'; "
        "run again with --debug to see where it comes from.\n"
    )


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (ValueError("odd"), "ddp_sgd: error: ValueError is unexpected: odd; run again"),
        (DataError("x is y; z."), "ddp_sgd: error: x is y; z."),
    ],
)
def test_debug_shows_where_an_error_comes_from(error, last, capsys):
    _command(_raising(error), ["--debug"])
    first, *_, line = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert line.startswith(last)


@pytest.mark.parametrize("error", [RemoteError("told by rank 0", 65)])
def test_fault_of_another_rank_is_silent(error, capsys):
    assert _command(_raising(error)) == ExitCode.DATA
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rank", "world_size"), [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")]
)
def test_wrong_configuration_is_reported_by_rank_0_alone(rank, world_size, monkeypatch, capsys):
    monkeypatch.setenv(world_size, "3")
    told = []
    for number in ("0", "1", "2", "3", "x"):
        monkeypatch.setenv(rank, number)
        assert _command(_never, ["--epochs=0"]) == ExitCode.CONFIG
        told.append(capsys.readouterr().err.count("ddp_sgd: error: "))
    assert told == [1, 0, 0, 1, 1]  # numbers that no rank can have are nobody else's to tell


def test_an_argument_may_stand_alone():
    seen = []
    names = {"program": "try", "about": "", "argument": "PLACE"}
    assert run_command(seen.append, ["here"], **names) == ExitCode.DONE
    assert seen[0].argument == "here"
    assert run_command(seen.append, [], **names) == ExitCode.CONFIG


def test_work_without_a_configuration_ends_with_a_code_as_well(capsys):
    assert exit_code_of(lambda: 1, debug=False) == 1
    assert exit_code_of(lambda: None, debug=False) == ExitCode.DONE

    def fail():
        raise OutputError("x is y; z.")

    assert exit_code_of(fail, debug=False) == ExitCode.OUTPUT
    assert capsys.readouterr().err == "ddp_sgd: error: x is y; z.\n"


def test_output_comes_before_the_error(capfd):
    def work(line):
        print("so far")  # noqa: T201
        raise DataError("x is y; z.")

    _command(work)
    assert capfd.readouterr().out == "so far\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_wish_to_leave_is_not_an_error(error):
    with pytest.raises(type(error)):
        _command(_raising(error))


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [
        (_raising(DataError("x is y; z.")), 65, "x is y; z."),
        (_raising(RemoteError("told by rank 0.", 69)), 69, "told by rank 0."),
        (_raising(ValueError("odd")), 70, "ValueError is unexpected: odd; run again with --debug"),
        (lambda line: 75, 75, "the run was stopped on request; start it again"),
        (lambda line: 77, 77, "the command ended with code 77; see what it printed."),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_launcher_finds_the_code_and_the_line(work, code, line, debug, tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_EXIT_CODE_FILE", str(tmp_path / "code"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    _command(work, ["--debug"] if debug else [])
    assert (tmp_path / "code").read_text() == f"{code}\n"
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["errorCode"] == code
    assert message["message"].startswith(line)
    shown = message["extraInfo"]["py_callstack"]
    has_traceback = debug and code in {65, 70}
    assert shown.startswith("Traceback") if has_traceback else shown == message["message"]
    assert shown.endswith(message["message"])
