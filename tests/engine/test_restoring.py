import pytest
import torch
from torch import nn

from ddp_sgd.checkpointing.store import SkippedSteps
from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers
from ddp_sgd.engine.resume import plan_from, state_from
from ddp_sgd.engine.train_state import (
    State,
    describe_loss,
    model_misfits,
    refuse_misfit,
    restore,
    restore_buffers,
    run_state_dict,
)
from ddp_sgd.errors import ExitCode, RefusedError
from ddp_sgd.models import MLP
from ddp_sgd.optim.sgd import build_sgd
from ddp_sgd.plan import make_plan

LOSS = describe_loss(nn.CrossEntropyLoss())


def saved(step, *, world_size=2, samples=100, scored_at=0, model=None, **changes):
    """A state of a run with steps of 2 x 4 samples: 13 per epoch, the last with 4."""
    config = RunConfig(**{"data": {"batch_size": 4}, "epochs": 3} | changes)
    plan = make_plan(config, samples=samples, world_size=world_size)
    model = model or MLP(3, [5], 2)
    return run_state_dict(
        State(step=step, scored_at=scored_at, skipped=SkippedSteps(3, 1, 2)),
        model=model,
        optimizer=build_sgd(model, momentum=0.9),
        plan=plan,
        config=config.model_dump(mode="json"),
        run_id="cafe0123",
        loss=LOSS,
    )


def resumed(header, world_size, **changes):
    config = RunConfig(**{"data": {"batch_size": 4}, "epochs": 3} | changes)
    return plan_from(config, header, samples=100, world_size=world_size)


def test_a_run_without_a_past_begins_at_step_0():
    plan = resumed(None, 2)
    assert plan == make_plan(RunConfig(data={"batch_size": 4}, epochs=3), samples=100, world_size=2)
    assert state_from(None, plan) == (State(), 0)


