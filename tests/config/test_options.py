import pytest

from ddp_sgd.config.keys import CONFIG, DEBUG, Option
from ddp_sgd.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "64", 64),
        (int, "-1", -1),
        (float, "1", 1.0),
        (float, "1e-3", 0.001),
        (str, "010", "010"),
        (str, "", ""),
        (bool, "true", True),
        (bool, "false", False),
    ],
)
def test_values_are_of_the_kind(kind, text, value):
    read = Option("x", kind, "").read(text)
    assert read == value
    assert type(read) is kind


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        (
            Option("world_size", int, "", 1),
            "x",
            "--world_size is 'x'; choose a whole number, such as 1.",
        ),
        (Option("n", int, ""), "1.5", "--n is '1.5'; choose a whole number, such as 1."),
        (Option("n", int, ""), "8 # ranks", "--n is '8 # ranks'; choose a whole number"),
        (Option("n", int, ""), "true", "--n is 'true'; choose a whole number, such as 1."),
        (Option("x", float, "", 2.5), "on", "--x is 'on'; choose a number, such as 2.5."),
        (DEBUG, "3", "--debug is '3'; choose true or false, such as true."),
        (Option("n", int, ""), "y" * 99, "y...'; choose a whole number"),
    ],
)
def test_other_values_are_refused(option, text, message):
    with pytest.raises(ConfigError) as caught:
        option.read(text)
    assert message in str(caught.value)


def test_examples():
    assert CONFIG.example == "configs/digits.yaml"
    assert Option("n", int, "").example == "1"
    assert Option("n", int, "", 64).example == "64"
