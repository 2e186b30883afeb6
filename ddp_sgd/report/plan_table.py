"""Plan table: a run in words and numbers, before it starts."""

import textwrap
from collections.abc import Iterator, Sequence

from ddp_sgd.config import ComputeConfig, RunConfig
from ddp_sgd.config.sections import Choice, DataConfig, EvalConfig
from ddp_sgd.optim.schedule import Schedule, step_of
from ddp_sgd.plan import Plan, micro_batch_sizes
from ddp_sgd.scores import prefix_of
from ddp_sgd.text import columns

_RULES = {
    "linear": "linear: peak = base x k",
    "sqrt": "sqrt: peak = base x sqrt(k)",
    "none": "none: peak = base",
}

_PRECISIONS = {
    "fp32": "fp32 (torch's defaults; on CUDA, TF32 in convolutions)",
    "ieee": "fp32, without TF32",
    "tf32": "fp32, with TF32 on CUDA",
    "bf16": "bf16 by autocast",
    "fp16": "fp16 by autocast, with a dynamic loss scale",
}

_NOTE_WIDTH = 55
"""Longest line of a note in the table, in characters: the rest of 80."""


def plan_lines(
    plan: Plan,
    milestones: Sequence[float],
    compute: ComputeConfig | None = None,
    data: DataConfig | None = None,
    evaluation: EvalConfig | None = None,
    update: Sequence[str] = (),
) -> list[str]:
    """Sum the plan up for the head of a log.

    Args:
        plan: The run's arithmetic.
        milestones: Those of the schedule, in epochs.
        compute: Section ``compute`` of the configuration; None: its defaults.
        data: Section ``data`` of the configuration; None: its defaults.
        evaluation: Section ``eval`` of the configuration; None: its defaults.
        update: What else is set of a step, from ``update_words``.

    Returns:
        Five lines: precision, batches, steps, rates, schedule; one for the order of samples,
        unless they are shuffled, one for momentum, if it changes, for the loss and the gradient,
        chosen parts of samples, transforms, several held-out sets or a test set, if something is
        set, and for each note on the schedule.
    """
    data = data or DataConfig()
    transforms, scored = "; ".join(_transforms(data)), "; ".join(_scored(data))
    samples = "; ".join(_samples(data, evaluation))
    return [
        f"precision {', '.join(_compute_words(compute or ComputeConfig()))}",
        f"batch     {_product(plan)} = {_count(plan.global_batch, 'sample')} per step; "
        f"the data set has {plan.samples:,}",
        f"steps     {plan.steps_per_epoch:,} per epoch, {plan.total_steps:,} in "
        f"{epochs_in_words(plan)}; {_tail(plan)}",
        *(f"order     {words}" for words in _order(plan, data)),
        f"rate      {plan.base_lr:.6g} for {_count(plan.reference_batch, 'sample')} -> "
        f"{plan.peak_lr:.6g} for {plan.global_batch:,} ({plan.scaling}, k = {plan.scale:.6g})",
        f"schedule  {_curve_words(plan)}; warm-up: {_warm_up(plan)}",
        *([f"momentum  {_momentum(plan)}"] if plan.momentum_start is not None else []),
        *([f"update    {'; '.join(update)}"] if update else []),
        *([f"samples   {samples}"] if samples else []),
        *([f"transform {transforms}"] if transforms else []),
        *([f"scores    {scored}"] if scored else []),
        *(f"note      {note}" for note in _schedule_notes(plan, milestones)),
    ]


