"""Whole runs with captured steps, on the CPU, where another graph calls the step again."""

import pytest
import torch
from graphs import Again, StopAt, Terms, measured, train_captured
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import captured_step
from ddp_sgd.engine import rates as module
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError
from ddp_sgd.optim.sgd import RateTable

X = torch.randn(27, 3, generator=torch.Generator().manual_seed(1))
Y = torch.arange(27) % 4
SCHEDULES = {
    "constant": {},
    "step": {"milestones": [1.0, 2.0]},
    "cosine": {"final": 0.1},
    "linear": {},
    "polynomial": {"power": 3.0},
    "one_cycle": {},
}


@pytest.fixture(autouse=True)
def graph_of_the_cpu(monkeypatch):
    monkeypatch.setattr(captured_step, "new_graph", lambda _: Again())

    def rate_table(context, schedule, _):  # eager steps of the CPU would take numbers
        plan = context.plan
        rates = lambda step: plan.peak_lr * schedule(step)  # noqa: E731
        return RateTable(rates, plan.total_steps, torch.device("cpu"))

    monkeypatch.setattr(module, "_rate_table", rate_table)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))


def train(folder, *, captured, stop=None, model=None, loss=None, **sections):
    sections["data"] = {"batch_size": 4, **sections.get("data", {})}
    return train_captured(
        folder,
        Runtime(),
        model or build(),
        TensorDataset(X, Y),
        captured=captured,
        stop=stop,
        loss=loss,
        **{"log": {"every_steps": 2}, **sections},
    )


NOISE = {"class_path": "user_code.add_noise", "call": False}
VARIANTS = {
    **{name: {"schedule": {"name": name, **more}} for name, more in SCHEDULES.items()},
    "micro-batches": {"data": {"batch_size": 3, "accumulate": 3}},
    "tail dropped": {"data": {"tail": "drop"}},
    "clipping": {"optim": {"clip_norm": 0.1, "nesterov": True, "weight_decay": 0.01}},
    "clipping by value": {"optim": {"clip_value": 0.01}},
    "by epoch, shifted": {
        "schedule": {"by": "epoch", "warmup": "shift", "warmup_epochs": 1, "warmup_start": 0.1}
    },
    "momentum along the warm-up": {
        "schedule": {"momentum_start": 0.0, "warmup_steps": 8, "warmup_start": 0.5},
        "optim": {"nesterov": True},
    },
    "momentum by epoch": {
        "schedule": {"momentum_start": 0.5, "warmup_steps": 8, "by": "epoch"},
    },
    "a curve of one's own": {"schedule": {"curve": {"class_path": "user_code.Triangle"}}},
    "in steps": {"steps": 17, "epochs": 20, "eval": {"every_steps": 5}},
    "bf16": {"compute": {"precision": "bf16"}},
    "a sum of means": {"loss": Terms(), "data": {"batch_size": 3, "accumulate": 3}},
    "a loss and another number": {"loss": Terms("loss"), "compute": {"precision": "fp16"}},
    "accuracy": {"log": {"every_steps": 2, "train_accuracy": True}},
    "fp16": {"compute": {"precision": "fp16"}},
    "transforms": {
        "data": {"train_transforms": [{"class_path": "user_code.add_noise", "call": False}]}
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_captured_run_has_the_bits_of_an_eager_one_and_so_has_its_resume(name, tmp_path):
    sections = VARIANTS[name]
    digests = {}
    for captured in (False, True):
        whole = train(tmp_path / f"whole{captured}", captured=captured, **sections)
        folder = tmp_path / f"cut{captured}"
        assert train(folder, captured=captured, stop=StopAt(1), **sections).status == "stopped"
        digests[captured] = whole.weights_digest
        digests[captured, "resumed"] = train(folder, captured=captured, **sections).weights_digest
    assert len(set(digests.values())) == 1, digests
    assert measured(tmp_path / "wholeTrue") == measured(tmp_path / "wholeFalse")


def test_steps_are_replayed_once_momentum_has_come_to_its_end(tmp_path, monkeypatch):
    """27 samples in steps of 4: 7 steps per epoch, the last of each with 3."""
    replayed, replay = [], captured_step.CapturedStep._replay

    def counted(step, batches):
        replayed.append(batches.step)
        return replay(step, batches)

    monkeypatch.setattr(captured_step.CapturedStep, "_replay", counted)
    for by, begin in (("step", 8), ("epoch", 14)):
        replayed.clear()
        schedule = {"momentum_start": 0.5, "warmup_steps": 8, "by": by}
        train(tmp_path / by, captured=True, schedule=schedule)
        assert replayed[:3] == [0, 1, 2]  # which are checked before the first one
        full = [step for step in range(begin, 21) if step % 7 != 6]
        assert list(dict.fromkeys(replayed[3:])) == full  # the first of an epoch is checked, too


def test_a_run_without_a_full_step_is_eager_with_a_line(tmp_path, capsys):
    result = train(tmp_path, captured=True, data={"batch_size": 50})
    assert result.status == "finished"
    line = "steps are not captured: no step has all 50 samples of the global batch"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"replica": "ddp"}},
        {"parallel": {"static_graph": True}},
        {"parallel": {"find_unused_parameters": True}},
        {"parallel": {"compression": "bf16"}},
        {"parallel": {"local_sgd": {"start_step": 3}}},
    ],
)
def test_what_cannot_be_captured_is_refused_with_the_configuration(sections):
    with pytest.raises(ValueError, match=r"compute\.cuda_graphs is true while parallel\."):
        RunConfig.model_validate({"compute": {"cuda_graphs": True}, **sections})


def test_the_processor_has_no_graphs(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"the run is on cpu, which has no CUDA graphs"):
        train(tmp_path, captured=True)


def test_double_precision_is_not_captured(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(captured_step, "new_graph", lambda _: Again())
    samples = TensorDataset(X.double(), Y)
    config = RunConfig.model_validate(
        {
            "output_dir": str(tmp_path),
            "wandb": {"mode": "disabled"},
            "compute": {"cuda_graphs": True},
        }
    )
    with pytest.raises(ConfigError, match="parameters are float64; use float32"):
        fit(config, Runtime(), model=build().double(), train_set=samples)


def test_gradients_that_go_over_the_host_are_not_captured():
    with pytest.raises(ConfigError, match="gradients go between ranks by gloo, on the host"):
        captured_step.refuse_gloo(Runtime(world_size=2, backend="gloo"))
