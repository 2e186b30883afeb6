import pytest

from ddp_sgd.config import RunConfig, changes_that_matter, rank_batch
from ddp_sgd.config.sources import rounding_notes, shortened, without_places

DIGITS = {"class_path": "ddp_sgd.data.Digits"}


def before(**changes):
    return RunConfig(**changes).model_dump(mode="json")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other", "output_dir": "elsewhere"},
        {"epochs": 21},
        {"resume": "must", "on_resize": "rescale"},
        {"data": {"workers": 2, "eval": None}},
        {"data": {"batch_size": 16, "accumulate": 2}},
        {"data": {"eval_transforms": [{"class_path": "my.Crop"}]}},
        {"data": {"device": "host"}},
        {"compute": {"cuda_graphs": True}},
        {"eval": {"every_epochs": 3, "batch_size": 64}},
        {"eval": {"every_steps": 3}},
        {"steps": 10},  # in another unit: known with the steps of an epoch
        {"log": {"every_steps": 1}, "wandb": {"mode": "disabled"}},
        {"checkpoint": {"every_steps": 5, "keep": 1}},
        {"parallel": {"bucket_mb": 1.0}, "runtime": {"hang_s": None}},
        {"compute": {"channels_last": True}},
    ],
)
def test_what_leaves_the_weights_alone_is_no_change(changes):
    assert changes_that_matter(before(), RunConfig(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"epochs": 19}, "epochs was 20, is 19"),
        ({"optim": {"lr": 0.1}}, "optim.lr was 0.05, is 0.1"),
        ({"schedule": {"name": "linear"}}, "schedule.name was cosine, is linear"),
        ({"schedule": {"by": "epoch"}}, "schedule.by was step, is epoch"),
        ({"schedule": {"warmup": "shift"}}, "schedule.warmup was multiply, is shift"),
        ({"schedule": {"warmup_steps": 3}}, "schedule.warmup_steps was None, is 3"),
        ({"schedule": {"momentum_start": 0.5}}, "schedule.momentum_start was None, is 0.5"),
        (
            {"schedule": {"curve": {"class_path": "my.curve"}}},
            "schedule.curve.class_path was None, is my.curve",
        ),
        ({"data": {"tail": "drop"}}, "data.tail was exact, is drop"),
        ({"data": {"order": "sequential"}}, "data.order was shuffled, is sequential"),
        (
            {"data": {"order": {"class_path": "my.Order"}}},
            "data.order.class_path was None, is my.Order",
        ),
        ({"data": {"input": "ids"}}, "data.input was None, is ids"),
        ({"data": {"input": 0, "target": [1, 2]}}, "data.target was None, is [1, 2]"),
        ({"data": {"batch_size": 64}}, "data.batch_size x data.accumulate was 32, is 64"),
        ({"data": {"accumulate": 2}}, "data.batch_size x data.accumulate was 32, is 64"),
        (
            {"loss": {"class_path": "torch.nn.NLLLoss"}},
            "loss.class_path was torch.nn.CrossEntropyLoss, is torch.nn.NLLLoss",
        ),
        (
            {
                "model": {
                    "class_path": "ddp_sgd.models.MLP",
                    "init_args": {"inputs": 64, "hidden": [8]},
                }
            },
            "model.init_args.hidden was [64, 64], is [8]",
        ),
        (
            {
                "data": {
                    "train": {"class_path": "ddp_sgd.data.Digits", "init_args": {"split": "eval"}}
                }
            },
            "data.train.init_args.split was train, is eval",
        ),
        (
            {"data": {"collate": {"class_path": "my.Pad"}}},
            "data.collate.class_path was None, is my.Pad",
        ),
        ({"compute": {"precision": "bf16"}}, "compute.precision was fp32, is bf16"),
        ({"compute": {"deterministic": False}}, "compute.deterministic was True, is False"),
        ({"compute": {"compile": True}}, "compute.compile was False, is True"),
        (
            {"data": {"train_transforms": [{"class_path": "my.Crop", "args": [3]}]}},
            "data.train_transforms was [], is [{'class_path': 'my.Crop', 'args': [3], 'init_args': "
            "{}, 'call': True}]",
        ),
    ],
)
def test_what_moves_the_weights_is_named_with_both_values(changes, line):
    assert line in changes_that_matter(before(), RunConfig(**changes))


