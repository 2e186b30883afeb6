import pytest

from ddp_sgd.config.schema import ComputeConfig, RunConfig
from ddp_sgd.config.sections import DataConfig
from ddp_sgd.optim.schedule import build_schedule
from ddp_sgd.plan import OrderFacts, make_plan
from ddp_sgd.report.plan_table import plan_lines, plan_table, update_words

HALVES = {"class_path": "user_code.decay_by_halves", "call": False}

GOLDEN = """\
Batches
  training samples, n   1,437
  ranks, W              5
  micro-batch, b        10 on one rank in one pass
  accumulate, A         3 micro-batches of one rank in one step
  rank batch, A b       30 on one rank in one step
  global batch, W A b   150 in one step

Steps
  an epoch              10 steps (1,437 samples)
  30 epochs             300 steps (43,110 samples)
  tail (exact)          the last step of an epoch has 87 samples
                        ranks 0 to 1: 18 samples each (1 x 10 + 8)
                        ranks 2 to 4: 17 samples each (1 x 10 + 7)
                        smallest micro-batch of the run: 7 samples

Learning rate
  base                  0.05 for 30 samples per step
  k                     5 = 150 / 30
  rule                  linear: peak = base x k
  peak                  0.25 for 150 samples per step
  schedule              step
  warm-up               30 steps (4,311 samples, 3 of 30 epochs) from 0.05

Computation
  precision             fp32 (torch's defaults; on CUDA, TF32 in convolutions)

Rate over the run
  step   epoch   samples before     rate
     0    0.00                0     0.05
    30    3.00            4,311     0.25
    60    6.00            8,622     0.25
    90    9.00           12,933     0.25
   120   12.00           17,244    0.025
   150   15.00           21,555    0.025
   180   18.00           25,866    0.025
   210   21.00           30,177   0.0025
   240   24.00           34,488   0.0025
   270   27.00           38,799   0.0025
   299   29.94           43,023   0.0025"""

GOLDEN_LINES = [
    "precision fp32 (torch's defaults; on CUDA, TF32 in convolutions)",
    "batch     5 ranks x 3 micro-batches x 10 = 150 samples per step; the data set has 1,437",
    "steps     10 per epoch, 300 in 30 epochs; the last step of an epoch has 87 samples",
    "rate      0.05 for 30 samples -> 0.25 for 150 (linear, k = 5)",
    "schedule  step; warm-up: 30 steps (4,311 samples, 3 of 30 epochs) from 0.05",
]


def _plan(*, samples=1437, world_size=4, **sections):
    config = RunConfig.model_validate(sections)
    plan = make_plan(config, samples=samples, world_size=world_size)
    return plan, build_schedule(config.schedule, plan), config.schedule.milestones


def _accumulating():
    return _plan(
        world_size=5,
        epochs=30,
        data={"accumulate": 3, "batch_size": 10},
        schedule={"name": "step", "milestones": [10.0, 20.0]},
    )


def _lines(parts):
    plan, _, milestones = parts
    return plan_lines(plan, milestones)


def test_table_word_for_word():
    assert plan_table(*_accumulating()) == GOLDEN


def test_lines_word_for_word():
    assert _lines(_accumulating()) == GOLDEN_LINES


def _folded(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"schedule": {"by": "epoch"}}, "cosine, by epoch"),
        ({"schedule": {"curve": HALVES}}, "user_code.decay_by_halves"),
        ({"schedule": {"warmup_steps": 5, "warmup": "shift"}}, "then the schedule begins"),
        ({"schedule": {"warmup_steps": 5, "warmup": "replace"}}, "in place of the schedule"),
        ({"schedule": {"warmup_steps": 5, "momentum_start": 0.5}}, "0.5 -> 0.9 over 5 steps"),
    ],
)
def test_what_a_schedule_has_beside_its_name(sections, words):
    parts = _plan(epochs=3, **sections)
    assert words in _folded(plan_table(*parts))
    assert words in " ".join(_lines(parts))
    assert words not in _folded(plan_table(*_plan(epochs=3)))


def test_a_run_of_some_steps_has_a_part_of_an_epoch():
    parts = _plan(steps=30, schedule={"warmup_steps": 5})
    (line,) = [line for line in _lines(parts) if line.startswith("steps")]
    start, *_ = line.split(";")
    assert start == "steps     12 per epoch, 30 in 2.534 epochs"
    table = plan_table(*parts)
    assert "  2.534 epochs          30 steps (3,642 samples)\n" in table
    assert "5 steps (640 samples, 0.4454 of 2.534 epochs) from" in _folded(table)
    assert table.splitlines()[-1].split() == ["29", "2.45", "3,514", "0.00054781"]


