"""``model.after_step`` is undone on the device where a step was skipped; needs CUDA."""

from copy import deepcopy

import pytest
import torch
from graphs import train_captured
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.distributed.runtime import Runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(64, 12, generator=DRAW)  # with 16 per step: four steps per epoch
LABELS = torch.randint(0, 5, (64,), generator=DRAW)


class Taught(nn.Module):
    """A network with a mean teacher, which is written, and a center, which is replaced."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.student = nn.Linear(12, 5)
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        return self.student(inputs) + 0.3 * (self.teacher(inputs) - self.center)

    def after_step(self, step):
        for mean, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mean.lerp_(weight, 0.2)
        self.center = 0.9 * self.center + 0.1 * self.teacher.bias
        self.calls += 1


def train(folder, inputs, *, captured):
    model = Taught()
    samples = TensorDataset(inputs, LABELS)
    runtime = Runtime(device=torch.device("cuda", 0))
    data = {"batch_size": 16}
    train_captured(folder, runtime, model, samples, captured=captured, data=data)
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("spoiled", [False, True])
def test_eager_and_captured_steps_call_it_alike(spoiled, tmp_path):
    inputs = INPUTS.clone()
    if spoiled:  # one step of each of three epochs
        inputs[3] = float("inf")
    eager, captured = (
        train(tmp_path / str(captured), inputs, captured=captured) for captured in (False, True)
    )
    assert eager["calls"] == (9 if spoiled else 12)
    for name, value in eager.items():
        assert torch.equal(value, captured[name]), name
        assert value.isfinite().all(), name
