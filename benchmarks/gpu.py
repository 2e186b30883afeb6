"""One GPU: ``ddp_sgd`` beside loops by hand that get all that the hardware gives.

Usage: ``python -m benchmarks.gpu [--rounds 3] [--only mlp,convnet] [--small]``.

Each case trains the same model on the same random data, by hand and by ``ddp_sgd``, in alternating
rounds within one process, with ``cudnn.benchmark`` and without deterministic kernels on both sides.
Loops by hand gather every batch by its indices; those of small models are one CUDA graph of the
whole step, which gathers by a counter on the device and skips steps whose gradient is not finite.
Figures of ``ddp_sgd`` are those of its journal, without the first rows. ``--small`` makes all
numbers small, to run every part where there is no GPU.
"""

import gc
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import harness
from ddp_sgd import RunConfig, fit
from ddp_sgd.distributed.runtime import Runtime

MOMENTUM, LR = 0.9, 0.01
NORMALIZE = {
    "class_path": "ddp_sgd.data.augment.Normalize",
    "init_args": {"mean": [0.5], "std": [0.25]},
}


class Case(NamedTuple):
    """What is trained.

    Args:
        model: Makes the model.
        shape: Shape of an input.
        classes: Number of classes.
        batch: Samples per step.
        samples: Length of the data set.
        steps: Steps of a measurement.
        images: Whether inputs are images in uint8, which are normalized on the device.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: int
    samples: int
    steps: int
    images: bool = False

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make inputs and targets on the host."""
        draw = torch.Generator().manual_seed(0)
        size = (self.samples, *self.shape)
        inputs = (
            torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
            if self.images
            else torch.randn(size, generator=draw)
        )
        return inputs, torch.randint(0, self.classes, (self.samples,), generator=draw)


def mlp() -> nn.Module:
    """Make the MLP of the digits: 64-64-64-10."""
    from ddp_sgd.models import MLP

    return MLP(inputs=64, hidden=[64, 64], classes=10)


def convnet() -> nn.Module:
    """Make the small ConvNet, for images of 28 x 28."""
    from ddp_sgd.models import ConvNet

    return ConvNet(channels=1, classes=10)


def resnet(name: str, classes: int) -> nn.Module:
    """Make a ResNet; for 32 x 32 images with the stem that CIFAR's usual ones have."""
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(num_classes=classes)
    if name == "resnet18":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


RESNET50 = Case(partial(resnet, "resnet50", 1000), (3, 224, 224), 1000, 256, 1024, 32, images=True)
CASES = {
    "mlp": Case(mlp, (64,), 10, 32, 8192, 4000),
    "convnet": Case(convnet, (1, 28, 28), 10, 64, 8192, 2000),
    "resnet18": Case(partial(resnet, "resnet18", 10), (3, 32, 32), 10, 128, 8192, 300, images=True),
    "resnet50": RESNET50,
    # Four times the data: an epoch of four steps would measure the waits at its end.
    "resnet50_compiled": RESNET50._replace(samples=4096, steps=64),
    "first_step": Case(mlp, (64,), 10, 32, 64, 1),
}


def small(case: Case) -> Case:
    """Return a case with small numbers."""
    return case._replace(batch=4, samples=32, steps=8)