def test_a_run_that_ends_in_its_first_epoch_has_no_last_step_of_one():
    table = plan_table(*_plan(steps=3))
    assert "every step is full" in table
    assert "the last step of an epoch" not in table
    assert "smallest micro-batch of the run: 32 samples" in table


def test_milestones_that_shift_beyond_the_end_are_noted():
    section = {"name": "step", "milestones": [2.0], "warmup_epochs": 1, "warmup": "shift"}
    note = "milestones [2] are not reached in 3 epochs"
    assert note in plan_table(*_plan(epochs=3, schedule=section))
    assert note not in plan_table(*_plan(epochs=3, schedule=section | {"warmup": "multiply"}))


@pytest.mark.parametrize(
    ("sizes", "data", "phrases"),
    [
        (
            {"samples": 1437},
            {},
            [
                "the last step of an epoch has 29 samples",
                "rank 0: 8 samples (1 x 8)",
                "ranks 1 to 3: 7 samples each (1 x 7)",
                "smallest micro-batch of the run: 7 samples",
            ],
        ),
        ({"samples": 1280}, {}, ["every step is full", "smallest micro-batch of the run: 32"]),
        ({"samples": 1437}, {"tail": "drop"}, ["29 samples of each epoch left out"]),
        (
            {"samples": 10, "world_size": 64},
            {},
            [
                "ranks 0 to 9: 1 sample each (1 x 1)",
                "ranks 10 to 63: no sample",
                "note: 54 of 64 ranks idle in that step, which stays exact",
                "note: no step fills the global batch, for which the rate is scaled",
            ],
        ),
        (
            {"samples": 37, "world_size": 2},
            {"accumulate": 4, "batch_size": 5},
            ["rank 0: 19 samples (3 x 5 + 4)", "rank 1: 18 samples (3 x 5 + 3)"],
        ),
        (
            {"samples": 30, "world_size": 3},
            {"accumulate": 4, "batch_size": 5},
            ["ranks 0 to 2: 10 samples each (2 x 5)"],
        ),
    ],
)
def test_table_says_what_the_tail_does(sizes, data, phrases):
    text = plan_table(*_plan(**sizes, data=data))
    for phrase in phrases:
        assert phrase in text


def test_full_steps_have_no_note():
    text = plan_table(*_plan(samples=1280))
    assert "note" not in text
    assert "rank 0" not in text


@pytest.mark.parametrize(
    ("scaling", "rule"),
    [
        ("linear", "linear: peak = base x k"),
        ("sqrt", "sqrt: peak = base x sqrt(k)"),
        ("none", "none: peak = base"),
    ],
)
def test_table_names_the_rule(scaling, rule):
    assert rule in plan_table(*_plan(optim={"scaling": scaling}))


def test_a_ramp_from_the_peak_to_the_peak_is_no_warm_up():
    plan, schedule, _ = _plan(optim={"scaling": "none"})
    assert plan.warmup_steps > 0
    assert plan_lines(plan, ())[-1] == "schedule  cosine; warm-up: none"
    assert schedule(0) == 1


@pytest.mark.parametrize(
    ("epochs", "late"),
    [(90, ""), (81, ""), (80, "80"), (31, "60, 80"), (30, "30, 60, 80"), (5, "30, 60, 80")],
)
def test_milestones_beyond_the_end_are_noted(epochs, late):
    schedule = {"name": "step", "milestones": [30, 60, 80], "warmup_epochs": 5}
    parts = _plan(epochs=epochs, schedule=schedule)
    wanted = f"milestones [{late}] are not reached in {epochs} epochs"
    lines, table = _lines(parts), plan_table(*parts)
    assert lines[5:] == ([f"note      {wanted}"] if late else [])
    assert (f"note {wanted}" in " ".join(table.split())) == bool(late)
    assert max(map(len, table.splitlines())) <= 80


def _listed(*names):
    return [{"class_path": f"package.module.{name}"} for name in names]


