from ddp_sgd.config.keys import all_keys, keys_below, yaml_value
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sources import gather
from ddp_sgd.config.yaml_io import read_yaml


def test_keys_are_those_of_the_models():
    assert [key.name for key in keys_below("")] == list(RunConfig.model_fields)
    assert [key.leaf for key in keys_below("optim")] == list(type(RunConfig().optim).model_fields)


def test_every_key_has_a_meaning():
    assert [name for name, key in all_keys().items() if not key.meaning] == []


def test_every_setting_that_is_offered_is_accepted():
    for key in all_keys().values():
        if key.default is None and not key.example:
            continue
        name, _, value = key.setting.partition("=")
        overrides = [(name, value)]
        if key.leaf in ("milestones", "gamma", "power", "peak_at"):
            shape = {"power": "polynomial", "peak_at": "one_cycle"}.get(key.leaf, "step")
            overrides += [("schedule.name", shape), ("epochs", "90")]
            overrides += [("schedule.milestones", "[30]")] if key.leaf == "gamma" else []
        if key.name == "data.target":
            overrides += [("data.input", "image")]
        RunConfig.model_validate(gather((), {}, overrides).values)


def test_choices_examples_and_kinds():
    keys = all_keys()
    assert keys["optim.momentum"].choices == "a value in [0, 1)"
    assert keys["optim.reference_batch"].choices == "a whole number of at least 1 or null"
    assert keys["schedule.warmup_epochs"].choices == "auto or a number of at least 0"
    assert keys["schedule.milestones"].example == "[30, 60]"
    assert keys["data.train_transforms"].choices == "a list of components"
    assert keys["optim.scaling"].names == ("linear", "sqrt", "none")
    assert [keys[name].kind for name in ("optim", "model", "seed")] == [
        "section",
        "component",
        "value",
    ]
    assert keys["data.eval.class_path"].default == "ddp_sgd.data.Digits"


def test_keys_that_take_any_text():
    assert [name for name, key in all_keys().items() if key.is_text] == [
        "name", "output_dir", "resume", "model.class_path", "loss.class_path",
        "data.train.class_path", "data.eval.class_path", "data.test.class_path",
        "data.collate.class_path", "data.order.class_path", "schedule.curve.class_path",
        "wandb.project", "wandb.entity", "wandb.group", "wandb.name",
    ]  # fmt: skip
    assert all_keys()["wandb.name"].may_be_null
    assert not all_keys()["resume"].may_be_null


def test_values_on_one_line():
    value = {"a": [1, "on"], "b": None}
    assert yaml_value([1, 2]) == "[1, 2]"
    assert yaml_value(None) == "null"
    assert yaml_value("a" * 300) == "a" * 300
    assert read_yaml(yaml_value([value["a"], 1e-5]), "x") == [[1, "on"], 1e-5]
