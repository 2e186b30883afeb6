import pytest
import torch

from ddp_sgd.models import MLP, ConvNet


@pytest.mark.parametrize("hidden", [[], [8], [8, 4]])
def test_mlp(hidden):
    model = MLP(inputs=6, hidden=hidden, classes=3)
    assert model(torch.zeros(5, 6)).shape == (5, 3)
    assert model(torch.zeros(5, 2, 3)).shape == (5, 3)
    widths = [6, *hidden, 3]
    assert [p.shape[0] for p in model.parameters() if p.ndim == 2] == widths[1:]
    assert isinstance(model[-1], torch.nn.Linear)  # scores, not probabilities


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (5, 8, 8), (5, 1, 28, 28), (5, 1, 7, 5)])
def test_convnet(batch_norm, shape):
    model = ConvNet(channels=1, widths=[4, 8], classes=3, batch_norm=batch_norm)
    assert model(torch.zeros(shape)).shape == (5, 3)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == batch_norm


def test_convnet_on_colour():
    assert ConvNet(channels=3, widths=[4], classes=2)(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
