"""Runs with transforms: the same numbers and the same weights for any split of the samples."""

import pytest
import torch
from ranks import run_ranks
from test_rescoring import rescore
from torch import nn

from ddp_sgd.config import RunConfig, read_command_line
from ddp_sgd.data import InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError, RefusedError
from ddp_sgd.evaluate import look_up

SAMPLES, GLOBAL_BATCH, EPOCHS = 44, 8, 2  # the last step of an epoch has 4 samples

seen = []
"""What this process has drawn: (index, numbers)."""


class Rounded:
    """Replaces an index by a random multiple of 1/8, so that no sum of gradients is rounded."""

    def __call__(self, batch, draws):
        numbers = draws.uniform(3)
        seen.extend(zip(batch[:, 0].tolist(), map(tuple, numbers.tolist()), strict=True))
        return torch.floor(numbers[:, :1] * 8) / 8


class Mean(nn.Module):
    def forward(self, outputs, targets):
        return outputs.mean()


class Line(nn.Linear):
    def __init__(self):
        super().__init__(1, 1, bias=False)
        nn.init.ones_(self.weight)


class Stop:
    """Asks for a stop once some numbers were drawn."""

    def __init__(self, after):
        self.after = after

    @property
    def reason(self):
        return "test" if len(seen) >= self.after else None


def data():
    return InMemory(torch.arange(SAMPLES).float()[:, None], torch.zeros(SAMPLES, dtype=torch.int64))


def here(name):
    return {"class_path": f"{__name__}.{name}"}


def describe(folder, **changes):
    sections = {
        "optim": {"lr": 2**-6, "reference_batch": GLOBAL_BATCH, "momentum": 0.0},
        "schedule": {"name": "constant", "warmup_epochs": 0.0},
        "wandb": {"mode": "disabled"},
        "log": {"every_steps": 1},
        "epochs": EPOCHS,
    }
    return RunConfig(output_dir=str(folder), **sections | changes)


def run(runtime, folder, accumulate, workers, stop_after=None, evaluate=False):
    """Train, stopping once if asked to; gives what this rank has drawn, and the end."""
    config = describe(
        folder,
        data={
            "batch_size": GLOBAL_BATCH // (runtime.world_size * accumulate),
            "accumulate": accumulate,
            "workers": workers,
            "train_transforms": [here("Rounded")],
            "eval_transforms": [here("Rounded")] if evaluate else [],
        },
    )
    drawn = []
    for stop in filter(None, [stop_after and Stop(stop_after), Stop(10**9)]):
        seen.clear()
        result = fit(
            config,
            runtime,
            model=Line(),
            train_set=data(),
            eval_set=data() if evaluate else None,
            loss=Mean(),
            stop=stop,
        )
        drawn.append((result.status, list(seen)))
    return drawn, result.weights_digest, result.scores


