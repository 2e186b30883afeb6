"""Between two heartbeats nothing waits for the device."""

import random

import pytest
import torch
from fake_device import FakeDevice
from graphs import Again
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_sgd import named_losses
from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits, loader
from ddp_sgd.engine import captured_step, sanity_check, units
from ddp_sgd.engine import fit as module
from ddp_sgd.engine.after_step import AfterStep, check_after_step
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.sync import RankSync
from ddp_sgd.losses import Objective
from ddp_sgd.models import MLP

WAITS = {
    torch.ops.aten._local_scalar_dense.default,  # item(), tolist(), float(), bool(), if
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,  # the size of what it gives depends on the values
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


def is_cast_of_autocast(*dtypes):
    """Whether a copy is from or to 16 bits: autocast names the device, which is the same."""
    return not {torch.bfloat16, torch.float16}.isdisjoint(dtypes)


class CountWaits(TorchDispatchMode):
    """Lists the operations that need a value from the device on the host.

    ``tolist`` and ``numpy`` on the CPU are not operations; they are listed all the same.
    """

    def __init__(self):
        super().__init__()
        self.waits = []
        self.methods = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy")}

    def __enter__(self):
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, self.listed(name, method))
        return super().__enter__()

    def __exit__(self, *raised):
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*raised)

    def listed(self, name, method):
        def call(tensor, *arguments, **options):
            self.waits.append(name)
            return method(tensor, *arguments, **options)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        to_host = function is torch.ops.aten._to_copy.default and "device" in (kwargs or {})
        to_host = to_host and not is_cast_of_autocast(args[0].dtype, kwargs.get("dtype"))
        if function in WAITS or to_host:
            self.waits.append(str(function))
        return function(*args, **(kwargs or {}))


def train(runtime, folder, changes):
    """Train, and tell which steps had waits, and which had a heartbeat."""
    changes = dict(changes)
    loss, seen = changes.pop("loss", None), {}

    class Watching(RankSync):
        def after(self, step, result, *, lr):
            before = list(count.waits)
            result = super().after(step, result, lr=lr)
            seen[step] = (before, result is not None)
            count.waits.clear()
            return result

    def units_on_the_host(objective, targets, samples, units=Objective.units):
        before = list(count.waits)
        value = units(objective, targets, samples)  # targets that have not left the host yet
        count.waits[:] = before
        return value

    module.RankSync, Objective.units = Watching, units_on_the_host
    if changes.pop("as on", "cpu") == "gpu":
        device = FakeDevice(random.Random(0), eagerness=1.0)
        loader.open_transfer = lambda _: device
        units.counts_on_host = named_losses.counts_on_host = lambda _: False
        Objective.units = None

        def check(*args):
            found = check_after_step(*args)
            return found and AfterStep(args[0], found.places, runtime, waits=False)

        sanity_check.check_after_step = check
    if "cuda_graphs" in str(changes):

        class Uncounted(Again):
            """What it replays runs on a device; rates there are numbers for the kernel of a CPU."""

            def replay(self):
                before = list(count.waits)
                self.body()
                count.waits[:] = before

            def capture(self, body):
                self.body = body

        captured_step.new_graph = lambda _: Uncounted()
    config = RunConfig(
        output_dir=str(folder),
        epochs=2,
        wandb={"mode": "disabled"},
        **{"log": {"every_steps": 7}, **changes},
    )
    if "accumulate" in str(changes):
        loss = loss or nn.CrossEntropyLoss(weight=torch.ones(10))
    with CountWaits() as count:
        fit(config, runtime, train_set=Digits(), loss=loss)
    return seen


class EvenDigits:
    """Two numbers by name; each is a mean over units of its own, counted on the device."""

    def __call__(self, outputs, targets):
        each = nn.functional.cross_entropy(outputs, targets, reduction="none")
        even = targets % 2 == 0
        return {"all": each.mean(), "even": (each * even).sum() / even.sum()}

    def units(self, targets):
        return {"all": targets.numel(), "even": (targets % 2 == 0).sum()}


class Following(MLP):
    """A network with a mean of its weights, and a buffer that is replaced."""

    def __init__(self):
        super().__init__(64, [16], 10)
        self.mean = nn.Parameter(self[-1].weight.detach().clone(), requires_grad=False)
        self.register_buffer("center", torch.zeros(16))

    def after_step(self, step):
        self.mean.lerp_(self[-1].weight, 0.5)
        self.center = self.mean.mean(dim=0)


class AsImages:
    """Applies a transform for images to the digits as they are stored."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, batch, draws):
        return self.transform(batch.reshape(-1, 1, 8, 8), draws).flatten(start_dim=1)


def as_images(name, **init_args):
    inner = {"class_path": f"ddp_sgd.data.augment.{name}", "init_args": init_args}
    return {"class_path": f"{__name__}.AsImages", "init_args": {"transform": inner}}


CHANGES = {
    "defaults": {"data": {"batch_size": 64, "eval": None}},
    "ddp": {"data": {"batch_size": 64, "eval": None}, "parallel": {"replica": "ddp"}},
    "clipping, weighed targets, micro-batches": {
        "data": {"batch_size": 32, "accumulate": 2, "eval": None},
        "optim": {"clip_norm": 0.5},
    },
    "bf16": {"data": {"batch_size": 64, "eval": None}, "compute": {"precision": "bf16"}},
    "fp16": {
        "data": {"batch_size": 64, "eval": None},
        "optim": {"clip_norm": 0.5},
        "compute": {"precision": "fp16", "channels_last": True, "deterministic": False},
    },
    "transforms": {
        "data": {
            "batch_size": 64,
            "eval": None,
            "train_transforms": [
                as_images("RandomCrop", size=8, padding=1),
                as_images("RandomCrop", size=8, padding=1, mode="reflect"),
                as_images("RandomHorizontalFlip"),
                as_images("Normalize", mean=0.3, std=0.4),
                as_images("Cutout", size=2),
            ],
        }
    },
    "captured": {
        "data": {"batch_size": 64, "eval": None, "tail": "drop"},
        "compute": {"cuda_graphs": True},
    },
    "as on a GPU": {
        "data": {"batch_size": 32, "accumulate": 2, "eval": None},
        "optim": {"clip_norm": 0.5},
        "model": {"class_path": f"{__name__}.Following"},
        "as on": "gpu",
    },
    "named numbers and units": {
        "data": {"batch_size": 32, "accumulate": 2, "eval": None},
        "optim": {"clip_value": 0.5},
        "log": {"every_steps": 7, "train_accuracy": True},
        "loss": EvenDigits(),
        "as on": "gpu",
    },
}


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        *((1, name) for name in ("defaults", "bf16", "fp16", "captured")),
        *((2, name) for name in CHANGES if name != "captured"),  # gloo cannot be captured
    ],
)
def test_no_step_waits_for_the_device(name, world_size, tmp_path):
    for seen in run_ranks(world_size, train, tmp_path, CHANGES[name]):
        beats = [step for step, (_, result) in seen.items() if result]
        assert 5 < len(beats) < len(seen) / 3
        # The look at the data before the run is no step; a captured one is checked after an epoch.
        checked = {min(seen), *([23] if name == "captured" else [])}
        waits = {step: ops for step, (ops, _) in seen.items() if ops and step not in checked}
        assert waits == {}


def test_a_wait_would_be_seen():
    with CountWaits() as count:
        value = torch.ones(3).sum()
        assert not count.waits
        value.item()
        value.tolist()
        bool(value > 1)
    assert len(count.waits) == 3