@pytest.mark.parametrize(
    ("data", "line", "rows"),
    [
        ({}, None, []),
        ({"train_transforms": _listed("A", "B")}, "A, B", ["transforms A, B"]),
        ({"eval_transforms": _listed("B")}, "evaluation: B", ["transforms evaluation: B"]),
        (
            {"train_transforms": _listed("A", "B", "A"), "eval_transforms": _listed("B")},
            "A, B, A; evaluation: B",
            ["transforms A, B, A", "evaluation: B"],
        ),
    ],
)
def test_transforms_are_named(data, line, rows):
    plan, factors, milestones = _plan()
    lines = plan_lines(plan, milestones, data=DataConfig(**data))
    assert lines[5:] == ([f"transform {line}"] if line else [])
    table = plan_table(plan, factors, milestones, data=DataConfig(**data))
    batches = table.partition("\n\nSteps")[0].splitlines()
    assert [" ".join(row.split()) for row in batches[7:]] == rows


def test_several_held_out_sets_and_a_test_set_are_named():
    plan, factors, milestones = _plan()
    (one, two) = _listed("A", "B")
    sets = "eval/b, eval/a; the best checkpoint by eval/b"
    best = "test, once at the end, with the weights of the best checkpoint"
    for data, words in (
        ({"eval": one}, []),
        ({"eval": {"b": one}}, ["eval/b; the best checkpoint by eval/b"]),
        ({"eval": {"b": one, "a": two}}, [sets]),
        ({"eval": {"b": one, "a": two}, "test": two}, [sets, best]),
        ({"eval": None, "test": two}, ["test, once at the end, with the last weights"]),
    ):
        section = DataConfig(**data)
        lines = plan_lines(plan, milestones, data=section)
        assert lines[5:] == ([f"scores    {'; '.join(words)}"] if words else [])
        table = plan_table(plan, factors, milestones, data=section)
        batches = table.partition("\n\nSteps")[0].splitlines()
        text = " ".join(" ".join(batches[7:]).split())
        assert text == (f"scores {' '.join(words)}" if words else "")
        assert max(map(len, table.splitlines())) <= 80


def test_many_transforms_are_wrapped():
    many = DataConfig(train_transforms=_listed(*["RandomHorizontalFlip"] * 20))
    table = plan_table(*_plan(), data=many)
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("RandomHorizontalFlip") == 20


@pytest.mark.parametrize(("milestone", "is_late"), [(4.95, False), (4.96, True)])
def test_a_milestone_is_late_if_no_step_has_its_rate(milestone, is_late):
    schedule = {"name": "step", "milestones": [milestone], "warmup_epochs": 0}
    plan, factors, milestones = _plan(epochs=5, schedule=schedule)
    assert plan.steps_per_epoch == 12  # 4.95 epochs are 59.4 steps of 60
    assert (factors(plan.total_steps - 1) == 1) == is_late
    assert len(plan_lines(plan, milestones)) == 5 + is_late


@pytest.mark.parametrize(("epochs", "is_cut"), [(4, True), (5, False)])
def test_warm_up_beyond_the_end_is_noted(epochs, is_cut):
    parts = _plan(epochs=epochs, schedule={"warmup_epochs": 5})
    wanted = "the warm-up is cut off after 4 epochs, before the peak"
    assert _lines(parts)[5:] == ([f"note      {wanted}"] if is_cut else [])
    assert (f"note {wanted}" in " ".join(plan_table(*parts).split())) == is_cut


def test_no_warm_up_is_not_cut_off():
    assert len(_lines(_plan(world_size=1, epochs=4, schedule={"warmup_epochs": 5}))) == 5


@pytest.mark.parametrize("samples", [1, 200, 1437, 1_281_167])
def test_rates_at_each_tenth_are_those_that_the_steps_use(samples):
    plan, schedule, _ = _plan(samples=samples, epochs=3)
    text = plan_table(plan, schedule, ()).split("Rate over the run\n")[1]
    rows = [line.replace(",", "").split() for line in text.splitlines()[1:]]
    steps = [int(row[0]) for row in rows]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, plan.total_steps - 1)
    assert len(steps) == min(11, plan.total_steps)
    for step, epoch, seen, rate in rows:
        assert float(epoch) == pytest.approx(plan.epoch_at(int(step)), abs=0.005)
        assert int(seen) == plan.samples_at(int(step))
        assert float(rate) == pytest.approx(plan.peak_lr * schedule(int(step)), rel=1e-5)