def in_training(drawn, batch_size):
    """Leave out what the checks before a run draw: for a few samples twice, and for one alone."""
    checks = 2 * max(2, min(8, batch_size)) + 1
    return [pair for _, pairs in drawn for pair in pairs[checks:]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    ((drawn, digest, _),) = run_ranks(1, run, tmp_path_factory.mktemp("alone"), 1, 0)
    return in_training(drawn, GLOBAL_BATCH), digest


@pytest.mark.parametrize(
    ("world_size", "accumulate", "workers"),
    [(1, 4, 0), (1, 1, 1), (2, 1, 0), (2, 2, 1), (4, 2, 0), (8, 1, 0)],
)
def test_any_split_draws_the_same_and_ends_with_the_same_weights(
    world_size, accumulate, workers, alone, tmp_path
):
    ranks = run_ranks(world_size, run, tmp_path, accumulate, workers)
    batch_size = GLOBAL_BATCH // (world_size * accumulate)
    pairs = [pair for drawn, _, _ in ranks for pair in in_training(drawn, batch_size)]
    assert len(alone[0]) == SAMPLES * EPOCHS
    assert len(set(alone[0])) == SAMPLES * EPOCHS  # other numbers in each epoch
    assert set(pairs) == set(alone[0])
    # In the last step of an epoch half of 8 ranks have a dummy, which is a sample of another rank.
    assert len(pairs) == SAMPLES * EPOCHS + (8 if world_size == 8 else 0)
    assert {digest for _, digest, _ in ranks} == {alone[1]}


def test_a_run_that_was_stopped_draws_what_it_would_have_drawn(alone, tmp_path):
    ranks = run_ranks(2, run, tmp_path, 2, 0, 20)
    for drawn, digest, _ in ranks:
        assert [status for status, _ in drawn] == ["stopped", "finished"]
        assert all(in_training([attempt], 2) for attempt in drawn)
        assert digest == alone[1]
    pairs = [pair for drawn, _, _ in ranks for pair in in_training(drawn, 2)]
    assert sorted(pairs) == sorted(alone[0])


def test_an_evaluation_draws_the_same_every_time_on_any_number_of_ranks(tmp_path):
    results = [
        result
        for world_size in (1, 2)
        for result in run_ranks(world_size, run, tmp_path / str(world_size), 1, 0, None, True)
    ]
    (drawn, digest, scores), *others = results
    counts = {pair: drawn[0][1].count(pair) for pair in drawn[0][1]}
    twice = [pair for pair, count in counts.items() if count >= EPOCHS]
    assert len(twice) >= SAMPLES
    assert all(other[1:] == (digest, scores) for other in others)
    for world_size in (1, 2):
        folder = tmp_path / str(world_size) / "digits"
        argv = [
            *(f"--model.class_path={__name__}.Line", f"--loss.class_path={__name__}.Mean"),
            f"--data.eval.class_path={__name__}.data",
        ]
        again = run_ranks(2, rescore, folder, argv)
        assert [(digest, scores)] * 2 == [(digest, scores) for scores, digest in again]
        ((without, _),) = run_ranks(1, rescore, folder, [*argv, "--data.eval_transforms=[]"])
        assert without["eval/loss"] != scores["eval/loss"]


def test_other_transforms_of_training_are_refused_on_a_resume(tmp_path):
    parts = {"model": Line(), "train_set": data(), "loss": Mean()}
    changes = {"batch_size": GLOBAL_BATCH, "train_transforms": [here("Rounded")]}
    fit(describe(tmp_path, data=changes), Runtime(), **parts)
    more = describe(tmp_path, data={"batch_size": GLOBAL_BATCH}, epochs=EPOCHS + 1)
    with pytest.raises(RefusedError, match=r"data.train_transforms was \[.*Rounded.*\], is \[\]"):
        fit(more, Runtime(), **parts)
    branch = more.model_copy(update={"name": "branch", "resume": str(tmp_path / "digits")})
    assert fit(branch, Runtime(), **parts).step == 6 * (EPOCHS + 1)
    scored = describe(tmp_path, data=changes | {"eval_transforms": [here("Rounded")]}, epochs=3)
    assert fit(scored, Runtime(), **parts, eval_set=data()).step == 6 * 3


class Broken(nn.Module):
    def forward(self, batch, draws):
        return batch.reshape(3, 3, 3)


@pytest.mark.parametrize("use", ["train", "eval"])
def test_a_transform_that_fails_is_named_before_the_first_step(use, tmp_path):
    config = describe(tmp_path, data={f"{use}_transforms": [here("Rounded"), here("Broken")]})
    parts = {"model": Line(), "train_set": data(), "eval_set": data(), "loss": Mean()}
    message = rf"^data.{use}_transforms\[1\] is Broken, which fails on inputs of float32 of shape"
    with pytest.raises(ConfigError, match=message):
        fit(config, Runtime(), **parts)
    assert not list((tmp_path / "digits" / "checkpoints").glob("*.pt"))


class Bytes(InMemory):
    """Images of bytes, which no layer takes as they are."""

    def __init__(self):
        super().__init__(
            torch.arange(64 * 2 * 9).reshape(64, 2, 3, 3).to(torch.uint8), torch.arange(64) % 2
        )


def lazy_model():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))


def test_lazy_modules_see_what_the_transforms_give(tmp_path):
    normalize = {
        "class_path": "ddp_sgd.data.augment.Normalize",
        "init_args": {"mean": [0.3, 0.4], "std": 0.2},
    }
    crop = {"class_path": "ddp_sgd.data.augment.RandomCrop", "init_args": {"size": 3, "padding": 1}}
    wrong = {"train_transforms": [crop, normalize]}
    with pytest.raises(ConfigError, match=r"^data.train_transforms\[1\] is .*mean has 2 numbers"):
        fit(describe(tmp_path, name="wrong", data=wrong), Runtime(), train_set=Bytes())
    normalize["init_args"]["std"] = [0.2, 0.3]
    config = describe(
        tmp_path,
        model=here("lazy_model"),
        data={
            "train": here("Bytes"),
            "eval": here("Bytes"),
            "train_transforms": [crop, normalize],
            "eval_transforms": [normalize],
        },
    )
    result = fit(config, Runtime())
    assert result.status == "finished"
    ((scores, digest),) = run_ranks(1, rescore, tmp_path / "digits")
    assert (scores, digest) == (result.scores, result.weights_digest)


def test_a_score_builds_the_transforms_of_evaluation_alone_and_only_if_trusted(tmp_path):
    crop = {"class_path": "ddp_sgd.data.augment.RandomCrop", "init_args": {"size": 1}}
    listed = {"train_transforms": [here("Rounded")], "eval_transforms": [here("Rounded")]}
    fit(describe(tmp_path, data=listed), Runtime(), model=Line(), train_set=data(), loss=Mean())
    line = read_command_line(["x"], {}, program="", about="", argument="X")
    own = f"{__name__}.Rounded"
    with pytest.raises(RefusedError, match=rf" names {own}, whose code would run; give --trust"):
        look_up(tmp_path / "digits", line.over, Runtime(), {})
    line = read_command_line(
        ["x", f"--data.eval_transforms={[crop]}"], {}, program="", about="", argument="X"
    )
    saved = look_up(tmp_path / "digits", line.over, Runtime(), {})
    assert saved.config.data.train_transforms[0].class_path == own
