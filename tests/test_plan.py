import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from limits import WAIT_S

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.plan import make_plan, micro_batch_sizes

IMAGENET = 1_281_167


def _plan(*, samples=1437, world_size=4, epochs=20, **sections):
    config = RunConfig.model_validate({"epochs": epochs, **sections})
    return make_plan(config, samples=samples, world_size=world_size)


def _goyal(**data):
    """ResNet-50 in one hour: 256 workers with 32 images each, lr 0.1 for 256, 90 epochs."""
    return _plan(
        samples=IMAGENET,
        world_size=256,
        epochs=90,
        data={"batch_size": 32, **data},
        optim={"lr": 0.1, "reference_batch": 256},
        schedule={"name": "step", "milestones": [30.0, 60.0, 80.0], "warmup_epochs": 5.0},
    )


def test_goyal_et_al_2017():
    plan = _goyal()
    assert plan.global_batch == 8192
    assert plan.scale == 32
    assert plan.peak_lr == pytest.approx(3.2)
    assert plan.steps_per_epoch == 157
    assert plan.warmup_steps == 5 * 157
    assert plan.peak_lr * plan.warmup_start == pytest.approx(0.1)
    assert plan.total_steps == 90 * 157
    assert plan.total_samples == 90 * IMAGENET
    assert plan.last_batch == IMAGENET - 156 * 8192 == 3215
    assert plan.smallest_micro_batch == 3215 // 256 == 12


def test_goyal_et_al_2017_with_the_tail_dropped():
    plan = _goyal(tail="drop")
    assert plan.steps_per_epoch == 156
    assert plan.warmup_steps == 5 * 156
    assert plan.samples_per_epoch == 156 * 8192
    assert plan.last_batch == 8192
    assert plan.smallest_micro_batch == 32


def test_auto_warm_up_gives_goyal_et_al_five_epochs():
    config = {"optim": {"lr": 0.1, "reference_batch": 256}, "epochs": 90}
    assert _plan(samples=IMAGENET, world_size=256, **config).warmup_steps == 5 * 157


whole_epochs = st.fixed_dictionaries({"epochs": st.integers(1, 3)})


@st.composite
def runs(draw, lengths=whole_epochs):
    sizes = {
        "samples": draw(st.integers(1, 400)),
        "world_size": draw(st.integers(1, 9)),
    }
    data = {
        "batch_size": draw(st.integers(1, 20)),
        "accumulate": draw(st.integers(1, 5)),
        "tail": draw(st.sampled_from(["exact", "drop"])),
    }
    global_batch = sizes["world_size"] * data["batch_size"] * data["accumulate"]
    assume(data["tail"] == "exact" or sizes["samples"] >= global_batch)
    return _plan(**sizes, data=data, **draw(lengths))


cut_runs = runs(st.fixed_dictionaries({"epochs": st.just(20), "steps": st.integers(1, 60)}))


def _micro_batches(plan, step):
    """Cut a step's samples by hand: deal them to the ranks, then pile up at most b."""
    hands = [list(range(plan.step_samples(step)))[rank :: plan.world_size] for rank in _ranks(plan)]
    return [
        [len(hand[at : at + plan.batch_size]) for at in range(0, len(hand), plan.batch_size)]
        for hand in hands
    ]


def _ranks(plan):
    return range(plan.world_size)


@given(runs())
def test_micro_batches_are_the_strided_share_in_pieces(plan):
    for step in range(plan.steps_per_epoch):
        for rank, expected in enumerate(_micro_batches(plan, step)):
            sizes = micro_batch_sizes(
                plan.step_samples(step), rank, plan.world_size, plan.batch_size
            )
            assert list(sizes) == expected
            assert len(sizes) <= plan.accumulate


@given(runs())
def test_micro_batches_of_all_ranks_and_steps_add_up_to_an_epoch(plan):
    total = sum(
        sum(micro_batch_sizes(plan.step_samples(step), rank, plan.world_size, plan.batch_size))
        for step in range(plan.steps_per_epoch)
        for rank in _ranks(plan)
    )
    assert total == plan.samples_per_epoch
    if plan.tail == "exact":
        assert total == plan.samples
    else:
        assert 0 <= plan.samples - total < plan.global_batch


@given(runs())
def test_smallest_micro_batch_is_that_of_all_ranks_and_steps(plan):
    everything = [
        size
        for step in range(plan.steps_per_epoch)
        for sizes in _micro_batches(plan, step)
        for size in sizes or [0]
    ]
    assert plan.smallest_micro_batch == min(everything)


