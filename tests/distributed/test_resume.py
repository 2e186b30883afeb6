"""Stop and resume change nothing: the same bits on the same ranks, the same run on others."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from wandb_reader import inspect_offline_run
from wandb_stub import isolate_wandb

from ddp_sgd.checkpointing.store import CheckpointFolder
from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.engine.step import Stepper
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.models import MLP
from ddp_sgd.optim.sgd import SGD
from ddp_sgd.report.journal import read_journal


class Noisy:
    """Few digits, so that runs are short, each with noise of its own in every epoch."""

    def __init__(self, split="train", samples=200):
        digits = Digits(split, shape="image")
        self.samples = [digits[index] for index in range(samples)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, digit = self.samples[index]
        image = torch.as_tensor(image)
        return image + 0.1 * torch.randn_like(image), digit


class Everything(nn.Sequential):
    """All that remembers or draws something: normalization, dropout."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(256, 10),
        )


def describe(folder, **changes):
    basis = {
        "name": "x",
        "epochs": 3,
        "wandb": {"mode": "disabled"},
        "optim": {"lr": 0.1, "clip_norm": 1.0},
        "data": {"batch_size": 8},
    }
    return RunConfig(output_dir=str(folder), **basis | changes)


@contextmanager
def asking_after(steps):
    """A stop request that comes in the step with this number of this life."""
    wish, taken, step = StopRequest(), [0], SGD.step

    def counted(*arguments):
        step(*arguments)
        taken[0] += 1
        if taken[0] == steps:
            wish.ask("the test")

    SGD.step = counted
    try:
        yield wish
    finally:
        SGD.step = step


def live(runtime, folder, steps, changes, victim=0):
    """One life of a run: to the end, or until one rank asks to stop."""
    torch.manual_seed(0)
    model = Everything()
    with asking_after(steps if runtime.rank == victim else -1) as wish:
        result = fit(
            describe(folder, **{"log": {"every_steps": 1}} | changes),
            runtime,
            model=model,
            train_set=Noisy(),
            eval_set=Noisy("eval", 50),
            stop=wish,
        )
    return result.status, result.step, result.weights_digest


def rows(folder, *events):
    return [
        {key: value for key, value in row.items() if not key.startswith(("time", "throughput"))}
        for row in read_journal(folder / "x" / "metrics.jsonl")
        if row["event"] in events
    ]


PLAIN = {}
WORKERS = {"data": {"batch_size": 8, "workers": 2}}
ACCUMULATE = {"data": {"batch_size": 4, "accumulate": 3}, "optim": {"lr": 0.1, "nesterov": True}}
DROP = {"data": {"batch_size": 8, "tail": "drop"}, "schedule": {"name": "one_cycle"}}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, PLAIN), (2, PLAIN), (2, WORKERS), (2, ACCUMULATE), (2, DROP)],
)
def test_stopped_at_any_step_a_run_ends_with_the_same_bits(world_size, changes, tmp_path):
    """At the first step, mid-epoch, before, at and after the edge of an epoch.

    With other options mid-epoch and at the edge only: the rest does not depend on them.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    undisturbed = run_ranks(world_size, live, whole, -1, changes)
    edge = undisturbed[0][1] // 3
    done = 0
    stops = (1, edge // 2, edge - 1, edge, edge + 1) if changes == PLAIN else (edge // 2, edge)
    for stop in stops:
        victim = stop % world_size
        first, *_ = run_ranks(world_size, live, parts, stop - done, changes, victim)
        assert first[:2] == ("stopped", stop)
        done = stop
    assert run_ranks(world_size, live, parts, -1, changes) == undisturbed
    assert len(rows(parts, "resume")) == len(rows(parts, "stop")) == len(stops)
    # Not only the weights: what was measured on the way is the same, each row once.
    assert rows(parts, "train", "eval") == rows(whole, "train", "eval")


def test_a_run_that_lost_its_last_checkpoints_repeats_them(tmp_path):
    """As after a kill: the journal is further than the newest checkpoint that is whole."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"checkpoint": {"every_steps": 10, "every_epochs": None}}
    undisturbed = run_ranks(2, live, whole, -1, changes)
    assert run_ranks(2, live, parts, 27, changes)[0][:2] == ("stopped", 27)
    saved = CheckpointFolder(parts / "x" / "checkpoints")
    for entry in saved.manifests()[-2:]:
        (saved.path / entry.file).write_bytes(b"")
    with (parts / "x" / "metrics.jsonl").open("a") as journal:
        journal.write('{"event": "train", "ti')
    assert run_ranks(2, live, parts, -1, changes) == undisturbed
    assert rows(parts, "train", "eval") == rows(whole, "train", "eval")
    (row,) = rows(parts, "resume")
    assert row["step"] == 10
    assert "step-00000027.pt has 0 bytes instead of" in row["passed_over"]
    assert sorted(path.name for path in saved.path.glob("*.pt.damaged")) == [
        "step-00000020.pt.damaged",
        "step-00000027.pt.damaged",
    ]


