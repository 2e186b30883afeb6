import math
from typing import Annotated, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ddp_sgd.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from ddp_sgd.config.sections import ScheduleConfig


def _bounds(annotation, metadata):
    """The kind of number in an annotation, int or float, and its bounds."""
    metadata = [
        inner
        for item in metadata
        for inner in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _bounds(inner, [*metadata, *more])
    if annotation in (int, float):
        return annotation, [item for item in metadata if isinstance(item, Ge | Gt | Le | Lt)]
    found = [_bounds(part, metadata) for part in get_args(annotation)]
    return next((each for each in found if each), None)


def _numbers(model, parent=()):
    for name, field in model.model_fields.items():
        path = (*parent, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _numbers(field.annotation, path)
        elif found := _bounds(field.annotation, field.metadata):
            is_list = get_origin(field.annotation) is tuple
            yield pytest.param(path, *found, is_list, id=".".join(path))


NAMES_TOO = ("data.input", "data.target")
NUMBERS = [each for each in _numbers(RunConfig) if each.id not in NAMES_TOO]


def _nested(path, value, is_list):
    extra = {}
    if path[0] == "schedule":
        shape = {"milestones": "step", "gamma": "step", "power": "polynomial"}
        extra = {"name": shape.get(path[1], "one_cycle" if path[1] == "peak_at" else "cosine")}
        if path[1] == "gamma":
            extra["milestones"] = [1]
    values = {path[-1]: [value] if is_list else value}
    for name in reversed(path[1:-1]):
        values = {name: values}
    return values if len(path) == 1 else {path[0]: extra | values}


def _is_accepted(path, value, is_list):
    try:
        RunConfig.model_validate(_nested(path, value, is_list))
    except ValidationError:
        return False
    return True


def test_every_numeric_field_is_found():
    assert len(NUMBERS) >= 19


@pytest.mark.parametrize(("path", "kind", "bounds", "is_list"), NUMBERS)
def test_ranges_hold_at_their_ends(path, kind, bounds, is_list):
    assert bounds
    for bound in bounds:
        limit = next(iter(vars(bound).values())) if hasattr(bound, "__dict__") else None
        limit = limit if limit is not None else getattr(bound, type(bound).__name__.lower())
        below = limit - 1 if kind is int else math.nextafter(limit, -math.inf)
        above = limit + 1 if kind is int else math.nextafter(limit, math.inf)
        accepted = {
            Ge: {below: False, limit: True, above: True},
            Gt: {below: False, limit: False, above: True},
            Le: {below: True, limit: True, above: False},
            Lt: {below: True, limit: False, above: False},
        }[type(bound)]
        for value, is_good in accepted.items():
            assert _is_accepted(path, value, is_list) is is_good, value


@pytest.mark.parametrize(("path", "kind", "bounds", "is_list"), NUMBERS)
def test_what_is_not_a_finite_number_is_refused(path, kind, bounds, is_list):
    for value in (math.nan, math.inf, -math.inf, True, "1", {}):
        assert not _is_accepted(path, value, is_list), value
    if kind is int:
        assert not _is_accepted(path, 2.0, is_list)


@pytest.mark.parametrize(
    "values",
    [
        {"optim": {"nesterov": True, "momentum": 0}},
        {"schedule": {"gamma": 0.5}},
        {"schedule": {"name": "constant", "final": 0.5}},
        {"schedule": {"name": "step"}},
        {"schedule": {"name": "step", "milestones": [3, 2]}},
        {"schedule": {"name": "step", "milestones": [2, 2]}},
        {"schedule": {"milestones": [2]}},
        {"schedule": {"name": "one_cycle", "warmup_epochs": 1}},
        {"data": {"target": "label"}},
        {"data": {"input": "image", "collate": {"class_path": "torch.stack"}}},
        {"schedule": {"name": "one_cycle", "warmup_steps": 1}},
        {"schedule": {"curve": "my.curve"}},
        {"eval": {"every_epochs": None}},
        {"model": {"class_path": "Linear"}},
        {"model": {"class_path": "a..b"}},
        {"model": {"class_path": "os; import x.y"}},
    ],
)
def test_combinations_that_cannot_be(values):
    with pytest.raises(ValidationError):
        RunConfig.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"optim": {"nesterov": True}},
        {"schedule": {"name": "step", "milestones": [1, 2.5], "gamma": 0.5}},
        {"schedule": {"name": "one_cycle", "warmup_epochs": 0, "peak_at": 0.5}},
        {"schedule": {"name": "constant", "final": 0.0}},
        {"data": {"input": "image", "target": 1}},
        {"data": {"order": "sequential", "collate": {"class_path": "torch.stack"}}},
        {"schedule": {"name": "one_cycle", "warmup_steps": 0}},
        {"schedule": {"curve": {"class_path": "my.curve"}, "name": "cosine", "final": 0.0}},
        {"schedule": {"warmup_epochs": "auto", "warmup_steps": 3}},
        {"eval": {"every_epochs": 2, "every_steps": 5}},
    ],
)
def test_combinations_that_fit(values):
    RunConfig.model_validate(values)