@given(runs())
def test_steps_samples_and_epochs_are_consistent(plan):
    seen = 0
    for step in range(plan.total_steps):
        assert plan.samples_at(step) == seen
        assert plan.epoch_at(step) == seen / plan.samples_per_epoch
        last_of_epoch = (step + 1) % plan.steps_per_epoch == 0
        size = plan.step_samples(step)
        assert size == (plan.last_batch if last_of_epoch else plan.global_batch)
        seen += size
    assert seen == plan.samples_at(plan.total_steps) == plan.total_samples
    assert plan.epoch_at(plan.total_steps) == plan.epochs


@given(runs())
def test_numbers_of_a_run_follow_from_those_of_an_epoch(plan):
    assert plan.global_batch == plan.world_size * plan.accumulate * plan.batch_size
    assert plan.total_steps == plan.epochs * plan.steps_per_epoch
    assert plan.total_samples == plan.epochs * plan.samples_per_epoch
    assert 1 <= plan.last_batch <= plan.global_batch
    assert 0 <= plan.warmup_steps <= plan.total_steps
    assert 0 < plan.warmup_start <= 1


@given(cut_runs)
def test_a_run_of_some_steps_is_the_beginning_of_one_of_whole_epochs(plan):
    whole = replace(
        plan,
        total_steps=plan.epochs * plan.steps_per_epoch,
        total_samples=plan.epochs * plan.samples_per_epoch,
    )
    assert whole.total_steps - plan.steps_per_epoch < plan.total_steps <= whole.total_steps
    sizes = [whole.step_samples(step) for step in range(plan.total_steps)]
    assert [plan.step_samples(step) for step in range(plan.total_steps)] == sizes
    assert plan.total_samples == sum(sizes) == plan.samples_at(plan.total_steps)
    assert plan.passes == plan.total_samples / plan.samples_per_epoch
    assert plan.epochs - 1 < plan.passes <= plan.epochs


@given(cut_runs)
def test_smallest_micro_batch_of_a_run_of_some_steps_is_one_that_it_takes(plan):
    everything = [
        size
        for step in range(min(plan.total_steps, plan.steps_per_epoch))
        for sizes in _micro_batches(plan, step)
        for size in sizes or [0]
    ]
    assert plan.smallest_micro_batch == min(everything)


@given(cut_runs)
def test_ranks_meet_at_the_end_of_epochs_and_of_the_run(plan):
    local = replace(plan, world_size=2, local_start=0, local_period=10**6)
    ends = {*range(0, plan.total_steps, plan.steps_per_epoch), plan.total_steps}
    assert {step for step in range(plan.total_steps + 1) if local.ranks_sync_at(step)} == ends


def test_auto_warm_up_of_a_run_of_some_steps_is_a_tenth_of_it():
    assert _plan(steps=100).warmup_steps == 10
    assert _plan(steps=10_000).warmup_steps == 5 * 12


def test_warm_up_in_steps():
    assert _plan(schedule={"warmup_steps": 7}).warmup_steps == 7
    assert _plan(schedule={"warmup_steps": 0}).warmup_steps == 0


@pytest.mark.parametrize(
    ("scaling", "peak"), [("linear", 0.05 * 9), ("sqrt", 0.05 * 3), ("none", 0.05)]
)
def test_rules_of_scaling(scaling, peak):
    plan = _plan(world_size=9, optim={"scaling": scaling})
    assert plan.scale == 9
    assert plan.peak_lr == pytest.approx(peak)
    assert plan.peak_lr * plan.warmup_start == pytest.approx(plan.base_lr)


def test_rate_is_quoted_for_the_batch_of_one_rank_unless_said():
    data = {"batch_size": 16, "accumulate": 2}
    plan = _plan(data=data)
    assert (plan.reference_batch, plan.scale) == (32, 4)
    plan = _plan(data=data, optim={"reference_batch": 64})
    assert (plan.reference_batch, plan.scale) == (64, 2)


def test_batch_below_the_reference_lowers_the_rate_and_starts_at_the_peak():
    plan = _plan(world_size=1, optim={"reference_batch": 64})
    assert plan.scale == 0.5
    assert plan.peak_lr == pytest.approx(0.025)
    assert (plan.warmup_steps, plan.warmup_start) == (0, 1.0)