def test_text_is_ascii_and_fits_a_terminal():
    for text in (plan_table(*_plan()), plan_table(*_plan(samples=10**7, world_size=1024))):
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("compute", "rows"),
    [
        ({}, ["fp32 (torch's defaults; on CUDA, TF32 in convolutions)"]),
        ({"precision": "ieee"}, ["fp32, without TF32"]),
        (
            {"precision": "tf32", "deterministic": False},
            ["fp32, with TF32 on CUDA", "not deterministic"],
        ),
        ({"precision": "bf16", "channels_last": True}, ["bf16 by autocast", "channels_last"]),
        ({"precision": "fp16"}, ["fp16 by autocast, with a dynamic loss scale"]),
    ],
)
def test_the_precision_is_named_first(compute, rows):
    plan, schedule, milestones = _plan()
    compute = ComputeConfig(**compute)
    assert plan_lines(plan, milestones, compute)[0] == f"precision {', '.join(rows)}"
    table = plan_table(plan, schedule, milestones, compute)
    block = table.split("Computation\n")[1].split("\n\n")[0]
    assert [line.removeprefix("  precision").strip() for line in block.splitlines()] == rows
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("data", "size", "words"),
    [
        ({}, None, None),
        ({"input": "image", "target": 1}, None, "input image, target 1"),
        ({"input": ["ids", "mask"]}, None, "input [ids, mask], no target"),
        ({}, 256, "evaluated by 256 on one rank in one pass"),
    ],
)
def test_parts_of_samples_and_the_batch_of_evaluations_are_named(data, size, words):
    config = RunConfig(data=data, eval={"batch_size": size})
    plan, *rest = _plan()
    sections = config.compute, config.data, config.eval
    lines = [line for line in plan_lines(plan, (), *sections) if line.startswith("samples")]
    assert lines == ([f"samples   {words}"] if words else [])
    table = plan_table(plan, *rest, *sections)
    assert (f"  samples               {words}\n" in table) is bool(words)
    assert ("\n  samples  " in table) is bool(words)


@pytest.mark.parametrize(
    ("order", "facts", "words"),
    [
        ("shuffled", (1437, 1437), None),
        ("sequential", (1437, 1437), "sequential"),
        ("my.Buckets", (1437, 1437), "Buckets, each sample once"),
        ("my.Buckets", (1400, 1400), "Buckets, reads 1,400 of 1,437 samples"),
        (
            "my.Buckets",
            (2000, 1437, 400),
            "Buckets, reads 1,437 of 1,437 samples, 400 of them more than once",
        ),
    ],
)
def test_an_order_that_is_no_shuffling_is_named_with_what_it_reads(order, facts, words):
    chosen = {"class_path": order} if "." in order else order
    config = RunConfig(data={"order": chosen})
    plan = make_plan(
        config, samples=1437, world_size=4, facts_of_order=lambda _: OrderFacts(*facts)
    )
    lines = plan_lines(plan, (), data=config.data)
    table = plan_table(plan, build_schedule(config.schedule, plan), (), data=config.data)
    found = [line for line in lines if line.startswith("order")]
    assert found == ([f"order     {words}"] if words else [])
    first, _, rest = (words or "").partition(" than once")
    assert (f"  order                 {first}\n" in table) is bool(words)
    assert not rest or f"\n{' ' * 24}once" in table
    assert ("order" in table) is bool(words)
    steps = -(-facts[0] // 128)
    assert f"steps     {steps} per epoch" in "\n".join(lines)


def test_what_is_set_of_the_update_is_named():
    assert update_words(RunConfig()) == []
    words = update_words(
        RunConfig(loss=None, optim={"clip_value": 0.5}, log={"train_accuracy": True})
    )
    assert words == [
        "the output of the model is the loss",
        "elements of the gradient clipped to +-0.5",
        "accuracy of training logged",
    ]
    assert update_words(RunConfig(optim={"clip_norm": 2.0})) == [
        "gradient clipped to an L2 norm of 2.0"
    ]
    plan, schedule, milestones = _plan()
    lines = plan_lines(plan, milestones, update=words)
    assert lines[5] == f"update    {'; '.join(words)}"
    table = plan_table(plan, schedule, milestones, update=words)
    block = table.split("Computation\n")[1].split("\n\n")[0].splitlines()
    assert [line.removeprefix("  update").strip() for line in block[1:]] == words
    assert max(map(len, table.splitlines())) <= 80
