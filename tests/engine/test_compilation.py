"""A compiled run: by torch's real compiler, on the CPU."""

import os
from dataclasses import replace

import pytest
import torch
from gathered import context_of, gather
from graphs import Terms
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import ComputeConfig, RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.compilation import CACHE_NAME, _largest_batch, compile_model, compiled
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.resume import ResumePoint
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


def train(folder, model, epochs=2, *, given=None, null=False, **compute):
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "epochs": epochs,
            "wandb": {"mode": "disabled"},
            "schedule": {"name": "constant"},
            "data": {"batch_size": 8},
            "compute": {"deterministic": False, **compute},
            **({"loss": None} if null else {}),
        }
    )
    samples = TensorDataset(X, Y)
    data = {"train_set": samples, "eval_set": samples}
    return fit(config, Runtime(), model=model, loss=given, **data)


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
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ  # another run has a folder of its own
    model.seen.clear()
    model(X[:8])
    assert model.seen == [8]  # after the run it is the model that was given
    resumed = train(tmp_path, build(Sizes), epochs=2, compile=True)
    assert resumed.weights_digest == result.weights_digest


class GivesLoss(nn.Linear):
    def forward(self, inputs, targets):
        scores = super().forward(inputs)
        return {"fit": nn.functional.cross_entropy(scores, targets), "size": scores.square().mean()}


@pytest.mark.parametrize(
    ("kind", "options"), [(nn.Linear, {"given": Terms()}), (GivesLoss, {"null": True})]
)
def test_losses_of_several_numbers_are_those_of_the_model(kind, options, tmp_path):
    eager, model = build(kind), build(kind)
    expected = train(tmp_path / "eager", eager, **options)
    result = train(tmp_path / "compiled", model, compile=True, **options)
    assert result.scores == pytest.approx(expected.scores, rel=1e-5)
    assert "eval/rare" not in result.scores  # of which there is no sample
    torch.testing.assert_close(model.weight, eager.weight)


def test_batches_of_another_size_run_uncompiled(monkeypatch):
    calls = []

    def compile_in_place(model, **options):
        calls.append(options)
        model._compiled_call_impl = lambda inputs: calls.append(len(inputs)) or inputs

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    model = nn.Identity()
    compile_model(model, COMPUTE, 4)
    for size in (4, 3, 4):
        assert torch.equal(model(X[:size]), X[:size])
    assert calls == [{"dynamic": False, "mode": None, "options": None}, 4, 4]


def context_at(step, **data):
    config = RunConfig.model_validate(
        {"epochs": 2, "data": {"batch_size": 8, "eval": None, **data}, "optim": {"lr": 0.1}}
    )
    samples = TensorDataset((X * 100).to(torch.uint8) if data else X, Y)
    components = gather(config, model=build(), train_set=samples)
    context = context_of(config, components, Runtime(), ResumePoint(run_id="x"))
    context.state.step = step
    return context


def test_code_is_for_full_batches_even_if_the_next_step_is_ragged():
    assert _largest_batch(context_at(2)).samples == 8  # steps of 8, 8 and 2 samples
    assert _largest_batch(context_at(5)).samples == 2  # no other is left
    assert _largest_batch(context_at(6)) is None


def test_code_is_for_what_transforms_give():
    normalize = {
        "class_path": "ddp_sgd.data.augment.Normalize",
        "init_args": {"mean": 0.5, "std": 0.25},
    }
    batch = _largest_batch(context_at(0, train_transforms=[normalize]))
    assert batch.inputs.dtype == torch.float32


@pytest.mark.parametrize(("evaluates", "passes"), [(True, 2), (False, 1)])
def test_both_modes_are_compiled_where_the_run_evaluates(evaluates, passes, tmp_path, monkeypatch):
    modes = []

    def compile_in_place(model, **_):
        model._compiled_call_impl = lambda x: modes.append(model.training) or model._call_impl(x)

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    context = replace(context_at(0), evaluates=evaluates)
    before = context.wrapper.inner.weight.detach().clone()
    with compiled(context, COMPUTE, tmp_path):
        assert modes == [True, False][:passes]
    assert torch.equal(context.wrapper.inner.weight, before)
    assert context.wrapper.inner.weight.grad is None


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
