"""Precision, memory format, determinism, and several ranks on one GPU; needs CUDA."""

import json
from functools import partial

import pytest
import torch
from models import networks, samples
from models.test_compute import far_targets, rows_of
from models.training import Case, Outcome, outcome_of, train
from ranks import run_ranks
from torch import nn
from torch.backends import cudnn

from ddp_sgd.config import ComputeConfig, RunConfig
from ddp_sgd.distributed.runtime import start_runtime
from ddp_sgd.engine import precision
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.precision import float32_precision, torch_settings
from ddp_sgd.engine.step import Stepper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

COMPUTE = [
    {},
    {"precision": "ieee"},
    {"precision": "tf32"},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"precision": "bf16", "channels_last": True},
    {"channels_last": True},
]
IMAGES = samples.images(32, size=16, dtype=torch.float32, channels=3)


def convnet():
    """A classifier with batch normalization and dropout, whose kernels cuDNN may choose."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16 * 49, networks.CLASSES),
    )


CONVNET = Case(model=convnet, data=IMAGES, dtype=None)
CHANGES = {"checkpoint": {"every_epochs": 1}, "schedule": {"name": "constant"}}


@pytest.fixture(scope="module")
def device():
    with start_runtime(device="cuda") as runtime:
        yield runtime


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_equal_runs_have_equal_bits_also_when_resumed(compute, device, tmp_path):
    run = partial(train, CONVNET, device, compute=compute, **CHANGES)
    whole = run(tmp_path / "whole", epochs=6)
    assert run(tmp_path / "again", epochs=6).digest == whole.digest
    run(tmp_path / "cut", epochs=3)
    assert run(tmp_path / "cut", epochs=6).digest == whole.digest


@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32", "ieee"])
def test_digits_are_as_good(name, device, tmp_path):
    scores = {}
    for each in ("fp32", name):
        config = RunConfig(
            output_dir=str(tmp_path),
            name=each,
            epochs=8,
            compute={"precision": each},
            wandb={"mode": "disabled"},
        )
        scores[each] = fit(config, device).scores["eval/accuracy"]
    assert abs(scores[name] - scores["fp32"]) <= 0.01


def test_tf32_is_used_where_it_is_allowed(device):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    a, b = torch.randn(2, 512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    exact = a.double() @ b.double()
    errors = {}
    for name in ("ieee", "tf32"):
        with float32_precision(name):
            errors[name] = float((a @ b - exact).abs().max())
    assert errors["tf32"] > 10 * errors["ieee"]


def test_convolutions_with_ieee_have_all_bits(device):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    images = torch.randn(8, 64, 16, 16, device="cuda")
    layer = nn.Conv2d(64, 64, 3, device="cuda")
    exact = nn.functional.conv2d(images.double(), layer.weight.double(), layer.bias.double())
    errors = {}
    for name in ("ieee", "tf32"):
        with float32_precision(name), torch.no_grad():
            errors[name] = float((layer(images) - exact).abs().max())
    assert errors["tf32"] > 10 * errors["ieee"]


def test_settings_last_as_long_as_the_run(device, tmp_path):
    before = cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    train(CONVNET, device, tmp_path, compute={"precision": "ieee", "deterministic": False})
    after = cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    assert after == before


class Pooled(nn.Module):
    """Has a backward pass that no deterministic kernel computes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 4)
        )

    def forward(self, images):
        return self.layers(images)


def test_an_operation_without_a_deterministic_kernel_is_named_once(device, tmp_path, capfd):
    train(Case(model=Pooled, data=IMAGES, dtype=None), device, tmp_path)
    out, err = capfd.readouterr()
    assert out.count("adaptive_avg_pool2d_backward_cuda has no deterministic implementation") == 1
    assert "UserWarning" not in err


def test_the_channels_of_a_convolution_come_last(device, tmp_path):
    seen = []

    class Looking(nn.Conv2d):
        def forward(self, images):
            seen.append((images.stride(1), self.weight.stride(1), images.dtype))
            return super().forward(images)

    def model():
        return nn.Sequential(Looking(3, 4, 3), nn.Flatten(), nn.Linear(4 * 196, 4))

    train(
        Case(model=model, data=IMAGES, dtype=None),
        device,
        tmp_path,
        compute={"precision": "bf16", "channels_last": True},
    )
    assert set(seen) == {(1, 1, torch.float32)}


def test_overflows_on_the_device(device, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_GROWTH_STEPS", precision._GROWTH_STEPS)
    far_targets(device, tmp_path, 3, {"epochs": 30})
    rows = rows_of(tmp_path)
    assert rows[0]["train/loss_scale"] == 65536.0
    assert rows[-1]["train/overflow_steps"] >= 12
    assert rows[-1]["train/skipped_steps"] == 0
    assert len({row["train/loss_scale"] for row in rows[-8:]}) > 1  # it grows and shrinks


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_no_step_waits_for_the_device(compute, device, tmp_path, monkeypatch):
    steps = []
    step = Stepper.step

    def watched(self, batches, lr):
        steps.append(batches.step)
        if len(steps) < 3:  # the first ones make memory and plans
            return step(self, batches, lr)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, batches, lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "step", watched)
    train(CONVNET, device, tmp_path, compute=compute, epochs=6, optim={"clip_norm": 1.0})
    assert len(steps) == 6


def test_memory_is_reported(device, tmp_path):
    train(CONVNET, device, tmp_path, log={"every_steps": 1})
    rows = rows_of(tmp_path)
    peaks = [row["memory/peak_bytes"] for row in rows]
    least = sum(p.numel() * 4 for p in convnet().parameters())
    assert least < peaks[0] <= peaks[-1] < 2**33
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["memory/peak_bytes"] >= peaks[-1]


def train_shared(runtime, folder, parallel):
    case = Case(model=networks.convnet, data=samples.images())
    outcome = train(case, runtime, folder, accumulate=2, parallel=parallel)
    return str(runtime.device), outcome.pack()


@pytest.mark.parametrize("parallel", [{}, {"replica": "ddp"}], ids=str)
def test_ranks_share_a_gpu_over_gloo(parallel, device, tmp_path):
    ranks = 1 + torch.cuda.device_count()
    options = {"device": "cuda", "backend": "gloo"}
    results = run_ranks(ranks, train_shared, tmp_path / "shared", parallel, **options)
    assert [name for name, _ in results][-1] == "cuda:0"  # that of rank 0, too
    outcomes = [Outcome.unpack(packed) for _, packed in results]
    assert len({outcome.digest for outcome in outcomes}) == 1
    alone = train(Case(model=networks.convnet, data=samples.images()), device, tmp_path / "alone")
    start = outcome_of(networks.convnet().double()).parameters
    for name, parameter in outcomes[0].parameters.items():
        assert not torch.equal(parameter.cpu(), start[name])
        torch.testing.assert_close(
            parameter.cpu(), alone.parameters[name].cpu(), rtol=1e-9, atol=1e-9
        )


def refuse(runtime):
    raise AssertionError(runtime)


def test_nccl_wants_a_gpu_for_each_rank():
    ranks = 1 + torch.cuda.device_count()
    failed = run_ranks(ranks, refuse, device="cuda", backend="nccl", raises=True)
    assert {each.error for each in failed} <= {"ConfigError", "RemoteError", "PeerError"}
    assert any("runtime.backend=gloo" in each.text for each in failed)


def test_cudnn_times_its_kernels_where_bits_may_differ(device):
    compute = ComputeConfig(deterministic=False)
    with torch_settings(compute, device.device, print):
        assert cudnn.benchmark
        assert not cudnn.deterministic