@pytest.mark.parametrize(
    ("world_size", "epochs", "name", "epochs_of_warm_up"),
    [
        (1, 100, "cosine", 0),  # k = 1
        (4, 100, "cosine", 5),
        (4, 50, "cosine", 5),
        (4, 20, "cosine", 2),  # a tenth of the run
        (4, 100, "one_cycle", 0),  # has its own rise
    ],
)
def test_auto_warm_up_is_five_epochs_or_a_tenth_when_k_is_above_one(
    world_size, epochs, name, epochs_of_warm_up
):
    plan = _plan(world_size=world_size, epochs=epochs, schedule={"name": name})
    assert plan.warmup_steps == epochs_of_warm_up * plan.steps_per_epoch


def test_warm_up_as_asked():
    plan = _plan(schedule={"warmup_epochs": 1.5, "warmup_start": 0.3})
    assert plan.steps_per_epoch == 12
    assert (plan.warmup_steps, plan.warmup_start) == (18, 0.3)
    assert _plan(world_size=1, schedule={"warmup_epochs": 1.0}).warmup_steps == 45


def test_a_rank_may_be_empty():
    plan = _plan(samples=3)
    assert plan.steps_per_epoch == 1
    assert plan.smallest_micro_batch == 0
    assert [micro_batch_sizes(3, rank, 4, 32) for rank in range(4)] == [(1,), (1,), (1,), ()]


def test_no_sample_is_a_data_error():
    with pytest.raises(DataError, match=r"data\.train is empty; name a data set"):
        _plan(samples=0)


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 5), st.integers(1, 100))
def test_too_large_a_batch_to_drop_the_tail_names_one_that_fits(
    samples, world_size, accumulate, batch_size
):
    assume(samples < world_size * accumulate * batch_size)
    data = {"accumulate": accumulate, "batch_size": batch_size, "tail": "drop"}
    with pytest.raises(ConfigError, match=r"^data\.tail is drop while the global batch") as caught:
        _plan(samples=samples, world_size=world_size, data=data)
    if suggested := re.search(r"data\.batch_size=(\d+) or less", str(caught.value)):
        size = int(suggested[1])
        data["batch_size"] = size
        assert _plan(samples=samples, world_size=world_size, data=data).steps_per_epoch >= 1
        data["batch_size"] = size + 1
        with pytest.raises(ConfigError):  # it was the largest
            _plan(samples=samples, world_size=world_size, data=data)
    else:
        assert samples < world_size * accumulate
        assert "use fewer ranks" in str(caught.value)


@pytest.mark.parametrize("optim", [{"lr": 1e308}, {"lr": 5e-324, "reference_batch": 10**6}])
def test_peak_rate_that_is_no_number_is_refused(optim):
    with pytest.raises(ConfigError, match=r"^optim\.lr is .*; choose a rate") as caught:
        _plan(world_size=64, optim=optim)
    assert str(optim["lr"]) in str(caught.value)


def test_peak_rate_is_finite_at_the_edge():
    plan = _plan(world_size=64, optim={"lr": 1e306})
    assert math.isfinite(plan.peak_lr)


@given(
    samples=st.integers(1, 500),
    global_batch=st.integers(1, 64),
    world_size=st.integers(1, 9),
    batch=st.integers(1, 16),
    tail=st.sampled_from(["exact", "drop"]),
    step=st.integers(0, 1000),
)
def test_places_and_steps_lead_back_to_each_other(
    samples, global_batch, world_size, batch, tail, step
):
    assume(tail == "exact" or samples >= global_batch)
    config = RunConfig(data={"batch_size": batch, "tail": tail})
    plan = make_plan(config, samples=samples, world_size=world_size, kept=(global_batch, 8))
    assert (plan.global_batch, plan.reference_batch) == (global_batch, 8)
    epoch, position = plan.place_at(step)
    assert plan.step_at(epoch, position) == (step, 0)
    assert plan.samples_at(step) == epoch * plan.samples_per_epoch + position
    most = max(
        len(micro_batch_sizes(global_batch, rank, world_size, batch)) for rank in range(world_size)
    )
    assert plan.accumulate == most


def test_a_place_in_the_tail_that_is_dropped_belongs_to_the_next_epoch():
    config = RunConfig(data={"batch_size": 8, "tail": "drop"})
    plan = make_plan(config, samples=30, world_size=1)
    assert plan.step_at(2, 23) == (8, 7)
    assert plan.step_at(2, 24) == plan.step_at(2, 29) == (9, 0)


def test_plan_needs_no_torch():
    program = "import ddp_sgd.plan, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=WAIT_S)
