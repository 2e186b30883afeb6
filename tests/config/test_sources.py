import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sources import Sources, gather, lay_over
from ddp_sgd.errors import ConfigError

names = st.sampled_from(["a", "b", "class_path", "args", "init_args", "call"])
layers = st.dictionaries(
    names,
    st.recursive(
        st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2),
        lambda inner: st.dictionaries(names, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


def _gather(*overrides, files=(), environ=None):
    return gather(files, environ or {}, [override.split("=", 1) for override in overrides])


def _file(tmp_path, text, name="a.yaml"):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


def test_nothing_given_is_the_defaults():
    sources = _gather(environ={"PATH": "/bin", "DDP_SG": "x"})
    assert sources.values == RunConfig().model_dump(mode="python")
    assert sources.origins == {}


def test_later_sources_win(tmp_path):
    first = _file(tmp_path, "optim: {lr: 1, momentum: 0.1, weight_decay: 0.1}\nepochs: 3")
    second = _file(tmp_path, "optim: {momentum: 0.2, weight_decay: 0.2}", "b.yaml")
    sources = _gather(
        "optim.scaling=sqrt",
        files=[first, second],
        environ={"DDP_SGD_OPTIM__WEIGHT_DECAY": "0.3", "DDP_SGD_OPTIM__SCALING": "none"},
    )
    optim = sources.values["optim"]
    assert [optim[key] for key in ("lr", "momentum", "weight_decay")] == [1, 0.2, 0.3]
    assert optim["scaling"] == "sqrt"
    assert sources.origins == {
        "epochs": first,
        "optim.lr": first,
        "optim.momentum": second,
        "optim.weight_decay": "DDP_SGD_OPTIM__WEIGHT_DECAY",
        "optim.scaling": "--optim.scaling",
    }


def test_a_length_takes_the_place_of_one_below_in_the_other_unit(tmp_path):
    """A configuration in epochs may run as a short trial, with ``--steps``."""
    epochs, steps = _file(tmp_path, "epochs: 90"), _file(tmp_path, "steps: 1000", "b.yaml")

    def lengths(*overrides, **more):
        sources = _gather(*overrides, **more)
        return sources.values["epochs"], sources.values["steps"], sorted(sources.origins)

    assert lengths("steps=10", files=[epochs]) == (20, 10, ["steps"])
    assert lengths("epochs=3", files=[steps]) == (3, None, ["epochs"])
    assert lengths("epochs=3", files=[epochs, steps]) == (3, None, ["epochs"])
    assert lengths(files=[epochs], environ={"DDP_SGD_STEPS": "7"}) == (20, 7, ["steps"])
    assert lengths("steps=null", files=[epochs]) == (90, None, ["epochs", "steps"])
    assert lengths("steps=10", "epochs=3") == (3, 10, ["epochs", "steps"])  # which is refused
    both = _file(tmp_path, "epochs: 20\nsteps: 5", "c.yaml")
    assert lengths(files=[epochs, both]) == (20, 5, ["epochs", "steps"])


def test_values_are_yaml():
    values = _gather(
        "schedule.milestones=[3, 5]", "wandb.name=on", "optim.clip_norm=1e-3", "data.eval=null"
    ).values
    assert values["schedule"]["milestones"] == [3, 5]
    assert values["wandb"]["name"] == "on"
    assert values["optim"]["clip_norm"] == 0.001
    assert values["data"]["eval"] is None


@pytest.mark.parametrize(
    "words",
    ["/x/run #3", "12345", "1e-3", "lr: 0.1", "on", "@x", "%d", "[a]", "it's", "'a' 'b'", "null",
     " x ", "!x", "&a", "*a", "- a", "#", "a\n b", '"', "'a' #3"],
)  # fmt: skip
def test_text_is_taken_as_it_is(words):
    assert _gather(f"output_dir={words}").values["output_dir"] == words
    environ = {"DDP_SGD_WANDB__PROJECT": f"{words}."}
    assert _gather(environ=environ).values["wandb"]["project"] == f"{words}."


@pytest.mark.parametrize(
    ("words", "text"),
    [("'7'", "7"), ('"7"', "7"), ('"a\\tb"', "a\tb"), ("'it''s'", "it's"), ("''", "")],
)
def test_text_in_quotes_is_what_they_hold(words, text):
    assert _gather(f"output_dir={words}").values["output_dir"] == text


@pytest.mark.parametrize("words", ["", "null", "~", "NULL"])
def test_text_that_may_be_null(words):
    values = _gather("wandb.group=a", f"wandb.name={words}", f"output_dir={words}").values
    assert (values["wandb"]["group"], values["wandb"]["name"]) == ("a", None)
    assert values["output_dir"] == words
    assert _gather("wandb.name='null'").values["wandb"]["name"] == "null"


@pytest.mark.parametrize(
    "key", ["model.init_args.x", "data.train.init_args.path", "optim.lr", "unknown"]
)
@pytest.mark.parametrize("words", ["/x/run #3", "#3", "0.1 # base", "[1, 2] #3", "a: b #3"])
def test_nothing_is_cut(key, words):
    *sections, leaf = key.split(".")
    values = _gather(f"{key}={words}").values
    for section in sections:
        values = values[section]
    assert values[leaf] == words


def test_lists_are_replaced_whole(tmp_path):
    file = _file(tmp_path, "model: {init_args: {hidden: [1, 2, 3]}}")
    values = _gather("model.init_args.hidden=[4]", files=[file]).values
    assert values["model"]["init_args"] == {"inputs": 64, "hidden": [4], "classes": 10}


def test_another_class_drops_the_arguments_of_the_first(tmp_path):
    file = _file(tmp_path, "model: {class_path: my.Net, init_args: {width: 3}}")
    sources = _gather(files=[file])
    assert sources.values["model"] == {"class_path": "my.Net", "init_args": {"width": 3}}
    sources = _gather("model.class_path=my.Other", files=[file])
    assert sources.values["model"] == {"class_path": "my.Other"}
    assert sources.origins == {"model.class_path": "--model.class_path"}


def test_another_class_drops_positional_arguments_and_call_as_well(tmp_path):
    text = "loss: {class_path: my.loss, args: [1], init_args: {a: 1}, call: false}"
    file = _file(tmp_path, text)
    sources = _gather("loss.init_args.a=2", files=[file])
    wanted = {"class_path": "my.loss", "args": [1], "init_args": {"a": 2}, "call": False}
    assert sources.values["loss"] == wanted
    sources = _gather("loss.class_path=my.Other", files=[file])
    assert sources.values["loss"] == {"class_path": "my.Other"}
    assert sources.origins == {"loss.class_path": "--loss.class_path"}


def test_positional_arguments_and_call_on_the_command_line():
    sources = _gather(
        "model.class_path=my.Net", "model.args=[3, {class_path: a.B}]", "loss.call=false"
    )
    assert sources.values["model"] == {"class_path": "my.Net", "args": [3, {"class_path": "a.B"}]}
    assert sources.values["loss"]["call"] is False


def test_the_same_class_keeps_the_arguments(tmp_path):
    file = _file(tmp_path, "model: {class_path: ddp_sgd.models.MLP, init_args: {hidden: [8]}}")
    assert _gather(files=[file]).values["model"]["init_args"]["inputs"] == 64


def test_nested_components_follow_the_rule(tmp_path):
    file = _file(
        tmp_path,
        "data: {train: {init_args: {transform: {class_path: a.B, init_args: {x: 1, y: 2}}}}}",
    )
    key = "data.train.init_args.transform"
    same = _gather(f"{key}.class_path=a.B", f"{key}.init_args.x=3", files=[file])
    other = _gather(f"{key}.class_path=a.C", f"{key}.init_args.x=3", files=[file])
    assert same.values["data"]["train"]["init_args"] == {
        "split": "train",
        "transform": {"class_path": "a.B", "init_args": {"x": 3, "y": 2}},
    }
    assert other.values["data"]["train"]["init_args"]["transform"] == {
        "class_path": "a.C",
        "init_args": {"x": 3},
    }


def test_the_order_of_flags_does_not_matter_for_a_class_and_its_arguments():
    flags = ["model.init_args.width=3", "model.class_path=my.Net"]
    wanted = {"class_path": "my.Net", "init_args": {"width": 3}}
    assert _gather(*flags).values["model"] == wanted
    assert _gather(*reversed(flags)).values["model"] == wanted


def test_null_removes_a_section_and_a_key_below_it_makes_it_again(tmp_path):
    file = _file(tmp_path, "data: {eval: null}")
    assert _gather(files=[file]).values["data"]["eval"] is None
    sources = _gather("data.eval.class_path=my.Data", files=[file])
    assert sources.values["data"]["eval"] == {"class_path": "my.Data"}
    assert sources.origins == {"data.eval.class_path": "--data.eval.class_path"}
    sources = _gather("data.eval=null", "data.eval.class_path=my.Data")
    assert sources.values["data"]["eval"] == {"class_path": "my.Data"}


def test_a_mapping_as_a_value_is_merged():
    sources = _gather("optim={lr: 3, momentum: 0}", "optim.lr=4")
    assert (sources.values["optim"]["lr"], sources.values["optim"]["momentum"]) == (4, 0)
    assert sources.origins == {"optim.momentum": "--optim", "optim.lr": "--optim.lr"}


@pytest.mark.parametrize(
    ("overrides", "environ", "message"),
    [
        (
            ["optim=3", "optim.lr=1"],
            {},
            "--optim is 3 while --optim.lr sets a key below it; leave one of the two out.",
        ),
        (["optim..lr=1"], {}, "--optim..lr names no key; write --optim.lr=0.05"),
        (["=1"], {}, "-- names no key; "),
        (["\udcff=1"], {}, "--\\udcff names no key; "),
        ([], {"DDP_SGD_": "1"}, "DDP_SGD_ names no key; write --optim.lr=0.05 or DDP_SGD_OPTIM"),
        ([], {"DDP_SGD_OPTIM__LR": "["}, "DDP_SGD_OPTIM__LR line 1 is not YAML"),
        (["wandb.tags=@x"], {}, "--wandb.tags line 1 is not YAML"),
        (["wandb.name=\x1b[1m"], {}, "--wandb.name line 1 holds the character '\\x1b'; remove it"),
        ([".".join("a" * 80) + "=1"], {}, "nests deeper than 64 levels; flatten it."),
    ],
)
def test_settings_that_cannot_be_laid_down(overrides, environ, message):
    with pytest.raises(ConfigError) as caught:
        _gather(*overrides, environ=environ)
    assert message in str(caught.value)


def _leaves(values, origin):
    sources = lay_over(Sources(), Sources(values, {}))
    return Sources(sources.values, dict.fromkeys(_paths(values, ""), origin))


def _paths(value, path):
    if not isinstance(value, dict) or not value:
        return [path] if path else []
    return [leaf for key in value for leaf in _paths(value[key], f"{path}.{key}".strip("."))]


@given(layers, layers)
def test_merging_is_idempotent(below, above):
    once = lay_over(_leaves(below, "x"), _leaves(above, "y"))
    assert lay_over(once, _leaves(above, "y")) == once
    assert lay_over(_leaves(above, "y"), _leaves(above, "y")).values == above


@given(layers, layers)
def test_every_origin_is_the_origin_of_a_leaf(below, above):
    merged = lay_over(_leaves(below, "x"), _leaves(above, "y"))
    assert set(_paths(merged.values, "")) >= set(merged.origins) - set(_empty(merged.values, ""))
    assert {path for path, origin in merged.origins.items() if origin == "y"} == set(
        _paths(above, "")
    )


def _empty(value, path):
    if not isinstance(value, dict):
        return []
    below = [leaf for key in value for leaf in _empty(value[key], f"{path}.{key}".strip("."))]
    return [path, *below]
