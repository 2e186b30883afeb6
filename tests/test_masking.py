import pytest

from ddp_sgd.errors import ConfigError
from ddp_sgd.text import env_name, is_secret, mask, read_secret


@pytest.mark.parametrize(
    "key",
    ["token", "model.init_args.api_key", "hf_token", "PASSWORD", "aws_secret", "auth", "db_passwd"],
)
def test_keys_of_secrets(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "optim.lr",
        "num_tokens",
        "tokenizer",
        "key",
        "sort_key",
        "author",
        "secretary",
    ],
)
def test_other_keys(key):
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("data.init_args.password is 'hunter2'; choose", "data.init_args.password is ***; choose"),
        ("{'url': 'x', 'api_key': 'hunter2'}; set", "{'url': 'x', 'api_key': ***}; set"),
        ("--model.args.token=hunter2 stands alone", "--model.args.token=*** stands alone"),
        ("argument 'password=hunter2' stands", "argument 'password=***' stands"),
        ('token: "hunter2", n: 3', "token: ***, n: 3"),
        ("https://user:hunter2@host/x is", "https://***@host/x is"),
        ("s3://hunter2@bucket", "s3://***@bucket"),
        ("model.api_key is not an argument of x", "model.api_key is not an argument of x"),
        ("model.init_args.token is {env: HF}, but", "model.init_args.token is {env: HF}, but"),
        ("token={env: HF}", "token={env: HF}"),
        ("optim.lr is '0.1'; mail me@host", "optim.lr is '0.1'; mail me@host"),
    ],
)  # fmt: skip
def test_values_of_secrets_are_masked_in_a_message(text, masked):
    assert mask(text) == masked


def test_an_error_masks_its_message():
    assert str(ConfigError("wandb.token is 'hunter2';\nset it.")) == "wandb.token is ***; set it."


def test_what_the_environment_gave_is_masked_wherever_it_turns_up(monkeypatch):
    monkeypatch.setattr("ddp_sgd.text._known", {})
    monkeypatch.setenv("CANARY", "hunter2")
    assert mask("cannot log in with hunter2") == "cannot log in with hunter2"
    assert read_secret("CANARY") == "hunter2"
    assert mask("cannot log in with hunter2") == "cannot log in with {env: CANARY}"


def test_a_short_value_is_left_alone(monkeypatch):
    monkeypatch.setattr("ddp_sgd.text._known", {})
    monkeypatch.setenv("CANARY", "on")
    assert read_secret("CANARY") == "on"
    assert mask("one more") == "one more"
    assert read_secret("NO_SUCH_VARIABLE") is None


@pytest.mark.parametrize(
    ("value", "name"),
    [({"env": "HOME"}, "HOME"), ({"env": 3}, None), ({"env": "A", "b": 1}, None), ("env", None)],
)
def test_the_form_of_a_value_from_the_environment(value, name):
    assert env_name(value) == name
