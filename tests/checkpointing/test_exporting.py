import builtins
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from ddp_sgd.checkpointing.convert import export_weights, refuse_overwriting, untie
from ddp_sgd.checkpointing.store import Header, SkippedSteps
from ddp_sgd.config import RunConfig, load_config
from ddp_sgd.errors import ConfigError, DataError, OutputError

HEADER = Header(
    step=45,
    epoch=1,
    position=50,
    samples=150,
    scored_at=-1,
    scores={},
    skipped=SkippedSteps(),
    world_size=2,
    run_id="abc",
    loss="",
    plan={"samples_per_epoch": 100},
    config=RunConfig(epochs=7).model_dump(mode="json"),
    versions={},
)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def output(tmp_path):
    return tmp_path / "weights.safetensors"


def test_every_tensor_comes_back_bit_for_bit(output):
    weights = {
        "a": torch.randn(3, 4),
        "b": torch.arange(6).reshape(2, 3).T,
        "c": torch.tensor(5),
        "d": torch.zeros(0),
        "e": torch.tensor([True, False]),
        "f": torch.randn(3).bfloat16(),
    }
    assert export_weights(weights, HEADER, output, digest="1f") == {}
    back = load_file(output)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)


def test_metadata_and_the_configuration_beside(output):
    export_weights({"a": torch.zeros(2)}, HEADER, output, digest="1f")
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    config = metadata.pop("config")
    assert metadata == {
        "format": "pt",
        "step": "45",
        "epoch": "1.5",
        "samples": "150",
        "run_id": "abc",
        "weights_digest": "1f",
        "tied": "{}",
    }
    beside = output.with_suffix(".yaml")
    assert beside.read_text() == config
    assert load_config([f"--config={beside}"], {}) == RunConfig(epochs=7)


def test_tied_weights_are_written_once_and_load_as_a_model(output):
    torch.manual_seed(0)
    trained = Tied()
    tied = export_weights(trained.state_dict(), HEADER, output, digest="")
    assert tied == {"head.weight": "embed.weight"}
    assert "head.weight" not in load_file(output)
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["tied"]) == tied
    fresh = Tied()
    assert load_model(fresh, output) == (set(), [])
    assert torch.equal(fresh.head.weight, trained.embed.weight)


def test_views_of_one_memory_are_written_apart():
    whole = torch.arange(4.0)
    tensors, tied = untie({"a": whole, "b": whole.view(2, 2), "c": whole[:2]})
    assert tied == {}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 3
    assert tensors["c"].untyped_storage().nbytes() == 8


def test_what_is_no_tensor_is_named(output):
    with pytest.raises(DataError, match="a.note is a str, and safetensors holds tensors only"):
        export_weights({"a.note": "x"}, HEADER, output, digest="")


def test_a_type_that_the_format_lacks_is_an_error_of_ours(output):
    with pytest.raises((DataError, OutputError), match="safetensors|cannot be written"):
        export_weights(
            {"a": torch.zeros(2, 2).to_sparse().coalesce().values().to(torch.complex128)},
            HEADER,
            output,
            digest="",
        )
    assert list(output.parent.iterdir()) == []


def test_nothing_is_overwritten_unless_forced(output, tmp_path):
    refuse_overwriting(output, force=False)
    output.with_suffix(".yaml").touch()
    with pytest.raises(OutputError, match=r"weights.yaml is there already; .* add --force"):
        refuse_overwriting(output, force=False)
    refuse_overwriting(output, force=True)
    with pytest.raises(ConfigError, match=r"x.pt is no name for weights; write x.safetensors."):
        refuse_overwriting(tmp_path / "x.pt", force=True)


def test_a_folder_that_is_missing_is_named(tmp_path):
    output = tmp_path / "nowhere" / "x.safetensors"
    with pytest.raises(OutputError, match="x.safetensors cannot be written: .*; choose another"):
        export_weights({"a": torch.zeros(1)}, HEADER, output, digest="")


def test_a_missing_package_is_named(output, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'ddp_sgd\[export\]'"):
        export_weights({"a": torch.zeros(1)}, HEADER, output, digest="")


def test_the_epoch_is_exact(output):
    odd = replace(HEADER, position=33, plan={"samples_per_epoch": 99})
    export_weights({"a": torch.zeros(1)}, odd, output, digest="")
    with safe_open(output, "pt") as file:
        assert float(file.metadata()["epoch"]) == 1 + 33 / 99
