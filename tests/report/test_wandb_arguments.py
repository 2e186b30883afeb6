import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.plan import make_plan
from ddp_sgd.report.logger import RunRecord
from ddp_sgd.report.wandb_arguments import git_commit, init_arguments

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


def test_git_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run(["git", "add", "f"], check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "x"], check=True)
    clean = git_commit()
    assert len(clean) == 40
    (tmp_path / "f").write_text("2")
    assert git_commit() == clean + "+changes"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
