"""Trains a model by ``fit``, and takes the same steps by plain torch in one process."""

import io
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from ddp_sgd.config import RunConfig
from ddp_sgd.data.sampler import TrainSampler
from ddp_sgd.engine.fit import fit
from ddp_sgd.seeds import seed_for

STEPS = 3
"""Epochs of one step: the momentum of the first two shows in the third."""
LR, MOMENTUM, DECAY = 0.05, 0.9, 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with its data and its loss.

    Args:
        model: Builds the model.
        data: Builds the data set.
        held_out: Builds the data set that is scored; None: the training set.
        loss: Builds the loss, the mean over samples or weighed targets.
        collate: Class of the collate function; None: torch's default_collate.
        dtype: Type of the parameters; None leaves them as they were built.
        changes: Changes of the configuration.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Callable[[], Any] = nn.CrossEntropyLoss
    collate: type | None = None
    held_out: Callable[[], Any] | None = None
    dtype: torch.dtype | None = torch.float64
    changes: Mapping[str, Any] = field(default_factory=dict)

    def build_model(self):
        """Build the model, the same at every call."""
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        model = self.model()
        return model if self.dtype is None else model.to(self.dtype)

    def batch(self, indices, data=None):
        """Form a batch of the samples with these indices."""
        collate = self.collate() if self.collate else default_collate
        data = data or self.data()
        return collate([data[int(index)] for index in indices])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training left behind."""

    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    scores: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    status: str = ""

    def pack(self) -> bytes:
        """Pack this for a pipe: tensors would be sent as open files."""
        file = io.BytesIO()
        torch.save(vars(self), file)
        return file.getvalue()

    @classmethod
    def unpack(cls, packed: bytes) -> "Outcome":
        """Unpack what another process has packed."""
        return cls(**torch.load(io.BytesIO(packed)))


def describe(case, folder, world_size, *, accumulate=1, **changes):
    """Describe a run in which each step has all samples, at a constant rate."""
    changes = dict(case.changes) | changes
    samples = len(case.data())
    data = {"batch_size": -(-samples // (world_size * accumulate)), "accumulate": accumulate}
    if case.collate:
        data["collate"] = {"class_path": f"{case.collate.__module__}.{case.collate.__qualname__}"}
    optim = {"lr": LR, "scaling": "none", "momentum": MOMENTUM, "weight_decay": DECAY}
    basis = {
        "name": "run",
        "epochs": STEPS,
        "data": data | changes.pop("data", {}),
        "optim": optim | {"decay_norm_and_bias": True} | changes.pop("optim", {}),
        "schedule": {"name": "constant"},
        "eval": {"every_epochs": STEPS},
        "checkpoint": {"every_epochs": None},
        "wandb": {"mode": "disabled"},
    }
    return RunConfig(output_dir=str(folder), **basis | changes)


def train(case, runtime, folder, *, accumulate=1, stop=None, **changes):
    """Train a case by ``fit``."""
    model = case.build_model()
    # A run must not depend on what the process drew before.
    seed_all(77 + runtime.rank)
    result = fit(
        describe(case, folder, runtime.world_size, accumulate=accumulate, **changes),
        runtime,
        model=model,
        train_set=case.data(),
        eval_set=(case.held_out or case.data)(),
        loss=case.loss(),
        stop=stop,
    )
    return outcome_of(
        model, scores=result.scores, digest=result.weights_digest, status=result.status
    )


def train_all(runtime, folder, cases, **options):
    """Train several cases; a failure takes the place of the outcome."""
    outcomes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as in the tests of one process
        for number, (name, case) in enumerate(cases.items()):
            outcomes[name] = train(case, runtime, folder / str(number), **options).pack()
    return outcomes


def whole_batches(case):
    """Give all samples as the one micro-batch of each step, in their order."""
    return [[[range(len(case.data()))]]] * STEPS


def micro_batches(case, config, world_size):
    """List the indices of each micro-batch of a run, by step and rank."""
    data = config.data
    orders = [
        TrainSampler(
            len(case.data()),
            global_batch=data.batch_size * world_size * data.accumulate,
            batch_size=data.batch_size,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            tail="exact",
        )
        for rank in range(world_size)
    ]
    steps = []
    for epoch in range(config.epochs):
        for order in orders:
            order.set_epoch(epoch)
        batches = [iter(order) for order in orders]
        for step in range(orders[0].steps_per_epoch):
            counts = [len(order.share(step)[1]) for order in orders]
            ranks = zip(batches, counts, strict=True)
            steps.append([[d.indices for d in islice(own, count)] for own, count in ranks])
    return steps


def reference(case, steps, *, call=None, rate=None, skipped=()):
    """Take steps by ``torch.optim.SGD`` in this process, on the mean loss over samples.

    Args:
        case: Model, data and loss.
        steps: Indices of each micro-batch, by step and rank.
        call: Calls the model with inputs; None: with one argument.
        rate: Gives the learning rate of a step; None: the same for all.
        skipped: Numbers of the steps to leave out.
    """
    model, loss_function = case.build_model(), case.loss()
    if type(model).train is not nn.Module.train:  # it freezes parts of itself
        model.train()
    options = {"momentum": MOMENTUM, "weight_decay": DECAY, "lr": LR}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **options)
    for number, ranks in enumerate(steps):
        if number in skipped:
            continue
        for group in optimizer.param_groups if rate else ():
            group["lr"] = rate(number)
        optimizer.zero_grad()
        accumulate_gradients(case, model, loss_function, ranks, number, call=call)
        optimizer.step()
    return model


def accumulate_gradients(case, model, loss_function, ranks, number, *, call=None):
    """Run the passes of all ranks in a step; the buffers become those of rank 0."""
    call = call or (lambda model, inputs: model(inputs))
    samples = sum(len(indices) for rank in ranks for indices in rank)
    before = copy_buffers(model)
    for rank, batches in reversed(list(enumerate(ranks))):
        put_buffers(model, before)
        seed_all(seed_for("model", 0, number, rank))
        for indices in batches:
            inputs, targets = case.batch(indices)
            loss = loss_function(call(model, inputs), targets)
            loss.backward(torch.full_like(loss, len(indices) / samples))


def score_of(case, model, *, call=None):
    """Compute the loss of all samples at once, in evaluation mode."""
    data = (case.held_out or case.data)()
    inputs, targets = case.batch(range(len(data)), data)
    call = call or (lambda model, inputs: model(inputs))
    model.eval()
    with torch.no_grad():
        return float(case.loss()(call(model, inputs), targets))


def outcome_of(model, **known):
    """Copy the parameters and buffers of a model."""
    return Outcome(
        parameters={name: p.detach().clone() for name, p in model.named_parameters()},
        buffers={name: b.detach().to_dense().clone() for name, b in model.named_buffers()},
        **known,
    )


def copy_buffers(model):
    """Copy the buffers by module and name, since some are replaced or resized."""
    return [
        (module, name, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]


def put_buffers(model, copies):
    """Put copies of the buffers back; those that were made since are removed."""
    known = {(module, name) for module, name, _ in copies}
    for module in model.modules():
        for name in module._buffers.keys():  # noqa: SIM118  # scripted modules have no iterator
            if (module, name) not in known:
                module._buffers[name] = None
    for module, name, buffer in copies:
        module._buffers[name] = None if buffer is None else buffer.clone()


def seed_all(number):
    """Seed all generators as a step of a run does."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number & 0xFFFF_FFFF)


def distance(tensors, expected):
    """Return the largest relative difference of any tensor; numbers below 1 count absolutely."""
    assert tensors.keys() == expected.keys()
    return max((_distance(each, expected[name]) for name, each in tensors.items()), default=0.0)


def _distance(tensor, expected):
    assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    if not tensor.numel():
        return 0.0
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    number, other = (each.to(kind) for each in (tensor, expected))
    far = (number - other).norm() / other.norm().clamp(min=1.0)
    return float("inf") if far.isnan() else float(far)
