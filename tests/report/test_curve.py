import pytest

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.optim.schedule import build_schedule
from ddp_sgd.plan import make_plan
from ddp_sgd.report.curve import curve

STEPS = """\
rate
0.25 |   .'''''''''
     |  .          |
     | .           |
     |.            |
   0 |             --------------.............
     +----------------------------------------
      0                  15          30 epochs"""

COSINE = """\
  rate
0.1919 |   '''--..
       |  -       ''-.
       | -            ''-..
       |-                  '-..
     0 |                       ''---....
       +--------------------------------
        0              10      20 epochs"""


def _draw(schedule, *, samples=1437, world_size=4, epochs=20, steps=None, **size):
    config = RunConfig.model_validate({"epochs": epochs, "steps": steps, "schedule": schedule})
    plan = make_plan(config, samples=samples, world_size=world_size)
    return curve(plan, build_schedule(config.schedule, plan), **size)


def test_a_staircase_after_a_ramp():
    schedule = {"name": "step", "milestones": [10.0, 20.0]}
    assert _draw(schedule, world_size=5, epochs=30, width=40, height=5) == STEPS


def test_a_cosine_after_a_ramp():
    assert _draw({"name": "cosine"}, width=32, height=5) == COSINE


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "polynomial", "one_cycle"])
@pytest.mark.parametrize(("samples", "epochs"), [(1, 1), (1437, 1), (10**6, 90)])
def test_every_curve_fits_its_frame_and_is_ascii(name, samples, epochs):
    text = _draw({"name": name}, samples=samples, epochs=epochs)
    assert text.isascii()
    heading, *plot, axis, labels = text.splitlines()
    assert heading.strip() == "rate"
    assert len(plot) == 10
    margin = plot[0].index("|")
    assert axis == " " * margin + "+" + "-" * 60
    assert all(line[margin] == "|" and len(line) <= margin + 61 for line in plot)
    assert len(labels) == margin + 61
    assert labels.endswith(f" {epochs} epoch" + "s" * (epochs > 1))
    columns = list(zip(*(line[margin + 1 :].ljust(60) for line in plot), strict=True))
    assert all(set(column) != {" "} for column in columns)


def test_the_axis_of_a_run_of_some_steps_ends_with_it():
    text = _draw({}, epochs=20, steps=30)
    assert text.endswith(" 2.534 epochs")
    assert " 1.267 " in text.splitlines()[-1]


def test_a_rate_of_zero_is_drawn_as_such():
    schedule = {"name": "step", "milestones": [0.001, 0.002], "gamma": 1e-200}
    assert "'" not in _draw(schedule, world_size=1)
