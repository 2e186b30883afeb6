import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ddp_sgd.config.faults import explain_faults, nearest, show
from ddp_sgd.config.keys import all_keys
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import Component
from ddp_sgd.config.sources import Sources, lay_over


def _message(values, origins=None, options=()):
    merged = lay_over(Sources(RunConfig().model_dump()), Sources(values, {}))
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(merged.values)
    return str(explain_faults(caught.value, merged.values, origins or {}, options))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optim": {"momentum": 1.0}},
            "optim.momentum is 1.0; choose a value in [0, 1), such as 0.9.",
        ),
        ({"optim": {"lrr": 1}}, "unknown key optim.lrr; did you mean optim.lr?"),
        ({"lr": 1}, "unknown key lr; did you mean optim.lr?"),
        ({"optimm": {"lr": 1}}, "unknown key optimm; did you mean optim?"),
        ({"optim": {"epoch": 1}}, "unknown key optim.epoch; did you mean epochs?"),
        (
            {"log": {"zzz": 1}},
            "unknown key log.zzz; the keys of log are every_steps, train_accuracy, tensorboard.",
        ),
        (
            {"zzz": 1},
            "unknown key zzz; the keys at the top are name, output_dir, seed, epochs, steps, "
            "resume, on_resize, model, loss, data, optim, schedule, eval, log, checkpoint, wandb, "
            "parallel, runtime, compute.",
        ),
        ({"optim.lr": 1}, "unknown key optim.lr; nest it, as optim: {lr: ...}."),
        (
            {"epochs": "many"},
            "epochs is 'many'; choose a whole number of at least 1, such as 20.",
        ),
        ({"epochs": 1.5}, "epochs is 1.5; choose a whole number of at least 1, such as 20."),
        ({"seed": -1}, "seed is -1; choose a whole number in [0, 2^63), such as 0."),
        ({"optim": {"nesterov": "yes"}}, "optim.nesterov is 'yes'; choose true or false."),
        (
            {"optim": {"scaling": "lin"}},
            "optim.scaling is 'lin'; choose one of linear, sqrt, none; did you mean linear?",
        ),
        (
            {"optim": {"scaling": "zzz"}},
            "optim.scaling is 'zzz'; choose one of linear, sqrt, none.",
        ),
        (
            {"optim": {"lr": float("nan")}},
            "optim.lr is nan; choose a finite number above 0, such as 0.05.",
        ),
        (
            {"optim": {"reference_batch": 0}},
            "optim.reference_batch is 0; choose a whole number of at least 1 or null, such as 256.",
        ),
        (
            {"optim": {"weight_decay": None}},
            "optim.weight_decay is null; choose a number of at least 0, such as 0.0.",
        ),
        (
            {"schedule": {"warmup_epochs": "x"}},
            "schedule.warmup_epochs is 'x'; choose auto or a number of at least 0.",
        ),
        (
            {"schedule": {"warmup_start": 2}},
            "schedule.warmup_start is 2; choose auto or a value in (0, 1].",
        ),
        (
            {"schedule": {"milestones": [3, "a", -1]}},
            "schedule.milestones is [3, 'a', -1]; choose a list, each item a number above 0, "
            "such as [30, 60].",
        ),
        (
            {"wandb": {"tags": "x"}},
            "wandb.tags is 'x'; choose a list, each item text that is not empty, such as [a, b].",
        ),
        (
            {"data": {"train_transforms": {}}},
            "data.train_transforms is {}; choose a list of components, such as "
            "[{class_path: ddp_sgd.data.augment.RandomHorizontalFlip}].",
        ),
        (
            {"data": {"eval_transforms": [{"class_path": "my.Crop", "size": 3}]}},
            "data.eval_transforms is [{'class_path': 'my.Crop', 'size': 3}]; choose a list of "
            "components, such as [{class_path: ddp_sgd.data.augment.RandomHorizontalFlip}].",
        ),
        (
            {"name": 5},
            "name is 5; choose text that matches ^[A-Za-z0-9._-]+$, such as digits, or quote it "
            'to make it text: "5".',
        ),
        ({"output_dir": ""}, "output_dir is ''; choose text that is not empty, such as runs."),
        ({"model": "my.Net"}, "model is 'my.Net'; write model.class_path=my.Net."),
        (
            {"data": {"train": None}},
            "data.train is null; set its keys, such as data.train.class_path=ddp_sgd.data.Digits.",
        ),
        (
            {"model": {"hidden": [1]}},
            "unknown key model.hidden; did you mean model.init_args.hidden?",
        ),
        (
            {"model": {"class_pat": "x.y"}},
            "unknown key model.class_pat; did you mean model.class_path?",
        ),
        (
            {"loss": {"targets": 1}},
            "unknown key loss.targets; did you mean loss.init_args.targets?",
        ),
        ({"loss": {"scale": 1}}, "unknown key loss.scale; did you mean loss.init_args.scale?"),
        ({"loss": {"arg": [1]}}, "unknown key loss.arg; did you mean loss.args?"),
        ({"loss": {"cal": True}}, "unknown key loss.cal; did you mean loss.call?"),
        ({"model": {"args": 3}}, "model.args is 3; choose a list."),
        ({"model": {"args": {"a": 1}}}, "model.args is {'a': 1}; choose a list."),
        ({"loss": {"call": "no"}}, "loss.call is 'no'; choose true or false."),
        ({"loss": {"call": None}}, "loss.call is null; choose true or false."),
        ({"model": {"init_args": 3}}, "model.init_args is 3; choose a mapping."),
        ({"optim": 3}, "optim is 3; set its keys, such as optim.lr=0.05."),
        ({"data": None}, "data is null; set its keys, such as data.batch_size=32."),
        (
            {"optim": {"nesterov": True, "momentum": 0.0}},
            "optim.nesterov is true while optim.momentum is 0; set optim.momentum=0.9 or so.",
        ),
    ],
)
def test_a_fault_says_where_what_and_remedy(values, message):
    assert _message(values) == message