def plan_table(
    plan: Plan,
    schedule: Schedule,
    milestones: Sequence[float],
    compute: ComputeConfig | None = None,
    data: DataConfig | None = None,
    evaluation: EvalConfig | None = None,
    update: Sequence[str] = (),
) -> str:
    """Show every number of the plan, and the rate at each tenth of the run.

    Args:
        plan: The run's arithmetic.
        schedule: Factor of ``plan.peak_lr`` at each step.
        milestones: Those of the schedule, in epochs.
        compute: Section ``compute`` of the configuration; None: its defaults.
        data: Section ``data`` of the configuration; None: its defaults.
        evaluation: Section ``eval`` of the configuration; None: its defaults.
        update: What else is set of a step, from ``update_words``.

    Returns:
        Sections with a heading each, as text of several lines without a newline at the end.
    """
    data = data or DataConfig()
    sections = {
        "Batches": [
            *_batch_rows(plan),
            *_wrapped("samples", *_samples(data, evaluation)),
            *_data_rows(data),
        ],
        "Steps": [*_wrapped("order", *_order(plan, data)), *_step_rows(plan)],
        "Learning rate": [*_rate_rows(plan), *_note_rows(plan, milestones)],
        "Computation": [
            *_compute_rows(compute or ComputeConfig()),
            *(("" if number else "update", words) for number, words in enumerate(update)),
        ],
    }
    every_row = [row for rows in sections.values() for row in rows]
    lines = iter(columns(every_row, left=(0, 1), gap="   "))
    blocks = {title: [f"  {next(lines)}" for _ in rows] for title, rows in sections.items()}
    blocks["Rate over the run"] = _tenths(plan, schedule)
    return "\n\n".join("\n".join([title, *block]) for title, block in blocks.items())


def update_words(config: RunConfig) -> list[str]:
    """Name what is set of the loss and of the gradient, other than by default."""
    optim = config.optim
    words = {
        "the output of the model is the loss": config.loss is None,
        f"gradient clipped to an L2 norm of {optim.clip_norm}": optim.clip_norm is not None,
        f"elements of the gradient clipped to +-{optim.clip_value}": optim.clip_value is not None,
        "accuracy of training logged": config.log.train_accuracy,
    }
    return [each for each, is_set in words.items() if is_set]


def _batch_rows(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("training samples, n", f"{plan.samples:,}"),
        ("ranks, W", f"{plan.world_size:,}"),
        ("micro-batch, b", f"{plan.batch_size:,} on one rank in one pass"),
        ("accumulate, A", f"{_count(plan.accumulate, 'micro-batch')} of one rank in one step"),
        ("rank batch, A b", f"{plan.accumulate * plan.batch_size:,} on one rank in one step"),
        ("global batch, W A b", f"{plan.global_batch:,} in one step"),
    ]


def _data_rows(data: DataConfig) -> list[tuple[str, str]]:
    """Show transforms, and what is scored besides one held-out set."""
    return [*_wrapped("transforms", *_transforms(data)), *_wrapped("scores", *_scored(data))]


def _scored(data: DataConfig) -> list[str]:
    """Name held-out sets that have names, the first of which chooses, and the test set."""
    names = [prefix_of(key) for key in data.eval_sets]
    has_names = bool(names) and names != ["eval"]
    named = [f"{', '.join(names)}; the best checkpoint by {names[0]}"] if has_names else []
    weights = "the weights of the best checkpoint" if names else "the last weights"
    return [*named, *([f"test, once at the end, with {weights}"] if data.test else [])]


def _transforms(data: DataConfig) -> list[str]:
    """Name the transforms on the device: those of training, those of evaluation."""
    lists = {"": data.train_transforms, "evaluation: ": data.eval_transforms}
    return [
        use + ", ".join(each.class_path.rpartition(".")[2] for each in listed)
        for use, listed in lists.items()
        if listed
    ]


def _samples(data: DataConfig, evaluation: EvalConfig | None) -> Iterator[str]:
    """Name the parts of samples that are chosen, and how many an evaluation takes at a time."""
    if data.input is not None:
        target = "no target" if data.target is None else f"target {_part(data.target)}"
        yield f"input {_part(data.input)}, {target}"
    if evaluation is not None and evaluation.batch_size is not None:
        yield f"evaluated by {evaluation.batch_size:,} on one rank in one pass"


def _part(choice: Choice) -> str:
    return f"[{', '.join(map(str, choice))}]" if isinstance(choice, tuple) else str(choice)


