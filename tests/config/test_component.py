"""One component or several by name, in ``data.eval``."""

import pytest

from ddp_sgd.config import load_config
from ddp_sgd.config.component import Component, are_named_sets
from ddp_sgd.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "is_named"),
    [
        ({"a": {"class_path": "x.Y"}}, True),
        ({"a": Component(class_path="x.Y"), "b": {}}, True),
        ({"class_path": "x.Y"}, False),
        ({"init_args": {}}, False),
        ({"clas_path": "x.Y"}, False),
        ({}, False),
        (Component(class_path="x.Y"), False),
        ("x.Y", False),
        (None, False),
    ],
)
def test_named_sets_are_told_from_a_component(value, is_named):
    assert are_named_sets(value) == is_named


def test_a_mapping_of_names_takes_the_place_of_a_component_and_the_other_way_round(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data: {eval: {a: {class_path: x.Y}, b: {class_path: x.Z}}}")
    named = load_config(["--config", str(file)], environ={})
    assert [(key, c.class_path) for key, c in named.data.eval_sets.items()] == [
        ("data.eval.a", "x.Y"),
        ("data.eval.b", "x.Z"),
    ]
    argv = ["--config", str(file), "--data.eval.b.init_args.n=3", "--data.eval.c.class_path=x.W"]
    more = load_config(argv, environ={}).data.eval_sets
    assert list(more) == ["data.eval.a", "data.eval.b", "data.eval.c"]
    assert more["data.eval.b"].init_args == {"n": 3}
    one = load_config(["--config", str(file), "--data.eval.class_path=x.V"], environ={})
    assert {key: c.class_path for key, c in one.data.eval_sets.items()} == {"data.eval": "x.V"}
    assert load_config(["--data.eval=null"], environ={}).data.eval_sets == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{a b: {class_path: x.Y}}", "data.eval has a set of the name 'a b'; use letters"),
        ("{a: {class_path: x.Y, n: 3}}", "did you mean data.eval.a.init_args.n?"),
        ("{a: {class_path: 5}}", "data.eval.a.class_path is 5; choose text"),
        ("{a: {class_path: x.Y}, b: {}}", "data.eval.b.class_path is not set"),
        ("{clas_path: x.Y}", "unknown key data.eval.clas_path; did you mean data.eval.class_path?"),
        ("{args: {class_path: x.Y}}", "data.eval.args is {'class_path': 'x.Y'}; choose a list"),
    ],
)
def test_what_is_neither_is_one_line(value, message):
    with pytest.raises(ConfigError) as caught:
        load_config([f"--data.eval={value}"], environ={})
    assert message in str(caught.value)
