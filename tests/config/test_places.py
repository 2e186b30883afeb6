import pytest

from ddp_sgd.config.changes import without_places

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
