"""Captured steps give the bits of eager ones, before and after a resume; needs CUDA."""

import pytest
import torch
from graphs import StopAt, Terms, measured, train_captured
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.captured_step import CapturedStep
from ddp_sgd.errors import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randn(70, 3, 8, 8, generator=DRAW)  # with 16 per step: four full steps, one of six
LABELS = torch.randint(0, 5, (70,), generator=DRAW)


def build(kind):
    torch.manual_seed(1)
    if kind == "mlp":
        layers = nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5)
    else:
        stem = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        layers = *stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 5)
    return nn.Sequential(*layers)


def train(folder, kind="mlp", *, captured, model=None, stop=None, samples=None, **sections):
    sections["data"] = {"batch_size": 16, **sections.get("data", {})}
    schedule = sections.pop("schedule", {})
    return train_captured(
        folder,
        Runtime(device=torch.device("cuda", 0)),
        model or build(kind),
        samples or TensorDataset(IMAGES, LABELS),
        captured=captured,
        stop=stop,
        log={"every_steps": 3},
        schedule={"warmup_steps": 3, "warmup_start": 0.1, **schedule},
        **sections,
    )


VARIANTS = {
    "defaults": {},
    "micro-batches": {"data": {"batch_size": 4, "accumulate": 4}},
    "clipping": {"optim": {"clip_norm": 0.1, "nesterov": True, "weight_decay": 0.01}},
    "momentum from 0 on": {"schedule": {"momentum_start": 0.0, "warmup_steps": 7}},
    "by epoch": {"schedule": {"by": "epoch", "warmup": "shift", "warmup_steps": 5}},
    "clipping by value": {"optim": {"clip_value": 0.01}},
    "a sum of means": {"loss": Terms(), "data": {"batch_size": 4, "accumulate": 4}},
    "a loss and another number": {"loss": Terms("loss"), "compute": {"precision": "fp16"}},
    "bf16": {"compute": {"precision": "bf16", "channels_last": True}},
    "fp16": {"compute": {"precision": "fp16"}},
    "host": {"data": {"device": "host"}},
    "workers": {"data": {"workers": 1}},
    "accelerator": {"data": {"device": "accelerator"}},
}


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
@pytest.mark.parametrize("name", VARIANTS)
def test_eager_captured_and_resumed_runs_have_one_digest(name, kind, tmp_path):
    sections = VARIANTS[name]
    digests = {}
    for captured in (False, True):
        whole = train(tmp_path / f"whole{captured}", kind, captured=captured, **sections)
        folder = tmp_path / f"cut{captured}"
        cut = train(folder, kind, captured=captured, stop=StopAt(2), **sections)
        assert cut.status == "stopped"
        assert 0 < cut.step < whole.step
        resumed = train(folder, kind, captured=captured, **sections)
        digests[captured, "whole"] = whole.weights_digest
        digests[captured, "resumed"] = resumed.weights_digest
    assert len(set(digests.values())) == 1, digests


def test_the_journals_are_equal_and_skipped_steps_are_counted(tmp_path):
    images = IMAGES.clone()
    images[7] = torch.inf
    data = TensorDataset(images, LABELS)
    journals = []
    for captured in (False, True):
        train(tmp_path / str(captured), "convnet", captured=captured, samples=data)
        journals.append(measured(tmp_path / str(captured)))
    assert journals[0] == journals[1]
    assert journals[0][-1]["train/skipped_steps"] == 3


def test_no_captured_step_waits_for_the_device(tmp_path, monkeypatch):
    step = CapturedStep.step
    replays = []

    def strict(self, batches, lr):
        is_checked = batches.step == 5
        torch.cuda.set_sync_debug_mode("default" if is_checked else "error")
        try:
            return step(self, batches, lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            replays.append(batches.step)

    monkeypatch.setattr(CapturedStep, "step", strict)
    train(tmp_path, captured=True)
    assert len(replays) == 15


class Waits(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs.flatten(1)) * (2 if inputs.sum().item() > 0 else 1)


class Replaces(nn.Module):
    """Keeps a running mean by assignment, so that a graph would read an old one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 5)
        self.register_buffer("mean", torch.zeros(192))

    def forward(self, inputs):
        flat = inputs.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * flat.detach().mean(0)
        return self.linear(flat - self.mean)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Waits(192, 5), "cannot be captured"),
        (Replaces, "is not repeated by its graph .buffer 0.mean"),
    ],
)
def test_what_cannot_be_captured_is_named_and_another_run_goes_on(model, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        train(tmp_path, captured=True, model=model())
    assert train(tmp_path / "eager", captured=False, model=model()).status == "finished"
