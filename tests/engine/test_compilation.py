"""A compiled run: by torch's real compiler, on the CPU."""

import os

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import ComputeConfig, RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.compilation import CACHE_NAME, compile_model
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError

COMPUTE = ComputeConfig(compile=True, deterministic=False)
X = torch.randn(18, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(18) % 3


class Sizes(nn.Linear):
    """Lists the sizes of the batches that come to its own code."""

    seen: list[int]

    def forward(self, inputs):
        if not torch.compiler.is_compiling():
            self.seen.append(len(inputs))
        return super().forward(inputs)


def train(folder, model, epochs=2, **compute):
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "epochs": epochs,
            "wandb": {"mode": "disabled"},
            "schedule": {"name": "constant"},
            "data": {"batch_size": 8},
            "compute": {"deterministic": False, **compute},
        }
    )
    samples = TensorDataset(X, Y)
    return fit(config, Runtime(), model=model, train_set=samples, eval_set=samples)


def build(kind=nn.Linear):
    torch.manual_seed(0)
    return kind(4, 3)


def test_a_compiled_run_is_that_of_the_model_and_keeps_its_code(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    eager = build()
    expected = train(tmp_path / "eager", eager)
    model = build(Sizes)
    model.seen = []
    result = train(tmp_path, model, compile=True)
    assert result.scores["eval/count"] == 18
    assert result.scores["eval/loss"] == pytest.approx(expected.scores["eval/loss"], rel=1e-5)
    torch.testing.assert_close(model.weight, eager.weight)
    assert list(model.state_dict()) == ["weight", "bias"]
    assert set(model.seen[3:]) == {2}  # but for the sanity checks, only ragged batches
    assert any((tmp_path / "digits" / CACHE_NAME).iterdir())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "digits" / CACHE_NAME)
    model.seen.clear()
    model(X[:8])
    assert model.seen == [8]  # after the run it is the model that was given
    resumed = train(tmp_path, build(Sizes), epochs=2, compile=True)
    assert resumed.weights_digest == result.weights_digest


def test_batches_of_another_size_run_uncompiled(monkeypatch):
    compiled = []

    def compile_in_place(model, **options):
        compiled.append(options)
        model._compiled_call_impl = lambda inputs: compiled.append(len(inputs)) or inputs

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    model = nn.Identity()
    compile_model(model, COMPUTE, 4)
    for size in (4, 3, 4):
        assert torch.equal(model(X[:size]), X[:size])
    assert compiled == [{"dynamic": False, "mode": None}, 4, 4]


def test_a_model_that_cannot_be_compiled_is_one_line(tmp_path, monkeypatch):
    def compile_in_place(model, **_):  # torch falls back to Python where it can
        def fail(_):
            raise RuntimeError("InductorError: no kernel for that\nand many lines more")

        model._compiled_call_impl = fail

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    message = (
        r"^compute\.compile is set while the model, which works without, cannot be compiled, "
        r"RuntimeError: InductorError: no kernel for that; set compute\.compile=false, or exclude"
    )
    model = build()
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, model, compile=True)
    assert model(X).shape == (18, 3)  # it is as it was


def test_kernels_that_are_chosen_by_time_are_not_deterministic():
    with pytest.raises(ValueError, match=r"compute\.compile is max-autotune-no-cudagraphs, which"):
        ComputeConfig(compile="max-autotune-no-cudagraphs")
