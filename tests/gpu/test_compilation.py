"""Compiled models give equal bits over cold caches, captured and resumed; needs CUDA."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import StopAt, train_captured
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.distributed.runtime import Runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROGRAM = """
import sys
sys.path += [sys.argv[1], sys.argv[1] + "/.."]
import test_compilation
print("digest", test_compilation.train(sys.argv[2]).weights_digest)
"""


def train(folder, *, captured=False, stop=None):
    torch.manual_seed(1)
    images, labels = torch.randn(70, 3, 16, 16), torch.randint(0, 5, (70,))
    stem = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()
    model = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    return train_captured(
        folder,
        Runtime(device=torch.device("cuda", 0)),
        model,
        TensorDataset(images, labels),
        captured=captured,
        stop=stop,
        data={"batch_size": 16},  # four full steps, one of six samples
        compute={"compile": True, "precision": "bf16", "channels_last": True},
    )


def test_cold_caches_give_equal_bits(tmp_path):
    digests = set()
    for name in ("first", "second"):
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path / name)]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        digests |= {line for line in told.stdout.splitlines() if line.startswith("digest")}
    assert len(digests) == 1


def test_captured_and_resumed_runs_have_the_bits_of_compiled_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    digests = {}
    for captured in (False, True):
        whole = train(tmp_path / f"whole{captured}", captured=captured)
        cut = train(tmp_path / f"cut{captured}", captured=captured, stop=StopAt(2))
        assert cut.status == "stopped"
        resumed = train(tmp_path / f"cut{captured}", captured=captured)
        digests |= {(captured, "whole"): whole, (captured, "resumed"): resumed}
    assert len({run.weights_digest for run in digests.values()}) == 1
