"""Batch normalization and short steps; with real ranks in tests/distributed/test_resume.py."""

import pytest
import torch
from torch import nn

from ddp_sgd.config import RunConfig
from ddp_sgd.data.sampler import TrainSampler
from ddp_sgd.engine.model_check import check_normalization
from ddp_sgd.errors import ConfigError, ExitCode
from ddp_sgd.models import ConvNet
from ddp_sgd.plan import make_plan

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
SYNCHRONIZED = nn.SyncBatchNorm(3)
SEPARATE = nn.BatchNorm1d(3)


def plan_of(samples, world_size=1, *, kept=None, **data):
    config = RunConfig(data=data, epochs=2)
    return make_plan(config, samples=samples, world_size=world_size, kept=kept)


def check(model, plan, step=0, skip=0, device=CUDA):
    check_normalization(model, plan, step=step, skip=skip, device=device)


def refused(model, plan, step=0, skip=0, device=CUDA):
    with pytest.raises(ConfigError) as caught:
        check(model, plan, step, skip, device)
    assert caught.value.exit_code == ExitCode.CONFIG == 64
    return str(caught.value)


@pytest.mark.parametrize(
    ("samples", "tail", "model", "fits"),
    [
        (65, "exact", ConvNet(batch_norm=True), False),  # 64, then 1
        (65, "drop", ConvNet(batch_norm=True), True),
        (66, "exact", ConvNet(batch_norm=True), True),
        (65, "exact", ConvNet(), True),
        (65, "exact", SYNCHRONIZED, False),  # on one rank it is like any other
        (66, "exact", SYNCHRONIZED, True),
    ],
)
def test_normalization_needs_two_samples(samples, tail, model, fits):
    plan = plan_of(samples, tail=tail, batch_size=64)
    if fits:
        check(model, plan)
        return
    assert refused(model, plan) == (
        "data.batch_size is 64 with world size 1, so that a forward pass in the last step of an "
        "epoch has as few samples as 1, too few for the batch normalization of "
        f"{type(model).__name__}; set data.tail=drop, or another data.batch_size of at least 2."
    )


@pytest.mark.parametrize(
    ("samples", "tail", "fits"),
    [(64, "exact", True), (65, "exact", False), (73, "exact", False), (73, "drop", True)],
)
def test_synchronized_normalization_needs_all_ranks_in_each_pass(samples, tail, fits):
    """Of 65 samples in steps of 16 one is left, for one of two ranks; of 73, nine: 4 + 1 and 4."""
    plan = plan_of(samples, 2, batch_size=4, accumulate=2, tail=tail)
    if fits:
        check(SYNCHRONIZED, plan)
    else:
        assert "synchronized batch normalization of SyncBatchNorm" in refused(SYNCHRONIZED, plan)


def test_a_run_that_ends_before_the_last_step_of_an_epoch_does_not_take_it():
    config = RunConfig(data={"batch_size": 64}, steps=1)
    check(SEPARATE, make_plan(config, samples=65, world_size=1))
    config = RunConfig(data={"batch_size": 64}, steps=2)
    assert "the last step of an epoch" in refused(
        SEPARATE, make_plan(config, samples=65, world_size=1)
    )


def test_without_a_full_step_there_is_no_other_than_the_last():
    """Dropped, it would leave no step."""
    said = refused(SEPARATE, plan_of(3, 2, batch_size=64))
    assert said.endswith("; set another data.batch_size of at least 2.")
    check(SEPARATE, plan_of(4, 2, batch_size=64))


def test_a_full_step_of_single_samples():
    said = refused(SEPARATE, plan_of(4, 2, batch_size=1))
    assert "a forward pass in a full step has as few samples as 1" in said
    assert said.endswith("; set data.batch_size to at least 2.")


def test_a_full_step_that_the_ranks_of_today_do_not_divide():
    """A global batch of 8 was kept: three ranks take 3, 3 and 2, in passes of at most 2."""
    plan = plan_of(80, 3, kept=(8, 4), batch_size=2, accumulate=2)
    said = refused(SYNCHRONIZED, plan, step=5)
    assert "in a full step some ranks have 2 forward passes and others 1" in said
    ranks = "go on with the data.batch_size and the number of ranks of the checkpoint."
    assert said.endswith(ranks)
    said = refused(SEPARATE, plan, step=5)
    assert "a forward pass in a full step has as few samples as 1" in said
    assert said.endswith(ranks)


