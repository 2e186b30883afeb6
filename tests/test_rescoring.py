import pytest
from ranks import run_ranks
from saved_run import describe, files_of, train
from torch import nn

from ddp_sgd.checkpointing.store import read_manifest
from ddp_sgd.config import RunConfig, read_command_line
from ddp_sgd.data import Digits
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.evaluate import look_up, score_again
from ddp_sgd.report.journal import read_journal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    digests = run_ranks(2, train, folder)
    return folder / "tiny", digests[0]


def rescore(runtime, path, argv=()):
    """Other ranks than 0 are told a path that leads nowhere."""
    line = read_command_line(["x", *argv], {}, program="", about="", argument="X")
    saved = look_up(path if runtime.rank == 0 else path / "nowhere", line.over, runtime)
    return score_again(saved, runtime)


def test_any_number_of_ranks_gives_what_the_run_wrote(run):
    folder, digest = run
    rows = read_journal(folder / "metrics.jsonl")
    written = [row for row in rows if row["event"] == "eval"]
    for world_size, file, row in zip((1, 2, 3), files_of(folder), written, strict=True):
        expected = {key: value for key, value in row.items() if key.startswith("eval/")}
        for scores, _ in run_ranks(world_size, rescore, file):
            assert scores == expected
    results = [run_ranks(world_size, rescore, folder) for world_size in (1, 2, 3)]
    assert {digest for ranks in results for _, digest in ranks} == {digest}
    assert all(scores == results[0][0][0] for ranks in results for scores, _ in ranks)


def test_changes_are_laid_over_the_run(run):
    folder, _ = run
    ((scores, _),) = run_ranks(1, rescore, folder, ["--data.eval.init_args.split=train"])
    assert scores["eval/count"] == 1437


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.eval=null"], "data.eval is null; name a data set, such as --data.eval.class"),
        (
            ["--model.init_args.widths=[5]"],
            "model is ddp_sgd.models.ConvNet, which the saved weights do not fit: ",
        ),
        (["--loss.class_path=ddp_sgd.models.MPL"], "did you mean MLP"),
    ],
)
def test_what_does_not_fit_is_reported_by_one_rank(run, argv, message):
    folder, _ = run
    results = run_ranks(2, rescore, folder, argv, raises=True)
    first, second = sorted(results, key=lambda result: result.error)
    assert (first.error, second.error) == ("ConfigError", "RemoteError")
    assert message in str(first)


def test_a_missing_checkpoint_is_reported_by_rank_0(tmp_path):
    first, second = run_ranks(2, rescore, tmp_path, raises=True)
    assert (first.error, second.error) == ("DataError", "RemoteError")
    assert "holds no checkpoint that is whole" in str(first)


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)


def square(outputs, targets):
    return nn.functional.multi_margin_loss(outputs, targets)


@pytest.fixture
def python_run(tmp_path):
    config = RunConfig(
        output_dir=str(tmp_path), epochs=1, data={"batch_size": 200}, wandb={"mode": "disabled"}
    )
    parts = {"model": Linear(), "loss": square, "train_set": Digits(), "eval_set": Digits("eval")}
    return tmp_path / "digits", fit(config, Runtime(), **parts)


def forget_new_keys(folder):
    """Make checkpoints look as if an older release had written them."""
    for path in (folder / "checkpoints").glob("step-*.json"):
        manifest = read_manifest(path)
        for key in ("args", "call"):
            del manifest.header.config["loss"][key]
        path.write_text(manifest.to_text())


@pytest.mark.parametrize("release", ["this", "older"])
def test_what_was_given_in_python_has_to_be_named(python_run, release):
    folder, result = python_run
    if release == "older":
        forget_new_keys(folder)
    with pytest.raises(ConfigError, match=r"loss is .*CrossEntropyLoss\(\), while the run was"):
        rescore(Runtime(), folder)
    margin = "--loss.class_path=torch.nn.MultiMarginLoss"
    with pytest.raises(ConfigError, match="weight was float32 .* is absent.*name the model that"):
        rescore(Runtime(), folder, [margin])
    model = ["--model.class_path=torch.nn.Linear", "--model.init_args.in_features=64"]
    argv = [margin, *model, "--model.init_args.out_features=10"]
    assert rescore(Runtime(), folder, argv) == (result.scores, result.weights_digest)


def test_a_changed_configuration_is_checked_as_ever(run):
    folder, _ = run
    with pytest.raises(ConfigError, match="schedule.milestones is"):
        rescore(Runtime(), folder, ["--schedule.milestones=[3]"])
    assert describe(folder).epochs == 3


def test_an_unreadable_data_set_is_named(run, tmp_path):
    folder, _ = run
    argv = ["--data.eval.class_path=ddp_sgd.data.Arrays"]
    argv += [f"--data.eval.init_args.path={tmp_path}/no.npz", "--data.eval.init_args.split=test"]
    with pytest.raises(DataError, match=r"no.npz"):
        rescore(Runtime(), folder, argv)
