"""A run with nothing left to do, whose data or test set may be others by now."""

import shutil

import pytest

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.components import Given
from ddp_sgd.engine.finished_run import lacks_test
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.engine.resume import find_resume_point
from ddp_sgd.errors import RefusedError
from ddp_sgd.models import MLP
from ddp_sgd.report.journal import read_journal
from ddp_sgd.report.run_folder import claim_run_folder

TEST = {"class_path": "ddp_sgd.data.Digits", "init_args": {"split": "train"}}


def describe(folder, test=None):
    settings = {"output_dir": str(folder), "epochs": 1, "wandb": {"mode": "disabled"}}
    return RunConfig.model_validate(settings | {"data": {"test": test}})


def is_untested(config, given):
    with claim_run_folder(config, Runtime()) as folder:
        return lacks_test(find_resume_point(config, folder, Runtime()), config, given)


def test_a_test_set_is_lacking_until_it_was_scored(tmp_path):
    fit(describe(tmp_path), Runtime())
    assert not is_untested(describe(tmp_path), Given())
    assert is_untested(describe(tmp_path, TEST), Given())
    assert is_untested(describe(tmp_path), Given(test_set=Digits("eval")))
    fit(describe(tmp_path, TEST), Runtime())
    assert not is_untested(describe(tmp_path, TEST), Given())
    assert not is_untested(describe(tmp_path), Given(test_set=Digits("eval")))


def test_a_run_whose_weights_are_lost_is_not_trained_again_for_a_test(tmp_path):
    without = fit(describe(tmp_path), Runtime())
    shutil.rmtree(tmp_path / "digits" / "checkpoints")
    again = fit(describe(tmp_path, TEST), Runtime())
    assert (again.scores, again.weights_digest) == (without.scores, without.weights_digest)
    rows = read_journal(tmp_path / "digits" / "metrics.jsonl")
    assert not [row for row in rows if "test/count" in row]


def test_a_model_gets_the_last_weights_and_other_data_are_refused(tmp_path):
    result = fit(describe(tmp_path, TEST), Runtime())
    model = MLP(64, [64, 64], 10)
    assert fit(describe(tmp_path, TEST), Runtime(), model=model).scores == result.scores
    assert weights_digest(model) == result.weights_digest
    with pytest.raises(RefusedError, match="data.train had 1437 samples, has 360"):
        fit(describe(tmp_path, TEST), Runtime(), train_set=Digits("eval"))