@pytest.mark.parametrize(
    ("model", "skip", "told"),
    [
        (SEPARATE, 12, None),  # two samples for each of two ranks
        (SEPARATE, 13, "has as few samples as 1"),
        (SEPARATE, 15, "has as few samples as 0"),
        (SYNCHRONIZED, 8, None),
        (SYNCHRONIZED, 7, "some ranks have 2 forward passes and others 1"),
        (SYNCHRONIZED, 13, None),  # two samples and one, normalized together
        (SYNCHRONIZED, 15, "some ranks have 1 forward passes and others 0"),
    ],
)
def test_the_first_step_after_a_resume(model, skip, told):
    """Steps of 2 x 8 samples, of which some were trained with another batch size."""
    plan = plan_of(64, 2, batch_size=4, accumulate=2)
    check(model, plan, step=1)
    if told is None:
        check(model, plan, step=1, skip=skip)
        return
    said = refused(model, plan, step=1, skip=skip)
    assert "in the first step after the resume " in said
    assert told in said
    assert said.endswith(
        "; go on with the data.batch_size and the number of ranks of the checkpoint until the end "
        "of the epoch."
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("tail", ["exact", "drop"])
def test_it_refuses_what_some_rank_would_meet_and_nothing_else(tail, world_size):
    """By the passes that the order of samples gives each rank in every step of two epochs."""
    seen = {True: 0, False: 0}
    for samples in range(8 * world_size, 8 * world_size + 9):
        plan = plan_of(samples, world_size, batch_size=2, accumulate=2, tail=tail)
        for step in range(plan.steps_per_epoch):
            for skip in range(plan.step_samples(step)):
                passes = list(_passes(plan, step, skip))
                small = any(min(sizes) < 2 for ranks in passes for sizes in ranks)
                ragged = any(len(set(map(_count, ranks))) > 1 for ranks in passes)
                for model, bad in (
                    (SEPARATE, small),
                    (SYNCHRONIZED, ragged if world_size > 1 else small),
                ):
                    seen[bad] += 1
                    if bad:
                        refused(model, plan, step, skip)
                    else:
                        check(model, plan, step, skip)
    assert min(seen.values()) > 10


def _passes(plan, first, skip):
    """Sizes of the micro-batches of each rank, in each step from one on, through an epoch more."""
    orders = [
        TrainSampler(
            plan.samples,
            global_batch=plan.global_batch,
            batch_size=plan.batch_size,
            rank=rank,
            world_size=plan.world_size,
            tail=plan.tail,
        )
        for rank in range(plan.world_size)
    ]
    for epoch, (step, skipped) in enumerate(((first, skip), (0, 0))):
        for order in orders:
            order.set_epoch(epoch, step, skipped)
        for each in range(step, plan.steps_per_epoch):
            yield [order.share(each)[1] for order in orders]


def _count(sizes):
    """Passes of a rank with real samples."""
    return sum(size > 0 for size in sizes)


def test_what_is_frozen_needs_no_batch():
    plan = plan_of(65, 2, batch_size=1)
    for layer in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3)):
        refused(nn.Sequential(layer), plan)
        check(nn.Sequential(layer.eval()), plan)
    for kind in (nn.BatchNorm1d, nn.SyncBatchNorm):  # without statistics it uses those of the batch
        refused(kind(3, track_running_stats=False).eval(), plan)


def test_synchronized_normalization_needs_gpus():
    plan = plan_of(64, 2, batch_size=4)
    check(SYNCHRONIZED, plan)
    assert refused(SYNCHRONIZED, plan, device=CPU) == (
        "runtime.device is cpu with world size 2, while torch has the SyncBatchNorm of "
        "SyncBatchNorm on GPUs only; use BatchNorm, or GPUs."
    )
    check(SYNCHRONIZED, plan_of(64, 1, batch_size=4), device=CPU)  # where it is like any other
    check(SEPARATE, plan, device=CPU)


def test_layers_that_look_at_one_sample_need_no_other():
    plan = plan_of(5, 1, batch_size=1)
    for layer in (nn.InstanceNorm1d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3)):
        check(layer, plan)