def _order(plan: Plan, data: DataConfig) -> Iterator[str]:
    """Name an order that is no shuffling, and what it reads, where that is not each sample once."""
    if isinstance(data.order, str):
        if data.order != "shuffled":
            yield data.order
        return
    words = data.order.class_path.rpartition(".")[2]
    if plan.order_length == plan.distinct_samples == plan.samples:
        yield f"{words}, each sample once"
        return
    words += f", reads {plan.distinct_samples:,} of {_count(plan.samples, 'sample')}"
    more = f", {plan.repeated_samples:,} of them more than once" if plan.repeated_samples else ""
    yield words + more


def _step_rows(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("an epoch", _length(plan.steps_per_epoch, plan.samples_per_epoch)),
        (epochs_in_words(plan), _length(plan.total_steps, plan.total_samples)),
        (f"tail ({plan.tail})", _tail(plan)),
        *(("", line) for line in _shares(plan)),
    ]


def _rate_rows(plan: Plan) -> list[tuple[str, str]]:
    reference = f"{plan.global_batch:,} / {plan.reference_batch:,}"
    return [
        ("base", f"{plan.base_lr:.6g} for {_count(plan.reference_batch, 'sample')} per step"),
        ("k", f"{plan.scale:.6g} = {reference}"),
        ("rule", _RULES[plan.scaling]),
        ("peak", f"{plan.peak_lr:.6g} for {_count(plan.global_batch, 'sample')} per step"),
        ("schedule", _curve_words(plan)),
        *_wrapped("warm-up", _warm_up(plan)),
        *([("momentum", _momentum(plan))] if plan.momentum_start is not None else []),
    ]


def _compute_words(compute: ComputeConfig) -> list[str]:
    """Name the precision, and what else is set."""
    flags = {
        "channels_last": compute.channels_last,
        "compiled": bool(compute.compile),
        "CUDA graphs": compute.cuda_graphs,
        "not deterministic": not compute.deterministic,
    }
    return [_PRECISIONS[compute.precision], *(word for word, is_set in flags.items() if is_set)]


def _compute_rows(compute: ComputeConfig) -> list[tuple[str, str]]:
    precision, *flags = _compute_words(compute)
    return [("precision", precision), *(("", flag) for flag in flags)]


def _note_rows(plan: Plan, milestones: Sequence[float]) -> list[tuple[str, str]]:
    return [row for note in _schedule_notes(plan, milestones) for row in _wrapped("note", note)]


def _wrapped(title: str, *texts: str) -> list[tuple[str, str]]:
    """Rows of a text of several lines, of which the first has the title."""
    lines = [line for text in texts for line in textwrap.wrap(text, _NOTE_WIDTH)]
    return [("" if number else title, line) for number, line in enumerate(lines)]


def _tail(plan: Plan) -> str:
    """Describe what becomes of the samples that do not fill a global batch."""
    left_out = plan.order_length - plan.samples_per_epoch
    if left_out:
        return f"{_count(left_out, 'sample')} of each epoch left out"
    if plan.last_batch == plan.global_batch:
        return "every step is full"
    return f"the last step of an epoch has {_count(plan.last_batch, 'sample')}"


def _shares(plan: Plan) -> Iterator[str]:
    """List which ranks get how much of an unfilled last step, in which micro-batches, and notes.

    Shares differ by one sample at most, and the lower ranks have the larger ones.
    """
    if plan.last_batch < plan.global_batch:
        larger = plan.last_batch % plan.world_size
        for first, end in ((0, larger), (larger, plan.world_size)):
            if first < end:
                sizes = micro_batch_sizes(plan.last_batch, first, plan.world_size, plan.batch_size)
                yield _share(range(first, end), sizes)
    if plan.smallest_micro_batch:
        yield f"smallest micro-batch of the run: {_count(plan.smallest_micro_batch, 'sample')}"
    else:
        idle = plan.world_size - plan.last_batch
        yield f"note: {idle:,} of {plan.world_size:,} ranks idle in that step, which stays exact"
    if plan.order_length < plan.global_batch:
        yield "note: no step fills the global batch, for which the rate is scaled"