@pytest.mark.parametrize("key", ["input", "target"])
def test_parts_of_samples_are_positions_or_names(key):
    def accepts(value):
        return _is_accepted(("data",), {"input": "image", key: value}, is_list=False)

    assert all(map(accepts, [0, 7, "ids", "0", [0], [2, 0], ["ids", "mask"]]))
    assert accepts(None)
    assert not any(map(accepts, [-1, 1.0, True, "", [], [-1], [0, "ids"], [[0]], {"a": 1}]))


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"name": "linear"}, "schedule.name is linear"),
        ({"milestones": [2.0]}, "schedule.milestones is [2.0]"),
        ({"gamma": 0.5}, "schedule.gamma is 0.5"),
        ({"power": 3.0}, "schedule.power is 3.0"),
        ({"final": 0.1}, "schedule.final is 0.1"),
        ({"peak_at": 0.5}, "schedule.peak_at is 0.5"),
    ],
)
def test_a_curve_takes_no_arguments_of_the_named_ones(schedule, words):
    with pytest.raises(ValidationError) as caught:
        ScheduleConfig(curve={"class_path": "my.curve"}, **schedule)
    (fault,) = caught.value.errors()
    key = words.split()[0]
    assert str(fault["ctx"]["error"]) == (
        f"{words} while schedule.curve is my.curve; leave {key} out, or set schedule.curve=null"
    )


def test_a_warm_up_has_one_length():
    with pytest.raises(ValidationError, match="warmup_steps is 3 while schedule.warmup_epochs is"):
        ScheduleConfig(warmup_steps=3, warmup_epochs=0)


def test_the_models_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().optim.lr = 1.0


def test_a_deadline_is_a_date_that_exists():
    RuntimeConfig(deadline="2026-12-24T18:00:00+01:00")
    with pytest.raises(ValidationError, match="runtime.deadline is '2026-13-45T99:99'"):
        RuntimeConfig(deadline="2026-13-45T99:99")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"replica": "flat", "static_graph": True},
            "parallel.static_graph is true while parallel.replica is flat",
        ),
        (
            {"replica": "flat", "find_unused_parameters": True},
            "parallel.find_unused_parameters is true while parallel.replica is flat",
        ),
        (
            {"replica": "flat", "compression": "bf16"},
            "parallel.compression is bf16 while parallel.replica is flat",
        ),
        (
            {"compression": "fp16", "local_sgd": {"start_step": 10}},
            "parallel.compression is fp16 while parallel.local_sgd.start_step is 10",
        ),
        (
            {"compression": "powersgd", "static_graph": True},
            "parallel.compression is powersgd while parallel.static_graph is true",
        ),
        (
            {"compression": "powersgd", "find_unused_parameters": True},
            "set parallel.find_unused_parameters=false",
        ),
        (
            {"replica": "ddp", "local_sgd": {"start_step": 0}},
            "parallel.replica is ddp while parallel.local_sgd.start_step is 0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**options)


@pytest.mark.parametrize("compression", ["fp16", "powersgd"])
def test_scaled_gradients_are_not_compressed_to_what_they_do_not_fit(compression):
    options = {"compute": {"precision": "fp16"}, "parallel": {"compression": compression}}
    with pytest.raises(ValidationError, match=f"compression is {compression}, which scaled"):
        RunConfig(**options)
    RunConfig(**options | {"compute": {"precision": "bf16"}})
    RunConfig(**options | {"parallel": {"compression": "bf16"}})


def test_a_save_between_two_averages_is_refused_with_a_number_that_fits():
    local = {"local_sgd": {"start_step": 100, "period": 8}}
    with pytest.raises(ValidationError, match="checkpoint.every_steps=16"):
        RunConfig(parallel=local, checkpoint={"every_steps": 20})
    RunConfig(parallel=local, checkpoint={"every_steps": 24})
    RunConfig(parallel={"local_sgd": {"period": 8}}, checkpoint={"every_steps": 20})  # never local


def test_a_score_between_two_averages_is_refused_with_a_number_that_fits():
    local = {"local_sgd": {"start_step": 100, "period": 8}}
    with pytest.raises(ValidationError, match="eval.every_steps is 20 .* set eval.every_steps=16"):
        RunConfig(parallel=local, eval={"every_steps": 20})
    RunConfig(parallel=local, eval={"every_steps": 24})


def test_a_deadline_is_a_date():
    RuntimeConfig(deadline="2026-12-24T18:00:00+01:00")
    with pytest.raises(ValidationError, match="give a date such as"):
        RuntimeConfig(deadline="2026-13-45T99:99")