def test_a_component_without_class_path():
    values = RunConfig().model_dump() | {"model": {"init_args": {}}}
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(values)
    message = str(explain_faults(caught.value, values, {}))
    assert message.startswith("model.class_path is not set; choose text that matches")
    assert message.endswith(", such as ddp_sgd.models.MLP.")


def test_a_mapping_that_pydantic_cannot_read():
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({"a\udcff": 1})
    message = str(explain_faults(caught.value, {"a\udcff": 1}, {}))
    assert message == "the configuration cannot be read; see --help for keys and values."


def test_all_faults_stand_together_in_the_order_of_the_models():
    values = {"optim": {"lr": 0, "lrr": 1}, "epochs": 0, "schedule": {"name": "step"}}
    assert _message(values) == (
        "epochs is 0; choose a whole number of at least 1, such as 20. | "
        "optim.lr is 0; choose a number above 0, such as 0.05. | "
        "unknown key optim.lrr; did you mean optim.lr? | "
        "schedule.milestones is empty while schedule.name is step; name epochs, such as [30, 60]."
    )


def test_files_and_variables_are_named_and_flags_are_not():
    values = {"optim": {"momentum": 1.0, "lr": -1, "lrr": 1}, "epochs": 0, "tail": {"a": 1}}
    origins = {
        "optim.momentum": "a.yaml",
        "optim.lr": "DDP_SGD_OPTIM__LR",
        "optim.lrr": "a.yaml",
        "epochs": "--epochs",
        "tail.a": "b.yaml",
    }
    message = _message(values, origins)
    assert "choose a value in [0, 1), such as 0.9 (set in a.yaml)." in message
    assert "such as 0.05 (set in DDP_SGD_OPTIM__LR)." in message
    assert "unknown key optim.lrr (set in a.yaml); did you mean optim.lr?" in message
    assert "epochs is 0; choose a whole number of at least 1, such as 20." in message
    assert "unknown key tail (set in b.yaml); did you mean data.tail?" in message


def test_a_combination_names_the_origin_of_its_first_key():
    values = {"optim": {"nesterov": True, "momentum": 0}}
    message = _message(values, {"optim.nesterov": "a.yaml"})
    assert message.endswith("or so (set in a.yaml).")


def test_an_option_of_the_command_may_have_been_meant():
    message = _message({"world-size": 3}, options=("world_size",))
    assert message == "unknown key world-size; did you mean --world_size?"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ("a", "'a'"),
        ((1, 2), "[1, 2]"),
        ("x" * 100, "'" + "x" * 56 + "..."),
    ],
)
def test_values_are_shown_short(value, shown):
    assert show(value) == shown


@given(st.sampled_from(sorted(all_keys())), st.data())
def test_a_key_with_one_letter_lost_is_found(name, data):
    key = all_keys()[name]
    if len(key.leaf) < 5 or key.leaf in Component.model_fields:
        return
    gap = data.draw(st.integers(0, len(key.leaf) - 1))
    wrong = f"{key.parent}.{key.leaf[:gap]}{key.leaf[gap + 1 :]}".strip(".")
    is_another_word = any(other.leaf == wrong.rpartition(".")[2] for other in all_keys().values())
    assert is_another_word or nearest(wrong) == name


@given(
    st.dictionaries(
        st.sampled_from(sorted(key for key in all_keys() if "." not in key)),
        st.none() | st.integers() | st.text() | st.lists(st.integers()) | st.just({"x": 1}),
        min_size=1,
    )
)
def test_any_wrong_value_gets_one_line(values):
    try:
        RunConfig.model_validate(values)
    except ValidationError as error:
        message = str(explain_faults(error, values, {}))
        assert "\n" not in message
        assert message.endswith((".", "?"))