def _share(ranks: range, sizes: tuple[int, ...]) -> str:
    """Describe the micro-batches that each of these ranks has; all are equal but the last."""
    several = len(ranks) > 1
    owner = f"ranks {ranks[0]:,} to {ranks[-1]:,}: " if several else f"rank {ranks[0]:,}: "
    if not sizes:
        return f"{owner}no sample"
    full = sizes.count(sizes[0])
    shape = f"{full:,} x {sizes[0]:,}" + (f" + {sizes[-1]:,}" if full < len(sizes) else "")
    return f"{owner}{_count(sum(sizes), 'sample')}{' each' if several else ''} ({shape})"


def _curve_words(plan: Plan) -> str:
    """Name the curve, and when the rate changes if that is not at every step."""
    return plan.schedule + (", by epoch" if plan.by == "epoch" else "")


_JOINED = {
    "multiply": "",
    "shift": ", then the schedule begins",
    "replace": ", in place of the schedule",
}


def _warm_up(plan: Plan) -> str:
    is_flat = plan.warmup_start == 1 and plan.warmup == "multiply"  # from the peak to the peak
    if plan.warmup_steps == 0 or is_flat:
        return "none"
    part = f"{plan.epoch_at(plan.warmup_steps):.4g} of {epochs_in_words(plan)}"
    samples = _count(plan.samples_at(plan.warmup_steps), "sample")
    start = f"{plan.peak_lr * plan.warmup_start:.6g}{_JOINED[plan.warmup]}"
    return f"{_count(plan.warmup_steps, 'step')} ({samples}, {part}) from {start}"


def _momentum(plan: Plan) -> str:
    steps = _count(plan.warmup_steps, "step")
    return f"{plan.momentum_start:.6g} -> {plan.momentum:.6g} over {steps}"


def _schedule_notes(plan: Plan, milestones: Sequence[float]) -> Iterator[str]:
    """List what a run leaves out of its schedule, as a run does that is shortened for a trial."""
    epochs = epochs_in_words(plan)
    begin = plan.warmup_steps if plan.warmup == "shift" else 0
    late = [epoch for epoch in milestones if begin + step_of(epoch, plan) >= plan.total_steps]
    if late:
        shown = ", ".join(f"{epoch:.6g}" for epoch in late)
        yield f"milestones [{shown}] are not reached in {epochs}"
    if plan.warmup_steps > plan.total_steps and plan.warmup_start < 1:
        yield f"the warm-up is cut off after {epochs}, before the peak"


def _tenths(plan: Plan, schedule: Schedule) -> list[str]:
    """Tabulate the rate at each tenth of the run; the last row is the last step that is taken."""
    last = plan.total_steps - 1
    steps = sorted({min(last, plan.total_steps * tenth // 10) for tenth in range(11)})
    rows = [("step", "epoch", "samples before", "rate")] + [
        (
            f"{step:,}",
            f"{plan.epoch_at(step):.2f}",
            f"{plan.samples_at(step):,}",
            f"{plan.peak_lr * schedule(step):.6g}",
        )
        for step in steps
    ]
    return [f"  {line}" for line in columns(rows, left=(), gap="   ")]


def _product(plan: Plan) -> str:
    """Write the global batch as ranks x micro-batches x samples."""
    factors = [_count(plan.world_size, "rank"), f"{plan.batch_size:,}"]
    if plan.accumulate > 1:
        factors.insert(1, _count(plan.accumulate, "micro-batch"))
    return " x ".join(factors)


def _length(steps: int, samples: int) -> str:
    return f"{_count(steps, 'step')} ({_count(samples, 'sample')})"


def epochs_in_words(plan: Plan) -> str:
    """Write the length of the run in epochs, of which the last may be a part."""
    return f"{passes_in_words(plan)} epoch{'' if plan.passes == 1 else 's'}"


def passes_in_words(plan: Plan) -> str:
    """Write the number of epochs: a whole number, or four digits of another."""
    return f"{plan.passes:,.0f}" if plan.passes == plan.epochs else f"{plan.passes:.4g}"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("batch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"
