"""Every sample once, and the same bits on any number of ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from ddp_sgd.data import Digits, InMemory
from ddp_sgd.data.loader import EvalLoader
from ddp_sgd.data.sampler import EvalSampler
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import evaluation as module
from ddp_sgd.engine.components import read_batch
from ddp_sgd.engine.evaluation import Interrupted, evaluate, evaluating
from ddp_sgd.engine.labels import is_classification
from ddp_sgd.engine.sanity_check import check_evaluation
from ddp_sgd.losses import Objective
from ddp_sgd.models import MLP, ConvNet
from ddp_sgd.named_losses import LossForm

CPU = torch.device("cpu")


def score(runtime, dataset, model, loss, batch_size=32, workers=0, **options):
    chunks = EvalSampler(
        len(dataset), batch_size=batch_size, rank=runtime.rank, world_size=runtime.world_size
    )
    loader = EvalLoader(dataset, chunks, seed=0, workers=workers, device=CPU)
    targets = torch.as_tensor(dataset.targets)
    return evaluate(model, Objective(loss, targets, **options), loader, runtime)


def digits_model():
    torch.manual_seed(0)
    return ConvNet(widths=[8], batch_norm=True)


def score_digits(runtime, batch_size):
    dataset = Digits("eval", shape="image")
    model = digits_model().train()
    weighted = nn.CrossEntropyLoss(weight=torch.linspace(0.1, 2, 10))
    return (
        score(runtime, dataset, model, nn.CrossEntropyLoss(), batch_size),
        score(runtime, dataset, model, weighted, batch_size),
        model.training,
        model.stages[1].num_batches_tracked.item(),
    )


def score_in_batches(runtime):
    return [score_digits(runtime, batch_size) for batch_size in (32, 7, 360, 1000)]


def test_the_same_bits_on_any_number_of_ranks():
    (expected,) = run_ranks(1, score_in_batches)
    for world_size in (2, 3, 4):
        assert run_ranks(world_size, score_in_batches) == [expected] * world_size
    assert all(each[2:] == (True, 0) for each in expected)  # mode and buffers are left alone


class Terms:
    """Two numbers by name, each with units of its own; in half of the chunks one has none."""

    def __call__(self, outputs, targets):
        each = nn.functional.cross_entropy(outputs, targets, reduction="none")
        is_first = (targets == 0).double()
        return {"all": each.mean(), "zeros": (each * is_first).sum() / is_first.sum()}

    def units(self, targets):
        return {"all": len(targets), "zeros": (targets == 0).sum()}


def score_terms(runtime):
    dataset = Digits("eval", shape="image")
    form = LossForm(("all", "zeros"), is_mapping=True, adds_up=True, units_by_name=True)
    return score(runtime, dataset, digits_model(), Terms(), batch_size=7, form=form)


def test_named_numbers_have_the_same_bits_on_any_number_of_ranks():
    expected = score_terms(Runtime())
    assert expected["eval/loss"] == expected["eval/all"] + expected["eval/zeros"]
    for world_size in (2, 3):
        assert run_ranks(world_size, score_terms) == [expected] * world_size


def test_units_that_are_counted_on_the_device_give_the_same_scores(monkeypatch):
    (expected, weighted, *_) = score_digits(Runtime(), 32)
    monkeypatch.setattr(module, "counts_on_host", lambda _: False)
    assert score_digits(Runtime(), 32)[:2] == (
        expected,
        {**weighted, "eval/loss": pytest.approx(weighted["eval/loss"], rel=1e-14)},
    )


def test_against_plain_torch():
    dataset, model = Digits("eval", shape="image"), digits_model()
    metrics = score(Runtime(), dataset, model, nn.CrossEntropyLoss())
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(dataset.inputs))
    targets = torch.from_numpy(dataset.targets)
    top5 = (outputs.topk(5, dim=1).indices == targets[:, None]).any(1).sum().item()
    correct = (outputs.argmax(1) == targets).sum().item()
    assert metrics == {
        "eval/loss": pytest.approx(nn.functional.cross_entropy(outputs, targets).item(), rel=1e-6),
        "eval/count": 360,
        "eval/accuracy": correct / 360,
        "eval/correct": correct,
        "eval/accuracy_top5": top5 / 360,
        "eval/correct_top5": top5,
    }


def test_more_ranks_than_samples(tmp_path):
    assert run_ranks(3, score_two) == [run_ranks(1, score_two)[0]] * 3


def score_two(runtime):
    dataset = InMemory(np.eye(2, dtype=np.float32), np.array([0, 1]))
    torch.manual_seed(0)
    return score(runtime, dataset, MLP(2, [], 2), nn.CrossEntropyLoss(), batch_size=1)


def test_few_classes_have_no_top5_and_regression_no_accuracy():
    inputs = np.zeros((3, 2), dtype=np.float32)
    few = score(
        Runtime(), InMemory(inputs, np.array([0, 1, 2])), MLP(2, [], 3), nn.CrossEntropyLoss()
    )
    assert set(few) == {"eval/loss", "eval/count", "eval/accuracy", "eval/correct"}
    ones = InMemory(inputs, np.ones((3, 1), dtype=np.float32))
    model = MLP(2, [], 1)
    nn.init.zeros_(model[-1].bias)
    assert score(Runtime(), ones, model, nn.MSELoss()) == {"eval/loss": 1.0, "eval/count": 3}


def test_targets_may_be_containers():
    class Pairs:
        targets = torch.zeros(4)

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.ones(2), {"a": torch.zeros(1), "b": torch.zeros(1)}

    metrics = score(Runtime(), Pairs(), MLP(2, [], 1), lambda out, t: ((out - t["a"]) ** 2).mean())
    assert metrics["eval/count"] == 4


@pytest.mark.parametrize(
    ("outputs", "targets", "answer"),
    [
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), True),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), False),
        (torch.zeros(3, 4), torch.zeros(3, 4), False),
        (torch.zeros(3, 4, 2), torch.zeros(3, 2, dtype=torch.long), False),
        ({"scores": torch.zeros(3, 4)}, torch.zeros(3, dtype=torch.long), False),
        (torch.zeros(3, 4), [1, 2, 3], False),
    ],
)
def test_is_classification(outputs, targets, answer):
    assert is_classification(outputs, targets) is answer


def test_a_prediction_of_an_ignored_class_is_no_correct_one():
    scores = torch.tensor([[0.0, 9.0], [9.0, 0.0], [0.0, 9.0]])
    dataset = InMemory(scores.numpy(), np.array([1, 0, 0]))
    loss = nn.CrossEntropyLoss(ignore_index=1)
    metrics = score(Runtime(), dataset, nn.Identity(), loss)
    assert (metrics["eval/correct"], metrics["eval/accuracy"]) == (1, 0.5)


def test_ignored_targets_are_not_judged():
    inputs = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    model = MLP(2, [], 2)
    model[-1].weight.data, model[-1].bias.data = 5 * torch.eye(2), torch.zeros(2)
    metrics = score(
        Runtime(), InMemory(inputs, np.array([0, 1, -100, 0])), model, nn.CrossEntropyLoss()
    )
    assert (metrics["eval/correct"], metrics["eval/count"]) == (2, 4)
    assert metrics["eval/accuracy"] == 2 / 3


class Reusing(nn.Module):
    """Gives a part of something large, in memory that the next call uses again."""

    def __init__(self, classes):
        super().__init__()
        self.kept = torch.zeros(64, 4, classes)

    def forward(self, inputs):
        part = self.kept[: len(inputs)]
        part[:, -1] = inputs
        return part[:, -1]


@pytest.mark.parametrize(("samples", "batch_size"), [(1, 1), (200, 1), (130, 2), (640, 64)])
@pytest.mark.parametrize("classes", [4, 7, 300])
def test_right_answers_of_many_chunks_are_counted_together(samples, batch_size, classes):
    torch.manual_seed(0)
    scores, targets = torch.randn(samples, classes), torch.randint(classes, (samples,))
    dataset = InMemory(scores, targets)
    metrics = score(Runtime(), dataset, Reusing(classes), nn.CrossEntropyLoss(), batch_size)
    assert metrics["eval/correct"] == (scores.argmax(1) == targets).sum()
    assert metrics["eval/count"] == samples
    if classes > 5:
        top5 = (scores.topk(5, dim=1).indices == targets[:, None]).any(1)
        assert metrics["eval/correct_top5"] == top5.sum()


def test_units_are_exact_whatever_numbers_a_user_prefers():
    weights = torch.linspace(0.1, 2, 7, dtype=torch.float64)
    scores, targets = torch.randn(50, 7, dtype=torch.float64), torch.randint(7, (50,))
    loss = nn.CrossEntropyLoss(weight=weights)
    torch.set_default_dtype(torch.bfloat16)
    try:
        metrics = score(Runtime(), InMemory(scores, targets), nn.Identity(), loss, 9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert metrics["eval/loss"] == pytest.approx(loss(scores, targets).item(), rel=1e-14)


def test_scores_that_are_no_numbers_give_no_accuracy():
    """argmax would take NaN for the largest score, and class 0 or so for the answer."""
    inputs = torch.zeros(6, 4)
    dataset = InMemory(inputs, torch.zeros(6, dtype=torch.int64))
    model = MLP(4, [], 2)
    assert "eval/accuracy" in score(Runtime(), dataset, model, nn.CrossEntropyLoss(), 4)
    inputs[5] = torch.nan
    metrics = score(Runtime(), dataset, model, nn.CrossEntropyLoss(), 4)
    assert metrics.keys() == {"eval/loss", "eval/count"}
    assert np.isnan(metrics["eval/loss"])
    assert metrics["eval/count"] == 6


def test_a_loss_of_no_classes_gives_no_accuracy():
    def nearest(outputs, targets):
        return (outputs - targets[:, None]).square().mean()

    metrics = score(Runtime(), Digits("eval"), MLP(64, [], 10), nearest)
    assert metrics.keys() == {"eval/loss", "eval/count"}


class Merging(nn.Linear):
    """Does more in ``train`` than set flags, as adapters that are merged for evaluation."""

    def __init__(self):
        super().__init__(64, 10)
        self.merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_a_model_comes_back_from_evaluation_by_its_own_method():
    model = nn.Sequential(Merging(), nn.Dropout(), nn.BatchNorm1d(10))
    model[2].eval()
    with evaluating(model):
        assert model[0].merged
        assert not any(module.training for module in model.modules())
    assert not model[0].merged
    assert [module.training for module in model] == [True, True, False]


class AllGathered(nn.Module):
    """A loss over the samples of all ranks, which each of them must call."""

    def forward(self, outputs, targets):
        parts = [torch.empty_like(outputs) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, outputs)
        return torch.stack(parts).mean() + outputs.square().mean()


def score_together(runtime, stop_on):
    """Nine chunks of four samples."""
    dataset = InMemory(torch.ones(36, 4), torch.zeros(36, dtype=torch.int64))
    torch.manual_seed(0)
    model, loss = MLP(4, [], 2), AllGathered()
    batch = read_batch(dataset, "data.eval", batch_size=4, collate=None)
    facts = check_evaluation(model, loss, dataset, batch, runtime)
    chunks = EvalSampler(
        36,
        batch_size=4,
        rank=runtime.rank,
        world_size=runtime.world_size,
        in_step=facts.communicates,
    )
    loader = EvalLoader(dataset, chunks, seed=0, workers=0, device=CPU)
    asked = iter([False, False, runtime.rank == stop_on])

    def interrupted():
        return next(asked, False)

    try:
        metrics = evaluate(model, facts.objective, loader, runtime, interrupted=interrupted)
    except Interrupted:
        return "interrupted"
    return metrics["eval/count"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_loss_that_talks_to_other_ranks_is_called_equally_often(world_size):
    assert run_ranks(world_size, score_together, None) == [36] * world_size
    assert run_ranks(world_size, score_together, 1) == ["interrupted"] * world_size