class ByHand:
    """A loop by hand.

    Args:
        case: What is trained.
        device: Where.
        amp: Whether forward passes are in bf16, and images in channels_last.
        on_device: Whether the data are there, too.
        compiled: Whether the model is compiled.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        amp: bool = False,
        on_device: bool = True,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.amp = case, device, amp
        self.format = torch.channels_last if amp else torch.contiguous_format
        self.model = case.model().to(device)
        if case.images:
            self.model = self.model.to(memory_format=self.format)
        if compiled:
            self.model.compile(dynamic=False)
        self.inputs, self.targets = case.data()
        self.on_device = on_device
        if on_device:
            self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LR, momentum=MOMENTUM, fused=device.type == "cuda"
        )
        self.loss = nn.CrossEntropyLoss()

    def order(self, steps: int) -> torch.Tensor:
        """Draw the indices of some steps, of shape (steps, batch)."""
        epochs = -(-steps * self.case.batch // self.case.samples)
        drawn = torch.cat([torch.randperm(self.case.samples) for _ in range(epochs)])
        return drawn[: steps * self.case.batch].view(steps, self.case.batch)

    def forward_backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute the gradients, and return the loss."""
        if self.case.images:
            inputs = inputs.to(memory_format=self.format).float().div_(255).sub_(0.5).div_(0.25)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss: torch.Tensor = self.loss(self.model(inputs), targets)
        loss.backward()
        return loss.detach()

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        self.forward_backward(inputs, targets)
        self.optimizer.step()

    def eager(self) -> float:
        """Return steps per second; batches of data on the host are copied ahead."""
        batches = self.from_device if self.on_device else self.from_host
        for inputs, targets in batches(self.order(5)):
            self.step(inputs, targets)
        synchronize(self.device)
        start = time.perf_counter()
        for inputs, targets in batches(self.order(self.case.steps)):
            self.step(inputs, targets)
        synchronize(self.device)
        return self.case.steps / (time.perf_counter() - start)

    def from_device(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Gather batches where the data are."""
        for indices in order.to(self.device):
            yield self.inputs.index_select(0, indices), self.targets.index_select(0, indices)

    def from_host(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Gather batches into page-locked memory, and copy them ahead on a stream of their own."""
        if self.device.type != "cuda":
            yield from ((self.inputs[indices], self.targets[indices]) for indices in order)
            return
        parts = self.inputs, self.targets
        shapes = [((self.case.batch, *part.shape[1:]), part.dtype) for part in parts]
        ring = [[torch.empty(s, dtype=d, pin_memory=True) for s, d in shapes] for _ in range(3)]
        copied = [torch.cuda.Event() for _ in ring]
        stream = torch.cuda.Stream()

        def send(number: int) -> list[torch.Tensor]:
            slot = number % len(ring)
            copied[slot].synchronize()
            for part, buffer in zip(parts, ring[slot], strict=True):
                torch.index_select(part, 0, order[number], out=buffer)
            with torch.cuda.stream(stream):
                moved = [buffer.to(self.device, non_blocking=True) for buffer in ring[slot]]
                copied[slot].record()
            return moved

        ahead = send(0)
        for number in range(len(order)):
            torch.cuda.current_stream().wait_stream(stream)
            inputs, targets = ahead
            inputs.record_stream(torch.cuda.current_stream())
            targets.record_stream(torch.cuda.current_stream())
            yield inputs, targets
            if number + 1 < len(order):
                ahead = send(number + 1)

    def graph(self) -> float:
        """Return steps per second of one CUDA graph."""
        case, device = self.case, self.device
        order = self.order(case.steps).to(device)
        counter = torch.zeros(1, dtype=torch.int64, device=device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        buffers = [torch.zeros_like(p) for p in parameters]
        rate = torch.full((), LR, device=device)

        def body() -> None:
            indices = order.index_select(0, counter)[0]
            for parameter in parameters:
                parameter.grad = None
            self.forward_backward(
                self.inputs.index_select(0, indices), self.targets.index_select(0, indices)
            )
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            torch._fused_sgd_(
                [p.detach() for p in parameters],
                gradients,
                buffers,
                weight_decay=0.0,
                momentum=MOMENTUM,
                lr=rate,  # type: ignore[arg-type]
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=(~norm.isfinite()).float(),
            )
            counter.add_(1).remainder_(case.steps)

        if device.type != "cuda":
            for _ in range(case.steps):
                body()
            return 1.0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        graph.replay()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(case.steps):
            graph.replay()
        synchronize(device)
        return case.steps / (time.perf_counter() - start)


def ours(case: Case, device: torch.device, **sections: Any) -> float:
    """Return steps per second of ``ddp_sgd``."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        train(case, device, folder, **sections)
        rows = harness.journal_rows(Path(folder) / "digits")
    rates = [row["throughput/samples_per_s"] / case.batch for row in rows]
    return median(rates[len(rates) // 3 :])


def train(
    case: Case, device: torch.device, folder: str, *, stop: Any = None, **sections: Any
) -> Any:
    """Train by ``ddp_sgd``, without evaluation and saves, for the steps of a measurement."""
    per_epoch = case.samples // case.batch
    epochs = max(2, -(-3 * case.steps // (2 * per_epoch)))
    config = {
        "output_dir": folder,
        "epochs": epochs,
        "wandb": {"mode": "disabled"},
        "log": {"every_steps": max(1, epochs * per_epoch // 9)},
        "optim": {"lr": LR, "momentum": MOMENTUM},
        "checkpoint": {"every_epochs": None},
        **sections,
    }
    data = {"batch_size": case.batch, "eval": None, **sections.get("data", {})}
    compute = {"deterministic": False, **sections.get("compute", {})}
    if case.images:
        data.setdefault("train_transforms", [NORMALIZE])
    config |= {"data": data, "compute": compute}
    return fit(
        RunConfig.model_validate(config),
        Runtime(device=device),
        model=case.model(),
        train_set=TensorDataset(*case.data()),
        stop=stop,
    )


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def shown(rate: float) -> float:
    """Show a rate as soon as it is measured, and free memory for the next loop."""
    harness.print_progress(f"{rate:,.1f} steps per second")
    clear()
    return rate


def clear() -> None:
    """Free memory between cases."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fabric(case: Case, device: torch.device) -> float:
    """Return steps per second of Lightning Fabric, in its usual settings."""
    from lightning_fabric import Fabric  # type: ignore[import-not-found]

    tool = Fabric(
        accelerator=device.type, devices=1, precision="bf16-mixed" if case.images else None
    )
    loop = ByHand(case, device)
    loop.model, loop.optimizer = tool.setup(loop.model, loop.optimizer)
    return framework(loop, tool.backward)


def accelerate(case: Case, device: torch.device) -> float:
    """Return steps per second of accelerate, in its usual settings."""
    from accelerate import Accelerator  # type: ignore[import-not-found]
    from accelerate.state import AcceleratorState  # type: ignore[import-not-found]

    AcceleratorState._reset_state(reset_partial_state=True)  # its settings hold for a process
    tool = Accelerator(mixed_precision="bf16" if case.images else "no", cpu=device.type == "cpu")
    loop = ByHand(case, device)
    loop.model, loop.optimizer = tool.prepare(loop.model, loop.optimizer)
    return framework(loop, tool.backward)


def framework(loop: ByHand, backward: Callable[[torch.Tensor], None]) -> float:
    """Return steps per second of a loop with a framework's model, optimizer and backward pass."""

    def steps(count: int) -> None:
        for inputs, targets in loop.from_device(loop.order(count)):
            scaled = inputs.float().div_(255).sub_(0.5).div_(0.25) if loop.case.images else inputs
            loop.optimizer.zero_grad()
            loss = loop.loss(loop.model(scaled), targets)
            backward(loss)
            loop.optimizer.step()

    steps(5)
    synchronize(loop.device)
    start = time.perf_counter()
    steps(loop.case.steps)
    synchronize(loop.device)
    return loop.case.steps / (time.perf_counter() - start)


def measure(options: Namespace) -> Iterator[str]:
    """Measure the cases, and give a table and the ratios."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    is_cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    if is_cuda:
        yield f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}."
    chosen = options.only.split(",") if options.only else list(CASES)
    for name in chosen:
        if name == "first_step":
            yield first_steps(options.rounds)
            continue
        case = small(CASES[name]) if options.small else CASES[name]
        loops = loops_of(name, case, device, is_cuda=is_cuda)
        rounds = 1 if name.startswith("resnet50") else options.rounds
        found = harness.alternate(loops, rounds)
        best = {loop: median(rates) for loop, rates in found.items()}
        rows = (
            (name, loop, rates, [rate * case.batch for rate in rates], best[loop] / best["by hand"])
            for loop, rates in found.items()
        )
        head = "case | loop | steps per second | samples per second | of by hand"
        yield harness.markdown_table(head, rows)
        clear()
    if "resnet50" in chosen:
        yield memory(small(CASES["resnet50"]) if options.small else CASES["resnet50"], device)


def loops_of(
    name: str, case: Case, device: torch.device, *, is_cuda: bool
) -> dict[str, Callable[[], float]]:
    """Return the loops of a case by name, with what they are compared to."""

    def by_hand(how: str = "eager", **options: Any) -> Callable[[], float]:
        return lambda: shown(float(getattr(ByHand(case, device, **options), how)()))

    def own(**sections: Any) -> Callable[[], float]:
        return lambda: shown(ours(case, device, **sections))

    graphs = {"cuda_graphs": True} if is_cuda else {}
    place = {"device": "accelerator" if is_cuda else "auto"}
    compute = {"precision": "bf16", "channels_last": True}
    if name == "resnet50":
        host: dict[str, Any] = {"device": "host"}
        return {
            "by hand": by_hand(amp=True, on_device=False),
            "ddp_sgd": own(compute=compute, data=host),
            "ddp_sgd, deterministic": own(compute=compute | {"deterministic": True}, data=host),
        }
    if name == "resnet50_compiled":
        return {
            "by hand": by_hand(amp=True, compiled=True),
            "ddp_sgd": own(compute=compute | {"compile": True}, data=place),
        }
    crop = {
        "class_path": "ddp_sgd.data.augment.RandomCrop",
        "init_args": {"size": 32, "padding": 4},
    }
    flip = {"class_path": "ddp_sgd.data.augment.RandomHorizontalFlip"}
    transforms = {"train_transforms": [crop, flip, NORMALIZE]} if case.images else {}
    others = {tool.__name__: partial(tool, case, device) for tool in (fabric, accelerate)}
    return {
        "by hand": by_hand("graph"),
        "ddp_sgd": own(compute=graphs, data=place | transforms),
        "by hand, eager": by_hand(),
        "ddp_sgd, eager": own(data=place | transforms),
        **(others if has_frameworks() else {}),
    }


def has_frameworks() -> bool:
    """Whether the frameworks are installed."""
    return all(map(find_spec, ("accelerate", "lightning_fabric")))


def memory(case: Case, device: torch.device) -> str:
    """Compare the peak memory of ResNet-50 in bf16."""

    def peak(run: Callable[[], Any]) -> float:
        clear()
        if device.type != "cuda":
            run()
            return 1.0
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30

    by_hand = peak(lambda: ByHand(case, device, amp=True, on_device=False).eager())
    compute = {"precision": "bf16", "channels_last": True}
    own = peak(lambda: ours(case, device, compute=compute, data={"device": "host"}))
    return (
        f"Peak memory of ResNet-50 in bf16: {by_hand:.2f} GiB by hand, {own:.2f} GiB by ddp_sgd "
        f"({own / by_hand:.3f})."
    )


class FirstLook:
    """A stop request that remembers when it was looked at: once the first step is over.

    Attributes:
        at: Time of the first look, in seconds since the epoch; 0 before.
    """

    at = 0.0

    @property
    def reason(self) -> str:
        """Ask for a stop."""
        self.at = self.at or time.time()
        return "the first step is over"


def take_first_step(tool: str, started: float) -> float:
    """Take one step of the MLP in this process; return the time since it was started, in s."""
    case = CASES["first_step"]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if tool == "ddp_sgd":
        look = FirstLook()
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            train(case, device, folder, log={"every_steps": 1}, stop=look)
        return look.at - started
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    loop = ByHand(case, device)
    loop.model, loop.optimizer = accelerator.prepare(loop.model, loop.optimizer)
    for inputs, targets in loop.from_device(loop.order(1)):
        accelerator.backward(loop.loss(loop.model(inputs), targets))
        loop.optimizer.step()
    synchronize(device)
    return time.time() - started


def first_steps(rounds: int) -> str:
    """Compare the time from the start of a process to the end of its first step."""
    tools = ("ddp_sgd", "accelerate") if has_frameworks() else ("ddp_sgd",)

    def measure_one(tool: str) -> Callable[[], float]:
        return lambda: float(harness.run_worker("benchmarks.gpu", tool, time.time()))

    found = harness.alternate({tool: measure_one(tool) for tool in tools}, rounds)
    return harness.markdown_table("first step of the MLP | seconds from the start", found.items())


if __name__ == "__main__":
    parser = harness.option_parser(__doc__, rounds=3)
    parser.add_argument("--only", help="cases to measure, with commas between")
    parser.add_argument("--small", action="store_true", help="small numbers, for every part once")
    harness.run_benchmark("gpu", parser, measure, worker=take_first_step)