def test_a_key_that_an_older_release_did_not_have_was_at_its_default():
    old = before()
    del old["optim"]["clip_norm"], old["optim"]["clip_value"], old["data"]["train_transforms"]
    assert changes_that_matter(old, RunConfig()) == []
    assert changes_that_matter(old, RunConfig(optim={"clip_norm": 2.0})) == [
        "optim.clip_norm was None, is 2.0"
    ]


def test_a_run_of_a_release_without_steps_and_curves_had_none():
    old = before()
    del old["steps"], old["eval"]["every_steps"]
    for key in ("curve", "by", "warmup", "warmup_steps", "momentum_start"):
        del old["schedule"][key]
    assert changes_that_matter(old, RunConfig()) == []
    assert shortened(old, RunConfig(), 45) == []
    assert changes_that_matter(old, RunConfig(schedule={"by": "epoch"})) == [
        "schedule.by was step, is epoch"
    ]
    assert shortened(old, RunConfig(steps=899), 45) == ["epochs was 20, steps is 899"]


def test_more_steps_are_no_change_and_fewer_are_one():
    assert changes_that_matter(before(steps=10), RunConfig(steps=11)) == []
    assert changes_that_matter(before(steps=10), RunConfig(steps=9)) == ["steps was 10, is 9"]


@pytest.mark.parametrize(
    ("was", "is_now", "lines"),
    [
        ({"epochs": 2}, {"steps": 90}, []),
        ({"epochs": 2}, {"steps": 89}, ["epochs was 2, steps is 89"]),
        ({"steps": 90}, {"epochs": 2}, []),
        ({"steps": 91}, {"epochs": 2}, ["steps was 91, epochs is 2"]),
        ({"steps": 9}, {"steps": 8}, []),  # one unit: a change like any other
        ({"epochs": 9}, {"epochs": 8}, []),
    ],
)
def test_a_length_in_another_unit_is_compared_in_steps(was, is_now, lines):
    assert changes_that_matter(before(**was), RunConfig(**is_now)) == [] or not lines
    assert shortened(before(**was), RunConfig(**is_now), 45) == lines


def test_a_run_of_a_release_without_compute_was_computed_as_torch_does():
    old = before()
    del old["compute"]
    assert changes_that_matter(old, RunConfig()) == []
    assert rounding_notes(old, RunConfig()) == []
    assert changes_that_matter(old, RunConfig(compute={"precision": "tf32"})) == [
        "compute.precision was fp32, is tf32"
    ]
    assert rounding_notes(old, RunConfig(compute={"channels_last": True})) == [
        "compute.channels_last was False, is True: the last bits of later steps may differ"
    ]


def test_a_key_that_only_begins_like_another_is_none_of_it():
    old = before()
    old["data"]["tail_fin"] = old["optimism"] = 1
    assert changes_that_matter(old, RunConfig()) == []


MODELS = [
    {},
    {"model": {"class_path": "a.B"}},
    {"model": {"class_path": "a.B", "init_args": {"inputs": 3, "x": {}}}},
    {"loss": {"class_path": "a.b", "init_args": {"c": {"class_path": "d.E"}}}},
    {"data": {"train": {"class_path": "a.B", "init_args": {"y": [1]}}}},
]


@pytest.mark.parametrize("changes", MODELS)
def test_a_component_of_an_older_release_had_no_positional_arguments_and_was_called(changes):
    old = before(**changes)
    for component in (old["model"], old["loss"], old["data"]["train"], old["data"]["eval"]):
        del component["args"], component["call"]
    assert changes_that_matter(old, RunConfig(**changes)) == []
    loss = RunConfig(**changes).loss.model_dump() | {"args": [1], "call": False}
    assert changes_that_matter(old, RunConfig(**changes | {"loss": loss})) == [
        "loss.args was [], is [1]",
        "loss.call was True, is False",
    ]


def test_arguments_are_not_taken_for_those_of_the_default_class():
    few, more = ({"class_path": "a.B", "init_args": args} for args in ({}, {"inputs": 64}))
    assert changes_that_matter(before(model=few), RunConfig(model=more)) == [
        "model.init_args.inputs was None, is 64"
    ]
    assert changes_that_matter(before(model=more), RunConfig(model=few)) == [
        "model.init_args.inputs was 64, is None"
    ]