@pytest.mark.parametrize("step", [0, 1, 12, 13, 14, 38, 39])
def test_on_the_same_ranks_the_plan_and_the_place_are_the_same(step):
    header, _ = saved(step)
    plan = resumed(header, 2)
    assert plan == make_plan(RunConfig(data={"batch_size": 4}, epochs=3), samples=100, world_size=2)
    state, skip = state_from(header, plan)
    assert (state.step, skip, state.skipped) == (step, 0, (3, 1, 2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [1, 12, 13, 30])
def test_other_ranks_keep_batches_schedule_and_rate(step, world_size):
    header, _ = saved(step)
    plan, before = resumed(header, world_size), resumed(header, 2)
    for name in (
        "global_batch", "steps_per_epoch", "total_steps", "reference_batch", "scale", "peak_lr",
        "warmup_steps", "warmup_start", "samples_before",
    ):  # fmt: skip
        assert getattr(plan, name) == getattr(before, name), name
    assert plan.accumulate == {1: 2, 2: 1, 3: 1, 5: 1}[world_size]
    assert state_from(header, plan) == state_from(header, before)


@pytest.mark.parametrize("tail", ["exact", "drop"])
@pytest.mark.parametrize("world_size", [1, 3, 4, 8])
@pytest.mark.parametrize("step", [1, 5, 12, 13, 20])
def test_a_rescaled_plan_goes_on_at_the_same_sample(step, world_size, tail):
    changes = {"on_resize": "rescale", "data": {"batch_size": 4, "tail": tail}}
    header, _ = saved(step, **changes)
    plan = resumed(header, world_size, **changes)
    state, skip = state_from(header, plan)
    assert plan.global_batch == 4 * world_size
    epoch, position = plan.place_at(state.step)
    if (epoch, position + skip) != (header.epoch, header.position):  # it lay in the new tail
        assert (tail, epoch, position, skip) == ("drop", header.epoch + 1, 0, 0)
        assert header.position >= plan.samples_per_epoch
    assert plan.samples_at(state.step) + skip == header.samples
    assert plan.samples_at(state.step + 1) > header.samples


def test_a_run_that_must_not_be_resized():
    header, _ = saved(5)
    with pytest.raises(RefusedError, match="saved on 2 ranks while there are 3") as caught:
        resumed(header, 3, on_resize="refuse")
    assert caught.value.exit_code == ExitCode.REFUSED
    resumed(header, 2, on_resize="refuse")


@pytest.mark.parametrize(
    ("step", "scored_at", "due"), [(13, 13, False), (13, 0, True), (5, 0, True), (26, 13, True)]
)
def test_an_evaluation_that_was_cut_short_is_done_on_resume(step, scored_at, due):
    header, _ = saved(step, scored_at=scored_at)
    plan = resumed(header, 2)
    state, _ = state_from(header, plan)
    assert (state.scored_at != state.step) is due


def test_in_the_middle_of_a_new_step_there_is_nothing_to_score():
    changes = {"on_resize": "rescale", "data": {"batch_size": 4}}
    header, _ = saved(14, **changes)  # 8 samples into the second epoch
    plan = resumed(header, 5, **changes)
    state, skip = state_from(header, plan)
    assert (state.step, skip, state.scored_at) == (5, 8, 5)


def test_what_differs_is_listed():
    model = MLP(3, [5], 2)
    header, tensors = saved(5, model=model)
    refuse_misfit(header, tensors, MLP(3, [5], 2), samples=100, loss=LOSS)
    with pytest.raises(RefusedError) as caught:
        refuse_misfit(header, tensors, MLP(3, [6], 2), samples=99, loss="other()")
    text = str(caught.value)
    names = [name for name, _ in model.named_parameters()]
    assert f"{names[0]} was float32 (5, 3), is float32 (6, 3)" in text
    assert f"{names[2]} was float32 (2, 5), is float32 (2, 6)" in text
    assert "data.train had 100 samples, has 99" in text
    assert f"the loss was {LOSS}, is other()" in text
    assert caught.value.exit_code == ExitCode.REFUSED
    with pytest.raises(RefusedError, match=r"was float32 .*, is float64"):
        refuse_misfit(header, tensors, MLP(3, [5], 2).double(), samples=100, loss=LOSS)
    with pytest.raises(RefusedError, match=r"is absent.* was absent, is float32"):
        refuse_misfit(header, tensors, nn.Linear(3, 2), samples=100, loss=LOSS)


def test_weights_and_momentum_come_back_bit_by_bit():
    torch.manual_seed(0)
    model = MLP(3, [5], 2)
    optimizer = build_sgd(model, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step(0.1)
    plan = make_plan(RunConfig(), samples=100, world_size=1)
    _, tensors = run_state_dict(
        State(3),
        model=model,
        optimizer=optimizer,
        plan=plan,
        config=RunConfig().model_dump(mode="json"),
        run_id="",
        loss="",
    )
    other = MLP(3, [5], 2)
    restore(other, tensors)
    # Other groups, as where decay is spread differently: names, not positions, lead back.
    again = build_sgd(other, momentum=0.9, decay_norm_and_bias=True)
    again.load_state_dict(tensors["optimizer"])
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    before, now = (each.state_dict()["momentum_buffer"] for each in (optimizer, again))
    assert list(before) == list(now)
    assert all(map(torch.equal, before.values(), now.values()))
    assert all(buffer.abs().sum() > 0 for buffer in before.values())


class Ranges(nn.Module):
    """Buffers that get their size in use, as those of observers do."""

    def __init__(self, size=0):
        super().__init__()
        self.register_buffer("low", torch.arange(float(size)))
        self.register_buffer("moving", torch.full((2,), float(size)), persistent=False)


class Resizing(nn.Linear):
    """Loads its scale in its own way, as torch's fake quantization does."""

    def __init__(self, size=1):
        super().__init__(2, 2)
        self.register_buffer("scale", torch.full((size,), 3.0))

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        self.scale.resize_(state_dict[f"{prefix}scale"].shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def saved_state(model, **others):
    return {"model": model.state_dict(), "cursor": {"step": 7}, **others}


@pytest.mark.parametrize("kind", [Ranges, Resizing])
def test_a_buffer_that_gets_its_size_in_use_comes_back(kind):
    was, now = nn.Sequential(kind(4)), nn.Sequential(kind())
    assert model_misfits(was.state_dict(), now) == []
    restore(now, saved_state(was))
    assert all(map(torch.equal, was.state_dict().values(), now.state_dict().values()))


def test_a_module_that_does_not_take_its_state_back():
    class Stubborn(Resizing):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *rest):
            rest[2].append("no, thank you")

    with pytest.raises(RefusedError, match=r"of step 7 is of another run: .*no, thank you"):
        restore(Stubborn(), saved_state(Stubborn()))


def restored(saved, model, loss, places):
    buffers = TrainingBuffers(places, [], Runtime())
    restore_buffers(model, {"loss": loss}, buffers, saved_state(model, **saved))


def test_buffers_that_the_state_lacks_come_back():
    model, loss = Ranges(), nn.CrossEntropyLoss(weight=torch.ones(2))
    saved = {"buffers": {"moving": torch.ones(2), "gone": torch.ones(1)}}
    restored(saved, model, loss, [(model, "moving")])
    assert model.moving.tolist() == [1, 1]
    restored({}, model, loss, [(model, "moving")])  # of a release that did not save them
    assert model.moving.tolist() == [1, 1]


def test_a_loss_with_other_values_is_another_one():
    model, loss = Ranges(), nn.CrossEntropyLoss(weight=torch.ones(2))
    saved = {"loss_buffers": {"loss.weight": torch.tensor([1.0, 2.0])}}
    with pytest.raises(RefusedError, match=r"step 7 is .*loss.weight of the loss had other values"):
        restored(saved, model, loss, [])
    restored(saved, model, loss, [(loss, "weight")])  # a state that steps change
    assert loss.weight.tolist() == [1, 2]
    restored(saved, model, loss, [])
