"""Models whose output is the loss: ``loss: null``."""

import json
from dataclasses import replace

import pytest
import torch
from models import samples
from models.networks import CLASSES, WIDTH
from models.training import (
    Case,
    Outcome,
    describe,
    distance,
    outcome_of,
    reference,
    train,
    train_all,
    whole_batches,
)
from ranks import run_ranks
from torch import nn
from torch.nn import functional
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError, RefusedError

TOLERANCE = 1e-12
"""As in test_exact_models.py; RetinaNet computes in float32 in places: see there."""


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, inputs, targets):
        return functional.cross_entropy(self.net(inputs), targets)


class Several(Classifier):
    def forward(self, inputs, targets):
        scores = self.net(inputs)
        return {"fit": functional.cross_entropy(scores, targets), "size": scores.square().mean()}


class Pair(Classifier):
    """Two inputs, and targets after them."""

    def forward(self, first, second, targets):
        return functional.cross_entropy(self.net(first) + self.net(second), targets)


class ByName(Classifier):
    def forward(self, first, second, *, targets=None):
        return functional.cross_entropy(self.net(first) - self.net(second), targets)


class Autoencoder(Classifier):
    def forward(self, inputs):
        return self.net(inputs).square().mean()


class EitherWay(Classifier):
    """Gives scores, or with targets their loss."""

    def forward(self, inputs, targets=None):
        scores = self.net(inputs)
        return scores if targets is None else functional.cross_entropy(scores, targets)


class OnlyInTraining(Classifier):
    """As torchvision's detection models are."""

    def forward(self, inputs, targets=None):
        scores = self.net(inputs)
        return functional.cross_entropy(scores, targets) if self.training else list(scores)


def unnamed_pairs():
    return samples.made_by(
        lambda draw, n: ((draw.numbers(WIDTH), draw.numbers(WIDTH)), samples.label(n))
    )()


def named_pairs():
    return samples.made_by(
        lambda draw, n: (
            {"first": draw.numbers(WIDTH), "second": draw.numbers(WIDTH)},
            samples.label(n),
        )
    )()


class Alone:
    """Forms batches without targets."""

    def __call__(self, parts):
        return torch.stack([inputs for inputs, _ in parts]), None


def positionally(model, inputs_targets):
    (first, second), targets = inputs_targets
    return model(first, second, targets)


CASES = {
    "a tensor": (Case(model=Classifier, data=samples.rows()), lambda m, b: m(*b)),
    "a mapping": (Case(model=Several, data=samples.rows()), lambda m, b: sum(m(*b).values())),
    "two inputs": (Case(model=Pair, data=unnamed_pairs), positionally),
    "by keyword": (Case(model=ByName, data=named_pairs), lambda m, b: m(**b[0], targets=b[1])),
    "no targets": (
        Case(model=Autoencoder, data=samples.rows(), collate=Alone), lambda m, b: m(b[0])
    ),
}  # fmt: skip


def null(case):
    return replace(case, loss=lambda: None, changes={"loss": None})


def by_hand(case, call):
    """Three steps of plain torch; what the model gives is the loss."""
    whole = replace(case, loss=lambda: lambda outputs, targets: outputs)
    batch = case.batch(range(len(case.data())))
    return reference(whole, whole_batches(case), call=lambda model, _: call(model, batch))


def train_them(runtime, folder):
    cases = {name: null(case) for name, (case, _) in CASES.items()}
    return train_all(runtime, folder, cases, accumulate=2)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, train_them, tmp_path_factory.mktemp("ranks"))


def compare(name, outcome):
    case, call = CASES[name]
    model = by_hand(case, call)
    assert distance(outcome.parameters, outcome_of(model).parameters) <= TOLERANCE
    batch = case.batch(range(len(case.data())))
    assert outcome.scores["eval/loss"] == pytest.approx(call(model, batch).item(), rel=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name, tmp_path):
    compare(name, train(null(CASES[name][0]), Runtime(), tmp_path, accumulate=3))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name, two_ranks):
    compare(name, Outcome.unpack(two_ranks[0][name]))