def reading(path, **others):
    train = {"class_path": "ddp_sgd.data.Arrays", "init_args": {"path": path, **others}}
    return {"data": {"train": train}}


def changed(was, is_now):
    return changes_that_matter(before(**was), RunConfig(**is_now))


def test_data_that_moved_are_no_change():
    """A job has a scratch folder of its own; the samples are compared when they are read."""
    assert changed(reading("/scratch/1/x.npz"), reading("/scratch/2/x.npz")) == []
    assert changed(reading("~/x.npz"), reading("/home/me/x.npz")) == []
    assert changed(reading("/1/x", mmap=True), reading("/2/x", mmap=False)) == [
        "data.train.init_args.mmap was True, is False"
    ]


@pytest.mark.parametrize(("was", "is_now"), [("a.npz", "b.npz"), ("a.npz", "/1/a.npz")])
def test_a_relative_path_is_a_name(was, is_now):
    line = f"data.train.init_args.path was {was}, is {is_now}"
    assert changed(reading(was), reading(is_now)) == [line]


def test_a_path_of_the_model_is_no_place_of_data():
    model = [{"model": {"class_path": "a.B", "init_args": {"weights": p}}} for p in ("/1", "/2")]
    assert changed(*model) == ["model.init_args.weights was /1, is /2"]


def test_samples_of_one_rank_in_a_step():
    assert rank_batch(before(data={"batch_size": 8, "accumulate": 3})) == 24


ROOT = "data.train.init_args.root"
PLACE = "a path of its own"


@pytest.mark.parametrize(
    "path", ["/scratch/job1", "~/data", "~", "~someone/data", "file:///scratch/job1", "/"]
)
def test_paths_are_equal_wherever_they_lead(path):
    assert without_places(ROOT, path) == PLACE


@pytest.mark.parametrize(
    "value", ["data/x.npz", "./x", "../x", "train", "", "s3://bucket/x", 7, 0.5, True, None]
)
def test_anything_else_stays(value):
    assert without_places(ROOT, value) == value


def test_paths_are_found_at_any_depth():
    def nested(path):
        return [path, {"split": "train", "roots": [path, 3]}]

    found = without_places(ROOT, nested("/1"))
    assert found == without_places(ROOT, nested("/2")) == nested(PLACE)
    assert without_places(ROOT, nested("1")) == nested("1")
    value = nested("/1")
    without_places(ROOT, value)
    assert value == nested("/1")


@pytest.mark.parametrize(
    ("key", "is_argument"),
    [
        ("data.train.init_args.root", True),
        ("data.eval.init_args.root", True),
        ("data.train.init_args.inner.init_args.root", True),
        ("data.train.args", True),
        ("data.train.init_args", True),
        ("data.train.class_path", False),
        ("data.train.init_args_root", False),
        ("data.collate.init_args.root", False),
        ("model.init_args.root", False),
        ("output_dir", False),
    ],
)
def test_only_arguments_of_data_sets_are_places(key, is_argument):
    assert without_places(key, "/x") == (PLACE if is_argument else "/x")


def test_a_run_of_a_release_without_orders_was_shuffled_and_gave_pairs():
    old = before()
    for key in ("order", "input", "target"):
        del old["data"][key]
    del old["eval"]["batch_size"]
    assert changes_that_matter(old, RunConfig()) == []
    assert rounding_notes(old, RunConfig()) == []
    assert changes_that_matter(old, RunConfig(data={"order": "sequential"})) == [
        "data.order was shuffled, is sequential"
    ]
    assert rounding_notes(old, RunConfig(eval={"batch_size": 64})) == [
        "eval.batch_size was None, is 64: the last bits of later scores may differ"
    ]


def test_an_order_that_is_a_component_stays_one():
    order = {"data": {"order": {"class_path": "my.Order", "init_args": {"lengths": "a.npy"}}}}
    assert changes_that_matter(before(**order), RunConfig(**order)) == []
    assert "data.order was None, is sequential" in changes_that_matter(
        before(**order), RunConfig(data={"order": "sequential"})
    )
