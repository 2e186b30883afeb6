import platform

import numpy
import pytest
import torch

import ddp_sgd
from ddp_sgd.config import RunConfig, load_config
from ddp_sgd.rank_differences import read_versions, settings_that_agree, vital_versions


def test_versions_are_those_in_use():
    versions = read_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert versions["ddp_sgd"] == ddp_sgd.__version__
    assert versions["numpy"] == numpy.__version__
    assert ("cuda" in versions) == torch.cuda.is_available()


def test_versions_that_have_to_agree():
    versions = {"python": "3.12.4", "torch": "2.14.1+cpu", "ddp_sgd": "0.1.0", "numpy": "2.4"}
    assert vital_versions(versions) == {
        "torch": "2.14.1+cpu", "ddp_sgd": "0.1.0", "python": "3.12",
    }  # fmt: skip
    assert vital_versions({}) == {}


def differing(*options):
    """Keys that an option changes, among those that have to agree."""
    before, after = (
        settings_that_agree(load_config(argv, environ={}).model_dump(mode="json"))
        for argv in ([], list(options))
    )
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


@pytest.mark.parametrize(
    "option",
    [
        "--output_dir=/scratch/runs",
        "--wandb.mode=offline",
        "--wandb.tags=[a]",
        "--runtime.device=cpu",
        "--runtime.backend=gloo",
        "--data.workers=3",
    ],
)
def test_what_a_host_may_have_of_its_own(option):
    assert differing(option) == set()


@pytest.mark.parametrize(
    "key", ["optim.lr=0.3", "seed=1", "name=x", "runtime.hang_s=7", "data.tail=drop", "epochs=3"]
)
def test_everything_else_has_to_agree(key):
    assert differing(f"--{key}") == {key.partition("=")[0]}


def config_with(**init_args):
    data = {"train": {"class_path": "ddp_sgd.data.Arrays", "init_args": init_args}}
    return settings_that_agree(RunConfig(data=data).model_dump(mode="json"))


def test_a_host_may_keep_the_data_where_it_likes():
    assert config_with(path="/scratch/1/x.npz") == config_with(path="/scratch/2/x.npz")
    assert config_with(path="a/x.npz") != config_with(path="b/x.npz")
    assert config_with(path="/x.npz") != config_with(path="/x.npz", split="eval")


@pytest.mark.parametrize("wrap", [lambda path: [path], lambda path: [{"path": path, "mode": "r"}]])
def test_a_place_of_data_in_a_list_or_by_position(wrap):
    def with_args(path):
        train = {"class_path": "a.B", "args": wrap(path)}
        return settings_that_agree(RunConfig(data={"train": train}).model_dump(mode="json"))

    assert config_with(roots=wrap("/1/x")) == config_with(roots=wrap("/2/x"))
    assert config_with(roots=wrap("/1/x")) != config_with(roots=wrap("x"))
    assert with_args("/1/x") == with_args("/2/x")
    assert with_args("1/x") != with_args("2/x")


def test_the_order_of_keys_is_no_difference():
    one = config_with(path="x", split="eval")
    assert list(one) == sorted(one)
    assert list(one.items()) == list(config_with(split="eval", path="x").items())
