"""Transforms on the GPU: the numbers of the CPU, and replayed in a CUDA graph; needs CUDA."""

import numpy as np
import pytest
import torch

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits
from ddp_sgd.data.augment import (
    Cutout,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    Transforms,
)
from ddp_sgd.data.draws import Draws
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

INDICES = np.array([0, 1, 5, 2**31, 2**40, 12_345, 7, 8] * 32)
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]


class Noise:
    """Adds random numbers of both kinds."""

    def __call__(self, batch, draws):
        noise = draws.uniform(3) + draws.integers(-(2**20), 2**20, 3)
        return batch + noise[:, :, None, None]


def images(dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (len(INDICES), 3, 32, 32), generator=generator).to(dtype)


CHAINS = {
    "crop": [RandomCrop(32, 4)],
    "reflect": [RandomCrop([32, 30], 4, mode="reflect")],
    "flip": [RandomHorizontalFlip()],
    "cutout": [Cutout(8)],
    "normalize": [Normalize(MEAN, STD)],
    "noise": [Noise()],
    "all": [RandomCrop(32, 4), RandomHorizontalFlip(), Normalize(MEAN, STD), Cutout(8), Noise()],
}


@pytest.mark.parametrize("low", [0, -(2**31)])
def test_numbers_are_those_of_the_cpu_bit_by_bit(low):
    keys = torch.from_numpy(INDICES) * 0x1234567 - 2**61
    host, device = Draws(keys, stream=2**62 + 1), Draws(keys.cuda(), stream=2**62 + 1)
    assert torch.equal(device.bits(50).cpu(), host.bits(50))
    assert torch.equal(device.uniform(50).cpu(), host.uniform(50))
    assert torch.equal(
        device.integers(low, low + 1000, 50).cpu(), host.integers(low, low + 1000, 50)
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("chain", CHAINS)
def test_batches_are_those_of_the_cpu(chain, dtype, memory_format):
    batch = images(dtype).contiguous(memory_format=memory_format)
    transforms = Transforms(CHAINS[chain], seed=3)
    host = transforms.check(batch, INDICES, 2)
    device = transforms.check(batch.cuda(), INDICES, 2)
    assert device.is_contiguous(memory_format=memory_format)
    assert device.dtype == host.dtype
    ulp = torch.finfo(host.dtype).eps if host.is_floating_point() else 0
    assert torch.allclose(device.cpu(), host, rtol=ulp, atol=0)


def test_a_graph_replays_with_other_indices_and_epochs():
    transforms = Transforms(CHAINS["all"], seed=3)
    batch, indices = images().cuda(), torch.from_numpy(INDICES).cuda()
    epoch = torch.zeros((), dtype=torch.int64, device="cuda")
    transforms.check(batch, indices, 0)  # copies constants to the device
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        transforms(batch, indices, epoch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = transforms(batch, indices, epoch)
    for number in range(3):
        other = torch.from_numpy(INDICES + 1000 * number)
        values = images() + number
        batch.copy_(values)
        indices.copy_(other)
        epoch.fill_(number)
        graph.replay()
        assert torch.equal(result, transforms(values.cuda(), other.cuda(), number))
        host = transforms(values, other, number)
        eps = torch.finfo(host.dtype).eps
        assert torch.allclose(result.cpu(), host, rtol=eps, atol=0)


def test_nothing_waits_for_the_device():
    transforms = Transforms(CHAINS["all"], seed=3)
    batch = images().cuda()
    transforms.check(batch, INDICES, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in range(3):
            transforms(batch, INDICES, epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Recorder:
    """Keeps the draws of a run, by the sample, which its first pixel names."""

    def __init__(self):
        self.drawn = []

    def __call__(self, batch, draws):
        self.drawn.append(draws.uniform(4))
        return batch

    def rows(self):
        return torch.cat([numbers.cpu() for numbers in self.drawn])


recorders = []


def recorder():
    recorders.append(Recorder())
    return recorders[-1]


def test_a_run_on_the_gpu_draws_what_one_on_the_cpu_draws(tmp_path):
    crop = {"class_path": "ddp_sgd.data.augment.RandomCrop", "init_args": {"size": 8, "padding": 1}}
    here = {"class_path": f"{__name__}.recorder"}
    recorders.clear()
    for device in ("cpu", "cuda:0"):
        config = RunConfig(
            output_dir=str(tmp_path),
            name=device.partition(":")[0],
            epochs=1,
            model={"class_path": "ddp_sgd.models.ConvNet", "init_args": {"widths": [4]}},
            data={"train_transforms": [crop, here]},
            wandb={"mode": "disabled"},
        )
        train_set = Digits(shape="image")
        fit(config, Runtime(device=torch.device(device)), train_set=train_set)
    host, device = recorders
    assert torch.equal(host.rows(), device.rows())
