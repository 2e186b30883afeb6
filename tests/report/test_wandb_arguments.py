from dataclasses import replace
from types import SimpleNamespace

import pytest

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.plan import make_plan
from ddp_sgd.report.sink import RunRecord
from ddp_sgd.report.wandb_arguments import init_arguments

CONFIG = RunConfig(name="trial", epochs=2)


@pytest.fixture
def record(tmp_path):
    return RunRecord(
        folder=tmp_path,
        name="trial",
        config=CONFIG.model_dump(mode="json"),
        plan=make_plan(CONFIG, samples=1437, world_size=2),
        world_size=2,
        run_id="cafe0123",
        resumed=False,
    )


def _arguments(record, *, run_id=None):
    settings = SimpleNamespace(run_id=run_id, project=None, run_name=None)
    return init_arguments(WandbConfig(), settings, record)


def _keep(record, content):
    (record.folder / "wandb").mkdir()
    (record.folder / "wandb" / "run_id").write_bytes(content)


def test_a_run_has_its_own_id_unless_the_user_names_one(record):
    assert _arguments(record)["id"] == "cafe0123"
    assert _arguments(record, run_id="their-id")["id"] is None


def test_only_a_resumed_run_goes_on_in_a_run_that_is_there(record):
    assert _arguments(record)["resume"] is None
    assert _arguments(replace(record, resumed=True))["resume"] == "allow"


def test_a_resumed_run_keeps_the_id_of_its_earlier_lives(record):
    _keep(record, b"their-id\n")
    assert _arguments(replace(record, resumed=True), run_id="another")["id"] == "their-id"
    assert _arguments(record)["id"] == "cafe0123"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_an_id_that_was_not_kept_leaves_the_runs_own(record, content):
    _keep(record, content)
    assert _arguments(replace(record, resumed=True))["id"] == "cafe0123"
    assert _arguments(replace(record, resumed=True), run_id="their-id")["id"] is None


def test_a_run_that_kept_no_id_uses_its_own(record):
    assert _arguments(replace(record, resumed=True))["id"] == "cafe0123"
