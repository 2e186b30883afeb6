"""What section ``data`` becomes; runs that read by it are in other files."""

import pytest

from ddp_sgd.config.sections import DataConfig
from ddp_sgd.data import Digits
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.reading import build_reading, place_arrays
from ddp_sgd.errors import ConfigError

FLIP = {"class_path": "ddp_sgd.data.augment.RandomHorizontalFlip"}


def reading(trains=True, **data):
    return build_reading(DataConfig.model_validate(data), 7, trains=trains)


def test_the_section_is_built():
    built = reading(batch_size=4, workers=2, device="host", train_transforms=[FLIP, FLIP])
    assert built[:3] == (4, 2, 7)
    assert (built.collate, built.device) == (None, "host")
    assert (len(built.train_transforms), len(built.eval_transforms)) == (2, 0)


def test_an_evaluation_builds_no_transforms_of_training():
    missing = {"class_path": "missing.Transform"}
    built = reading(trains=False, train_transforms=[missing], eval_transforms=[FLIP])
    assert (len(built.train_transforms), len(built.eval_transforms)) == (0, 1)


def test_what_cannot_be_called_is_named():
    with pytest.raises(ConfigError, match=r"^data\.train_transforms\[1\] is a object; name"):
        reading(train_transforms=[FLIP, {"class_path": "builtins.object"}])


def test_arrays_stay_on_the_host_where_that_computes():
    assert place_arrays(Digits(), "data.train", reading(), Runtime()) is None
