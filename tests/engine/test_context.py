"""The state dict of a context puts another context where the first one is."""

import torch
from gathered import context_of, gather

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.resume import ResumePoint
from ddp_sgd.tree import leaves

CONFIG = RunConfig.model_validate(
    {"epochs": 2, "compute": {"precision": "fp16"}, "data": {"eval": None}}
)


def build():
    point = ResumePoint(run_id="test")
    return context_of(CONFIG, gather(CONFIG, train_set=Digits()), Runtime(), point)


def take(context, steps):
    for batches in context.loader.from_step(context.state.step):
        context.randomness.seed(batches.step)
        context.stepper.step(batches, 0.1)
        context.state.step += 1
        if context.state.step == steps:
            break


def copies(tree):
    return [
        (path, leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)
        for path, leaf in leaves(tree)
    ]


def test_a_context_goes_on_from_the_state_dict_of_another():
    first, second = build(), build()
    take(first, 3)
    header, tree = first.state_dict()
    assert (header.step, header.samples) == (3, 96)
    assert set(tree) == {"model", "optimizer", "loss_scale"}
    second.wrapper.inner.load_state_dict(tree["model"])
    second.load_state_dict(tree)
    second.state.step = header.step
    for context in (first, second):
        take(context, 6)
    one, other = (copies(context.state_dict()[1]) for context in (first, second))
    assert [path for path, _ in one] == [path for path, _ in other]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def test_a_peek_at_the_next_steps_takes_none():
    context = build()
    first, *others = context.peek()
    assert (first.step, len(others)) == (0, 7)
    kept = first.micro_batches[0].inputs.clone()
    take(context, 2)
    assert torch.equal(first.micro_batches[0].inputs, kept)
    assert next(context.peek()).step == 2