def test_a_model_without_a_loss_in_evaluation_is_refused_with_the_fix(tmp_path):
    case = null(Case(model=OnlyInTraining, data=samples.rows()))
    with pytest.raises(ConfigError, match=r"loss is null while .* in evaluation mode; set data.ev"):
        train(case, Runtime(), tmp_path)


def test_a_model_that_gives_no_loss_is_refused(tmp_path):
    case = null(Case(model=lambda: nn.Linear(WIDTH, 3), data=samples.rows(), collate=Alone))
    with pytest.raises(ConfigError, match="loss is null while the model gives float64 of shape"):
        train(case, Runtime(), tmp_path)


def test_a_loss_in_place_of_the_output_is_another_run(tmp_path):
    case = Case(model=EitherWay, data=samples.rows())
    digest = train(null(case), Runtime(), tmp_path / "null").digest
    assert train(case, Runtime(), tmp_path / "scores").digest == digest
    assert train(null(case), Runtime(), tmp_path / "null", epochs=5).status == "finished"
    with pytest.raises(RefusedError, match="loss.class_path was None, is torch.nn.CrossEntropyLo"):
        train(case, Runtime(), tmp_path / "null", epochs=7)
    with pytest.raises(RefusedError, match="loss.class_path was torch.nn.CrossEntropyLoss, is Non"):
        train(null(case), Runtime(), tmp_path / "scores", epochs=5)


class Boxes:
    """Images with one or two boxes each, in the form of torchvision's detection models."""

    def __init__(self, images=6):
        draw = torch.Generator().manual_seed(3)
        self.images = torch.rand(images, 3, 32, 32, generator=draw)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        boxes = torch.tensor([[2.0, 3.0, 18.0, 20.0], [10.0, 8.0, 30.0, 28.0]])[: 1 + index % 2]
        return self.images[index], {"boxes": boxes, "labels": torch.arange(len(boxes)) + 1}


class AsLists:
    """Forms lists of images and of targets."""

    def __call__(self, parts):
        return [image for image, _ in parts], [target for _, target in parts]


def detector():
    """A small RetinaNet, whose loss is the mean of the losses of the images."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
    )
    backbone.out_channels = 8
    anchors = AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    size = {"min_size": 32, "max_size": 32}
    return RetinaNet(backbone, num_classes=3, anchor_generator=anchors, **size)


DETECTION = Case(model=detector, data=Boxes, collate=AsLists, dtype=torch.float32)


def detect(runtime, folder, accumulate):
    return train_without_scores(null(DETECTION), runtime, folder, accumulate=accumulate).pack()


def train_without_scores(case, runtime, folder, **options):
    """Train without evaluation, where these models give boxes."""
    model = case.build_model()
    config = describe(case, folder, runtime.world_size, **options)
    fit(config, runtime, model=model, train_set=case.data())
    return outcome_of(model)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 3), (2, 2)])
def test_a_detector_of_torchvision_takes_the_step_of_all_images(world_size, accumulate, tmp_path):
    outcome = Outcome.unpack(run_ranks(world_size, detect, tmp_path, accumulate)[0])
    model = by_hand(DETECTION, lambda model, batch: sum(model(*batch).values()))
    # float32: sums in another order, over three steps, and a backward pass of convolutions.
    assert distance(outcome.parameters, outcome_of(model).parameters) <= 1e-5
    assert distance(outcome.parameters, outcome_of(DETECTION.build_model()).parameters) > 1e-4
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    row = next(row for row in map(json.loads, rows) if row["event"] == "train")
    parts = row["train/bbox_regression"] + row["train/classification"]
    assert row["train/loss"] == pytest.approx(parts, rel=1e-6)


def test_a_detector_that_is_scored_is_refused_with_the_fix(tmp_path):
    with pytest.raises(ConfigError, match=r"gives a list .* in evaluation mode; set data.eval=nul"):
        train(null(DETECTION), Runtime(), tmp_path)