class Few(Digits):
    """Some digits as float32 or float64, whose methods are not those of the package."""

    def __init__(self, dtype, samples=400):
        super().__init__()
        self.inputs = torch.as_tensor(self.inputs[:samples]).to(dtype).numpy()
        self.targets = self.targets[:samples]

    def __getitems__(self, indices):
        return super().__getitems__(indices)


@contextmanager
def listing_what_is_trained():
    """List the indices of each micro-batch of this rank, in order; more may be read ahead."""
    trained, step = [], Stepper.step

    def listed(stepper, batches, lr):
        trained.extend(list(each.indices) for each in batches.micro_batches if each.samples)
        return step(stepper, batches, lr)

    Stepper.step = listed
    try:
        yield trained
    finally:
        Stepper.step = step


def live_anywhere(runtime, folder, steps, changes, dtype):
    """One life on any number of ranks; gives what this rank trained, and the weights."""
    torch.manual_seed(0)
    model = MLP(64, [32], 10).to(dtype)
    data = Few(dtype)
    config = describe(
        folder, log={"every_steps": 1}, **{"data": {"batch_size": 4}, "epochs": 2} | changes
    )
    with asking_after(steps) as wish, listing_what_is_trained() as trained:
        result = fit(config, runtime, model=model, train_set=data, stop=wish)
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    return result.status, result.step, trained, weights.numpy()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_other_ranks_take_the_same_steps(dtype, tolerance, tmp_path):
    """4 -> 2 -> 3 -> 1 ranks within one epoch of 25 steps, and on to 50.

    float32: 40 steps add up rounding errors of 2^-24 = 6e-8 each, which grow like a random walk:
    sqrt(40) x 6e-8 = 4e-7. float64 likewise from 1.1e-16.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first, *_ = run_ranks(4, live_anywhere, whole, -1, {}, dtype)
    reads = []
    for world_size, stop in ((4, 5), (2, 7), (3, 6), (1, -1)):
        lives = run_ranks(world_size, live_anywhere, parts, stop, {}, dtype)
        reads += [index for life in lives for batch in life[2] for index in batch]
    assert first[:2] == ("finished", 50)
    assert lives[0][:2] == ("finished", 50)
    assert sorted(reads) == sorted(list(range(400)) * 2)
    difference = abs(lives[0][3] - first[3]).max() / abs(first[3]).max()
    assert difference <= tolerance
    for key in ("step", "samples", "train/lr"):
        assert [r[key] for r in rows(parts, "train")] == [r[key] for r in rows(whole, "train")]
    losses = [[r["train/loss"] for r in rows(folder, "train")] for folder in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == torch.float32 else 1e-12)
    plan = json.loads((parts / "x" / "plan.json").read_text())
    assert (plan["world_size"], plan["global_batch"], plan["accumulate"]) == (1, 16, 4)


def test_a_rescaled_run_reads_every_sample_once(tmp_path):
    """2 ranks, 400 samples: stopped after 30 steps of 8; then 4 ranks take steps of 16.

    Step 15 of the new grid owns the samples from 240 on: nothing was read of it. Stopped at step 17
    (272), 3 ranks take steps of 12; step 22 owns 264 to 276, so its first 8 samples are left out.
    """
    changes = {"on_resize": "rescale"}
    reads = []
    for world_size, stop in ((2, 30), (4, 2), (3, -1)):
        lives = run_ranks(world_size, live_anywhere, tmp_path, stop, changes, torch.float32)
        reads += [index for life in lives for batch in life[2] for index in batch]
    assert sorted(reads) == sorted(list(range(400)) * 2)
    train = rows(tmp_path, "train")
    samples = [row["samples"] for row in train]
    assert samples == sorted(set(samples))
    assert samples[-1] == 800
    assert [row["step"] for row in rows(tmp_path, "resume")] == [15, 22]
    assert train[30]["samples"] == 256
    assert train[32]["samples"] == 276  # the short step in between
    assert train[-1]["epoch"] == 2.0


def normalized(runtime, folder, steps, changes):
    """One life of a model with batch normalization; gives what this rank trained."""
    torch.manual_seed(0)
    data = Few(torch.float32)
    basis = {"data": {"batch_size": 4}, "log": {"every_steps": 1}, "epochs": 1}
    with asking_after(steps) as stop, listing_what_is_trained() as trained:
        result = fit(
            describe(folder, **basis | changes),
            runtime,
            model=normalizing(),
            train_set=data,
            stop=stop,
        )
    return result.status, trained


def normalizing():
    return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def test_batch_normalization_in_the_rest_of_a_step_after_another_batch_size(tmp_path):
    """Two steps of 2 x 4 samples, then steps of 2 x 10: the first has 4 left, two for each rank.

    The loss of that step, worked out by hand from what each rank read; 1e-6 is some units in the
    last place of float32, since the sums are the same and their order is not.
    """
    run_ranks(2, normalized, tmp_path, 2, {})
    file = tmp_path / "x" / "checkpoints" / "step-00000002.pt"
    model = normalizing()
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    changes = {"name": "y", "resume": str(file), "data": {"batch_size": 10}}
    lives = run_ranks(2, normalized, tmp_path, -1, changes)
    data, loss = Few(torch.float32), nn.CrossEntropyLoss(reduction="sum")
    by_hand = 0.0
    for status, reads in lives:
        assert status == "finished"
        assert (len(reads[0]), len(reads[1])) == (2, 10)
        images, digits = map(torch.from_numpy, Digits.__getitems__(data, reads[0]))
        by_hand += loss(model(images), digits).item() / 4
    journal = read_journal(tmp_path / "y" / "metrics.jsonl")
    first = next(row for row in journal if "train/loss" in row)
    assert (first["step"], first["samples"]) == (1, 20)
    assert first["train/loss"] == pytest.approx(by_hand, rel=1e-6)


def test_batch_normalization_in_a_first_step_that_is_too_short(tmp_path):
    """Of the first step of 2 x 9 samples 16 were trained, which leaves one for each rank."""
    run_ranks(2, normalized, tmp_path, 2, {})
    path = str(tmp_path / "x")
    changes = {"name": "y", "resume": path, "data": {"batch_size": 9}}
    results = run_ranks(2, normalized, tmp_path, -1, changes, raises=True)
    assert {result.error for result in results} == {"ConfigError", "RemoteError"}
    assert (
        "data.batch_size is 9 with world size 2, so that a forward pass in the first step after "
        "the resume has as few samples as 1, too few for the batch normalization of Sequential; "
        "go on with the data.batch_size and the number of ranks of the checkpoint until the end of "
        "the epoch."
    ) in results[0].text
    remedy = {"name": "z", "resume": path}
    assert run_ranks(2, normalized, tmp_path, -1, remedy)[0][0] == "finished"


def test_batch_normalization_in_a_first_step_on_more_ranks(tmp_path):
    """2 x 4 samples, twice: of the first step of 5 x 4 samples 4 are left, for five ranks."""
    changes = {"on_resize": "rescale"}
    run_ranks(2, normalized, tmp_path, 2, changes)
    results = run_ranks(5, normalized, tmp_path, -1, changes, raises=True)
    assert "has as few samples as 0, too few" in next(
        result.text for result in results if result.error == "ConfigError"
    )
    assert run_ranks(2, normalized, tmp_path, -1, changes)[0][0] == "finished"


def reading_arrays(runtime, folder, place, steps):
    """One life on data in a folder of the job."""
    torch.manual_seed(0)
    arrays = {"class_path": "ddp_sgd.data.Arrays", "init_args": {"path": str(place / "x.npz")}}
    data = {"batch_size": 4, "train": arrays, "eval": None}
    config = describe(folder, data=data, epochs=1, log={"every_steps": 1})
    with asking_after(steps) as stop:
        result = fit(config, runtime, model=MLP(4, [], 2), stop=stop)
    return result.status, result.weights_digest


@pytest.mark.parametrize("world_size", [1, 2])
def test_data_may_move_and_other_data_are_refused(world_size, tmp_path):
    """The scratch folder of a job has another name each time."""
    places = [tmp_path / name for name in ("job1", "job2", "job3")]
    inputs = np.arange(160, dtype=np.float32).reshape(40, 4)
    for place, values in zip(places, (inputs, inputs, inputs[::-1]), strict=True):
        place.mkdir()
        np.savez(place / "x.npz", x_train=values, y_train=np.arange(40) % 2)
    here, there, other = places
    undisturbed = run_ranks(world_size, reading_arrays, tmp_path / "whole", here, -1)
    run_ranks(world_size, reading_arrays, tmp_path, here, 2)
    results = run_ranks(world_size, reading_arrays, tmp_path, other, -1, raises=True)
    assert sorted(result.error for result in results) == sorted(
        ["RefusedError", *["RemoteError"] * (world_size - 1)]
    )
    assert "the input of data.train[0] was a mean of 1.5" in next(
        result.text for result in results if result.error == "RefusedError"
    )
    assert run_ranks(world_size, reading_arrays, tmp_path, there, -1) == undisturbed


def refused(runtime, folder, changes):
    return live_anywhere(runtime, folder, -1, changes, torch.float32)


def test_a_run_that_must_not_be_resized_is_not(tmp_path):
    changes = {"on_resize": "refuse"}
    run_ranks(2, live_anywhere, tmp_path, 3, changes, torch.float32)
    before = (tmp_path / "x" / "metrics.jsonl").read_bytes()
    results = run_ranks(3, refused, tmp_path, changes, raises=True)
    assert sorted(r.error for r in results) == [
        "RefusedError", "RemoteError", "RemoteError",
    ]  # fmt: skip
    assert "on_resize is refuse, and the run was saved on 2 ranks" in results[0].text
    assert (tmp_path / "x" / "metrics.jsonl").read_bytes() == before
    assert run_ranks(2, live_anywhere, tmp_path, -1, changes, torch.float32)[0][0] == "finished"


def only_rank_0_sees_the_folder(runtime, folder, steps):
    """Every rank has an output folder of its own, as on machines without a shared disk."""
    return live(runtime, folder / str(runtime.rank), steps, {})


def test_no_other_rank_reads_the_folder(tmp_path):
    run_ranks(2, only_rank_0_sees_the_folder, tmp_path / "parts", 11)
    assert not (tmp_path / "parts" / "1").exists()
    done = run_ranks(2, only_rank_0_sees_the_folder, tmp_path / "parts", -1)
    assert done == run_ranks(2, live, tmp_path / "whole", -1, {})


class Counting(nn.Linear):
    """Scales by a count of its passes, which is neither parameter nor buffer."""

    def __init__(self):
        super().__init__(64, 10)
        self.passes = 0

    def forward(self, inputs):
        self.passes += self.training
        return super().forward(inputs.flatten(1)) / (1 + 0.1 * self.passes)

    def get_extra_state(self):
        return {"passes": self.passes}

    def set_extra_state(self, state):
        self.passes = state["passes"]


def counting(runtime, folder, steps):
    torch.manual_seed(0)
    config = describe(folder, log={"every_steps": 1}, data={"batch_size": 8, "eval": None})
    with asking_after(steps) as wish:
        model = Counting()
        fit(config, runtime, model=model, train_set=Noisy(), stop=wish)
    return weights_digest(model), model.passes


def test_state_that_is_no_tensor_comes_back_on_every_rank(tmp_path):
    whole = run_ranks(2, counting, tmp_path / "whole", -1)
    run_ranks(2, counting, tmp_path / "parts", 17)
    assert run_ranks(2, counting, tmp_path / "parts", -1) == whole


def digest_of_the_model(runtime, folder):
    torch.manual_seed(runtime.rank)
    model = Everything()
    result = fit(describe(folder), runtime, model=model, train_set=Noisy())
    return result.weights_digest, weights_digest(model)


def test_the_model_of_a_finished_run_has_its_weights(tmp_path):
    (trained, _, digest), _ = run_ranks(2, live, tmp_path, -1, {})
    assert trained == "finished"
    assert run_ranks(2, digest_of_the_model, tmp_path) == [(digest, digest)] * 2


def test_a_finished_run_gives_its_result_to_all_ranks(tmp_path):
    first = run_ranks(2, live, tmp_path, -1, {})
    before = (tmp_path / "x" / "metrics.jsonl").read_bytes()
    assert run_ranks(2, live, tmp_path, -1, {}) == first
    assert (tmp_path / "x" / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(tmp_path / "x" / "checkpoints")
    assert run_ranks(2, live, tmp_path, -1, {}) == first


def tracked(runtime, folder, steps):
    return live(runtime, folder, steps, {"wandb": {"mode": "offline"}})


def test_w_and_b_goes_on_in_one_run_with_the_journal_s_rows(tmp_path, monkeypatch):
    """Stopped once, and once set back: the rows after the checkpoint come a second time."""
    isolate_wandb(monkeypatch, tmp_path / "home")
    parts = tmp_path / "parts"
    run_ranks(2, tracked, parts, 17)
    saved = CheckpointFolder(parts / "x" / "checkpoints")
    (saved.path / saved.manifests()[-1].file).write_bytes(b"")
    run_ranks(2, tracked, parts, 9)
    assert rows(parts, "resume")[0]["step"] == 13
    run_ranks(2, tracked, parts, -1)
    assert len(list((parts / "x" / "wandb").glob("offline-run-*"))) == 3
    logged = [
        (row["step"], "eval/loss" in row)
        for row in inspect_offline_run(parts / "x")
        if "samples" in row
    ]
    written = [(row["step"], row["event"] == "eval") for row in rows(parts, "train", "eval")]
    assert sorted(logged) == sorted(written)
    assert len(set(logged)) == len(logged) == 39 + 3
