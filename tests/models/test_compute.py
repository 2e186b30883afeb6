"""Runs with 16 bits and other memory formats: any split, stop and resume, overflows."""

import json
from functools import partial

import pytest
import torch
from models import networks, samples
from models.training import (
    LR,
    MOMENTUM,
    Case,
    Outcome,
    distance,
    outcome_of,
    reference,
    train,
    train_all,
    whole_batches,
)
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.checkpoint import main as checkpoint
from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
from ddp_sgd.checkpointing.store import CheckpointFolder
from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import precision
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.errors import DivergedError, RefusedError
from ddp_sgd.evaluate import main as evaluate

BF16, FP16 = {"precision": "bf16"}, {"precision": "fp16"}
IMAGES = samples.images(dtype=torch.float32)
CONVNET = Case(model=networks.convnet, data=IMAGES, dtype=None)
ROWS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
FAR = 1e5
"""Distance of targets from outputs: gradients overflow 16 bits at most scales."""


def rows_of(journal, event="train"):
    lines = map(json.loads, (journal / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def train_in(runtime, folder, changes, *, accumulate=1):
    outcome = train(CONVNET, runtime, folder, accumulate=accumulate, **changes)
    return outcome.pack()


@pytest.mark.parametrize("compute", [BF16, FP16], ids=str)
def test_any_split_takes_the_same_step_but_for_rounding(compute, tmp_path):
    """A gradient of 16 bits is rounded once per micro-batch: by 2^-9 in bf16, 2^-12 in fp16."""
    outcomes = [
        Outcome.unpack(run_ranks(w, train_in, tmp_path / str(w), {"compute": compute})[0])
        for w in (1, 2, 3)
    ]
    start = outcome_of(CONVNET.build_model()).parameters
    updates = [{n: p - start[n] for n, p in each.parameters.items()} for each in outcomes]
    whole = torch.cat([update.flatten() for update in updates[0].values()])
    assert whole.norm() > 1e-2
    for other in updates[1:]:
        flat = torch.cat([update.flatten() for update in other.values()])
        assert (flat - whole).norm() <= 2.0**-6 * whole.norm()
        assert not torch.equal(flat, torch.zeros_like(flat))


@pytest.mark.parametrize(
    "compute", [BF16, FP16, BF16 | {"channels_last": True}, {"channels_last": True}], ids=str
)
def test_a_resumed_run_equals_one_that_was_not_stopped(compute, tmp_path):
    changes = {"checkpoint": {"every_epochs": 1}, "schedule": {"name": "constant"}}
    train_all_of = partial(train, CONVNET, Runtime(), compute=compute, accumulate=2, **changes)
    whole = train_all_of(tmp_path / "whole", epochs=4)
    train_all_of(tmp_path / "cut", epochs=2)
    assert train_all_of(tmp_path / "cut", epochs=4).digest == whole.digest


def test_digits_are_as_good_with_bf16(tmp_path):
    scores = {}
    for name in ("fp32", "bf16"):
        config = RunConfig(
            output_dir=str(tmp_path),
            name=name,
            epochs=8,
            wandb={"mode": "disabled"},
            compute={"precision": name},
        )
        scores[name] = fit(config, Runtime()).scores
    assert scores["fp32"]["eval/accuracy"] > 0.9
    assert abs(scores["bf16"]["eval/accuracy"] - scores["fp32"]["eval/accuracy"]) <= 0.01
    assert scores["bf16"]["eval/loss"] != scores["fp32"]["eval/loss"]  # there were 16 bits


def test_an_evaluation_afterwards_has_the_precision_of_the_run(tmp_path, capsys):
    config = RunConfig(output_dir=str(tmp_path), epochs=1, wandb={"mode": "disabled"}, compute=BF16)
    scores = fit(config, Runtime()).scores
    capsys.readouterr()
    assert evaluate([str(tmp_path / "digits"), "--runtime.device=cpu"]) == 0
    first, last = capsys.readouterr().out.strip().splitlines()[-2:]
    assert json.loads(last)["eval/loss"] == scores["eval/loss"]
    assert "the run itself" not in first
    other = [str(tmp_path / "digits"), "--runtime.device=cpu", "--compute.precision=fp32"]
    assert evaluate(other) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval/loss"] != scores["eval/loss"]


def run_all(runtime, folder):
    last = {"compute": {"channels_last": True}}
    return {
        "flat": train_all(runtime, folder / "flat", {"": EXACT}, accumulate=2, **last),
        "ddp": train_all(
            runtime, folder / "ddp", {"": EXACT}, accumulate=2, parallel={"replica": "ddp"}, **last
        ),
    }


EXACT = Case(model=networks.convnet, data=samples.images())


def test_channels_last_takes_the_steps_of_plain_torch(tmp_path):
    expected = outcome_of(reference(EXACT, whole_batches(EXACT)))
    outcomes = [train(EXACT, Runtime(), tmp_path, compute={"channels_last": True}, accumulate=3)]
    for rank in run_ranks(2, run_all, tmp_path):
        outcomes += [Outcome.unpack(rank[kind][""]) for kind in ("flat", "ddp")]
    for outcome in outcomes:
        assert distance(outcome.parameters, expected.parameters) <= 1e-6
        weight = outcome.parameters["2.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


def test_a_checkpoint_of_channels_last_loads_into_a_contiguous_model(tmp_path):
    changes = {"checkpoint": {"every_epochs": 1}, "schedule": {"name": "constant"}}
    outcome = train(CONVNET, Runtime(), tmp_path, compute={"channels_last": True}, **changes)
    saved = read_tensors(find_checkpoint(tmp_path / "run")[0])
    model = networks.convnet()
    model.load_state_dict(saved["model"])
    assert all(p.is_contiguous() for p in model.parameters())
    assert weights_digest(model) == outcome.digest
    assert weights_digest(model.to(memory_format=torch.channels_last)) == outcome.digest


def test_checkpoints_of_channels_last_are_exported_and_averaged(tmp_path, capsys):
    changes = {"checkpoint": {"every_epochs": 1}, "schedule": {"name": "constant"}}
    outcome = train(CONVNET, Runtime(), tmp_path, compute={"channels_last": True}, **changes)
    assert checkpoint(["export", str(tmp_path / "run"), str(tmp_path / "w.safetensors")]) == 0
    exported = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(exported[name], p) for name, p in outcome.parameters.items())
    mean_of_two = ["--last", "2", "--output", str(tmp_path / "mean")]
    assert checkpoint(["average", str(tmp_path / "run"), *mean_of_two]) == 0
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    *_, first, last = (read_tensors(file)["model"] for file in sorted(folder.path.glob("*.pt")))
    mean = read_tensors(find_checkpoint(tmp_path / "mean")[0])["model"]
    for name, value in mean.items():
        torch.testing.assert_close(value, (first[name] + last[name]) / 2)
        assert value.ndim < 4 or value.is_contiguous(memory_format=torch.channels_last)


def test_the_memory_format_may_change_on_a_resume_with_a_note(tmp_path, capsys):
    changes = {"checkpoint": {"every_epochs": 1}, "schedule": {"name": "constant"}}
    train(EXACT, Runtime(), tmp_path, epochs=2, **changes)
    outcome = train(
        EXACT, Runtime(), tmp_path, epochs=3, compute={"channels_last": True}, **changes
    )
    assert "note      compute.channels_last was False, is True" in capsys.readouterr().out
    expected = outcome_of(reference(EXACT, whole_batches(EXACT)))
    assert distance(outcome.parameters, expected.parameters) <= 1e-6


@pytest.mark.parametrize(
    ("compute", "change"),
    [
        (BF16, "compute.precision was fp32, is bf16"),
        ({"deterministic": False}, "compute.deterministic was True, is False"),
    ],
)
def test_what_would_change_the_steps_is_refused_unless_another_run_begins(
    compute, change, tmp_path
):
    changes = {"checkpoint": {"every_epochs": 1}, "schedule": {"name": "constant"}}
    train(CONVNET, Runtime(), tmp_path, epochs=2, **changes)
    with pytest.raises(RefusedError, match=change):
        train(CONVNET, Runtime(), tmp_path, epochs=3, compute=compute, **changes)
    other = {"name": "other", "resume": str(tmp_path / "run"), "compute": compute}
    assert train(CONVNET, Runtime(), tmp_path, epochs=3, **other, **changes).status == "finished"


def far_targets(runtime, folder, growth_steps, changes):
    """Train where rank 0 alone has targets whose gradients overflow; gives rows and weights."""
    precision._GROWTH_STEPS = growth_steps
    targets = torch.zeros(24, 1)
    targets[0] = FAR
    model = nn.Linear(4, 1)
    nn.init.constant_(model.weight, 0.5)
    nn.init.zeros_(model.bias)
    scale = {"clip_norm": 1.0, "lr": 0.01, "scaling": "none"}
    config = RunConfig(
        output_dir=str(folder),
        name="run",
        compute=FP16,
        data={"batch_size": 24 // runtime.world_size},
        optim=scale,
        schedule={"name": "constant"},
        log={"every_steps": 1},
        wandb={"mode": "disabled"},
        **changes,
    )
    fit(config, runtime, model=model, train_set=TensorDataset(ROWS, targets), loss=nn.MSELoss())
    return model.weight.tolist()


def test_the_search_for_a_scale_skips_steps_on_all_ranks_and_ends_no_run(tmp_path):
    """Of one sample in 24 the gradient is 2 FAR / 24 times the scale, and 2 FAR before the sum."""
    first, second = run_ranks(2, far_targets, tmp_path, 3, {"epochs": 30})
    assert first == second
    rows = rows_of(tmp_path)
    scales = [row["train/loss_scale"] for row in rows]
    overflows = [row["train/overflow_steps"] for row in rows]
    assert scales[:12] == [2.0 ** (16 - k) for k in range(12)]  # more in a row than end a run
    assert [row["train/grad_norm"] is None for row in rows[:12]] == [True] * 12
    assert all(row["train/skipped_steps"] == 0 for row in rows)
    expected, good, count = 65536.0, 0, 0
    for row, scale, counted in zip(rows, scales, overflows, strict=True):
        assert scale == expected
        if row["train/grad_norm"] is None:
            expected, good, count = expected / 2, 0, count + 1
        else:
            good += 1
            if good == 3:
                expected, good = expected * 2, 0
        assert counted == count
    assert len(set(scales[12:])) > 1
    assert max(scales[-10:]) > min(scales[-10:])  # it grows, overflows and shrinks again


def test_the_scale_survives_a_resume(tmp_path):
    saves = {"checkpoint": {"every_epochs": 1}}
    whole = run_ranks(2, far_targets, tmp_path / "whole", 3, {"epochs": 26, **saves})
    run_ranks(2, far_targets, tmp_path / "cut", 3, {"epochs": 17, **saves})
    assert run_ranks(2, far_targets, tmp_path / "cut", 3, {"epochs": 26, **saves}) == whole
    keys = ("step", "train/loss_scale", "train/overflow_steps", "train/grad_norm")
    rows = [[row[key] for key in keys] for row in rows_of(tmp_path / "cut")]
    assert rows == [[row[key] for key in keys] for row in rows_of(tmp_path / "whole")]


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(tmp_path):
    rows = ROWS.clone()
    rows[3, 2] = float("nan")
    config = RunConfig(
        output_dir=str(tmp_path),
        name="run",
        epochs=60,
        compute=FP16,
        log={"every_steps": 1},
        wandb={"mode": "disabled"},
    )
    data = TensorDataset(rows, torch.zeros(24, 1))
    with pytest.raises(DivergedError, match="10 steps in a row"):
        fit(config, Runtime(), model=nn.Linear(4, 1), train_set=data, loss=nn.MSELoss())
    assert [row["train/overflow_steps"] for row in rows_of(tmp_path)][-1] == 16


CLIP = 0.001


def small_loss(outputs, targets):
    """Give a loss whose gradient fits into 16 bits at a scale of 2^16."""
    return 0.01 * nn.functional.mse_loss(outputs, targets)


def shorten(gradient):
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert norm > CLIP
    return [g * (CLIP / norm) for g in gradient]


def clamp(gradient):
    assert max(g.abs().max() for g in gradient) > CLIP
    return [g.clamp(-CLIP, CLIP) for g in gradient]


@pytest.mark.parametrize(("key", "clip"), [("clip_norm", shorten), ("clip_value", clamp)])
def test_scaled_steps_against_a_replay(key, clip, tmp_path):
    """Unscaled, clipped and accumulated by hand, from the gradients that autocast gives."""
    targets = ROWS.sum(dim=1, keepdim=True)
    case = Case(
        model=partial(nn.Linear, 4, 1), data=partial(TensorDataset, ROWS, targets), dtype=None,
        loss=lambda: small_loss,
    )  # fmt: skip
    outcome = train(
        case,
        Runtime(),
        tmp_path,
        accumulate=3,
        compute=FP16,
        optim={key: CLIP, "weight_decay": 0.0},
    )
    model = case.build_model()
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    for epoch in range(3):
        gradient = gradient_under_autocast(model, targets, epoch)
        for weight, buffer, g in zip(weights, buffers, clip(gradient), strict=True):
            buffer.mul_(MOMENTUM).add_(g)
            weight.sub_(LR * buffer)
        for p, weight in zip(model.parameters(), weights, strict=True):
            p.data.copy_(weight)
    # Micro-batches differ from the batch by their rounding to 16 bits.
    assert distance(outcome.parameters, outcome_of(model).parameters) <= 1e-4


def gradient_under_autocast(model, targets, epoch):
    """Compute the gradient of all samples at a scale of 2^16."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = small_loss(model(ROWS), targets)
    (loss * 65536).backward()
    return [p.grad / 65536 for p in model.parameters()]


@pytest.mark.parametrize("compute", [{}, BF16], ids=str)
def test_only_fp16_has_a_loss_scale(compute, tmp_path):
    train(CONVNET, Runtime(), tmp_path, compute=compute)
    assert not [key for key in rows_of(tmp_path)[0] if "scale" in key or "overflow" in key]


def test_parameters_of_16_bits_are_trained_with_one_note(tmp_path, capsys):
    case = Case(model=networks.mlp, data=samples.rows(dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert train(case, Runtime(), tmp_path).status == "finished"
    assert capsys.readouterr().out.count("note      parameters are bfloat16: updates below") == 1


PAIRS = {
    "fp16, ddp": {"compute": FP16, "parallel": {"replica": "ddp"}},
    "fp16, bf16 compression": {"compute": FP16, "parallel": {"compression": "bf16"}},
    "fp16, local SGD": {
        "compute": FP16,
        "parallel": {"local_sgd": {"start_step": 1, "period": 2}},
        "checkpoint": {"every_epochs": None},
    },
    "bf16, powersgd": {"compute": BF16, "parallel": {"compression": "powersgd"}},
    "bf16, static graph": {"compute": BF16, "parallel": {"static_graph": True}},
    "bf16, unused": {"compute": BF16, "parallel": {"find_unused_parameters": True}},
    "channels_last, local SGD": {
        "compute": {"channels_last": True},
        "parallel": {"local_sgd": {"start_step": 0, "period": 2}},
    },
    "channels_last, powersgd": {
        "compute": {"channels_last": True},
        "parallel": {"compression": "powersgd"},
    },
    "not deterministic": {"compute": {"deterministic": False}, "parallel": {"replica": "ddp"}},
    "tf32, clipping": {"compute": {"precision": "tf32"}, "optim": {"clip_norm": 100.0}},
}


def train_pairs(runtime, folder):
    outcomes = {}
    for number, (name, changes) in enumerate(PAIRS.items()):
        outcomes[name] = train(CONVNET, runtime, folder / str(number), epochs=4, **changes)
    return {name: (each.digest, each.scores["eval/loss"]) for name, each in outcomes.items()}


def test_pairs_that_work_together(tmp_path):
    first, second = run_ranks(2, train_pairs, tmp_path)
    assert first == second
    alone = train(CONVNET, Runtime(), tmp_path / "alone", epochs=4)
    for name, (_, loss) in first.items():
        assert loss == pytest.approx(alone.scores["eval/loss"], rel=0.05), name
