"""A canary in the environment turns up in nothing that a run writes or says."""

import json
import os
import sys

import commands
import pytest
from launching import environment
from limits import WAIT_S

CANARY = "c4nary-0f-gold"
NET = "user_code.NeedsAToken"


def run(folder, module, *options, canary=CANARY):
    variables = {"CANARY": canary} if canary else {}
    return commands.run(
        [sys.executable, "-m", module, *options],
        cwd=folder,
        env=environment(DDP_SGD_WANDB__MODE="offline", **variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )


def model(token):
    return f"--model={{class_path: {NET}, init_args: {{token: {token}}}}}"


def found_in(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [path for path in files if CANARY.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = run(folder, "ddp_sgd.train", "--epochs=1", model("{env: CANARY}"))
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_model_had_the_token_and_nothing_else_has_it(finished):
    folder, done = finished
    assert (folder / "built").exists()
    assert CANARY not in done.stdout + done.stderr
    assert found_in(folder) == []
    assert "token:\n      env: CANARY" in (folder / "runs/digits/config.yaml").read_text()


def test_a_resume_reads_it_again(finished):
    folder, _ = finished
    more = run(folder, "ddp_sgd.train", "--epochs=2", model("{env: CANARY}"))
    assert more.returncode == 0, more.stderr
    none = run(folder, "ddp_sgd.train", "--epochs=3", model("{env: CANARY}"), canary=None)
    assert none.returncode == 64
    assert none.stderr == (
        "ddp_sgd: error: model.init_args.token is {env: CANARY}, but the variable CANARY is not "
        "set; set it, or write the value out.\n"
    )
    assert found_in(folder) == []


def test_an_error_of_the_component_does_not_show_it(tmp_path):
    done = run(tmp_path, "ddp_sgd.train", model("{env: CANARY}"), canary="another-one")
    assert done.returncode == 64
    assert "cannot fetch it with {env: CANARY}; check model.init_args" in done.stderr
    assert "another-one" not in done.stdout + done.stderr
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert "another-one" not in result["error"]


def test_an_error_in_the_middle_of_a_run_does_not_show_it(tmp_path):
    leaky = model("{env: CANARY}").replace(NET, "user_code.LeaksItsToken")
    done = run(tmp_path, "ddp_sgd.train", leaky)
    assert done.returncode == 70
    assert "RuntimeError is unexpected: the service does not know {env: CANARY};" in done.stderr
    assert CANARY not in done.stdout + done.stderr
    assert found_in(tmp_path) == []
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert result["error"] == "the service does not know {env: CANARY}"


def test_a_value_that_was_written_out_is_masked_in_an_error(tmp_path):
    done = run(
        tmp_path, "ddp_sgd.train", model("[another-one]"), "--model.init_args.api_key=gold-2"
    )
    assert done.returncode == 64
    assert "gold-2" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("option", "key", "variable"),
    [
        ("--wandb.entity={env: CANARY}", "wandb.entity", "DDP_SGD_WANDB__ENTITY"),
        ("--name={env: CANARY}", "name", "DDP_SGD_NAME"),
        ("--optim={lr: {env: CANARY}}", "optim.lr", "DDP_SGD_OPTIM__LR"),
    ],
)
def test_it_is_refused_where_it_would_be_taken_as_it_is(option, key, variable, tmp_path):
    done = run(tmp_path, "ddp_sgd.explain", option)
    assert done.returncode == 64
    assert done.stderr == (
        f"ddp_sgd: error: {key} is {{env: CANARY}}, which only an argument of a component can be; "
        f'set {variable}="$CANARY" in the environment instead.\n'
    )


def test_a_change_of_a_secret_is_told_without_it(finished):
    folder, _ = finished
    done = run(folder, "ddp_sgd.train", "--epochs=4", model(CANARY))
    assert done.returncode == 77
    assert "model.init_args.token.env was ***" in done.stderr or "token was ***" in done.stderr
    assert CANARY not in done.stdout + done.stderr


def test_a_score_builds_what_the_caller_trusts(finished):
    folder, _ = finished
    (folder / "built").unlink()
    done = run(folder, "ddp_sgd.evaluate", "runs/digits")
    assert done.returncode == 77
    assert f" names {NET}, whose code would run; give --trust if you trust" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "built").exists()
    for option in ("--trust", f"--model.class_path={NET}"):
        (folder / "built").unlink(missing_ok=True)
        done = run(folder, "ddp_sgd.evaluate", "runs/digits", option)
        assert done.returncode == 0, done.stderr
        assert (folder / "built").exists()


def test_the_configuration_of_a_checkpoint_is_shown_without_trust(finished):
    folder, _ = finished
    done = run(folder, "ddp_sgd.evaluate", "runs/digits", "--print_config")
    assert done.returncode == 0, done.stderr
    assert NET in done.stdout
    assert os.environ.get("CANARY") is None
