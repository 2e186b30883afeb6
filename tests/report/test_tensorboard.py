import importlib.util
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddp_sgd.errors import ConfigError
from ddp_sgd.report.tensorboard import TensorBoard

AXES = {"time": 1.7e9, "step": 10, "epoch": 0.5, "samples": 320}


def _scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_scalars_are_read_back_at_their_steps_and_times(tmp_path):
    said = []
    logger = TensorBoard(echo=said.append)
    logger.start(SimpleNamespace(folder=tmp_path))
    logger.write([("start", AXES)])
    logger.write([("train", {**AXES, "train/loss": 2.25, "train/grad_norm": None, "note": "text"})])
    logger.write([("eval", {**AXES, "step": 20, "eval/accuracy": 0.75})])
    logger.write([("end", {**AXES, "wall_s": 1.0})])
    logger.finish({})
    scalars = _scalars(tmp_path)
    assert set(scalars) == {"epoch", "samples", "train/loss", "eval/accuracy"}
    (loss,) = scalars["train/loss"]
    assert (loss.step, loss.value, loss.wall_time) == (10, 2.25, 1.7e9)
    (accuracy,) = scalars["eval/accuracy"]
    assert (accuracy.step, accuracy.value) == (20, 0.75)
    assert not said


def test_a_missing_package_is_found_at_once(monkeypatch):
    monkeypatch.setattr("ddp_sgd.report.tensorboard.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        TensorBoard(echo=print)
    assert str(caught.value) == (
        "log.tensorboard is true while the package tensorboard is missing; "
        "pip install 'ddp_sgd[tensorboard]', or set log.tensorboard=false."
    )
    assert importlib.util.find_spec("tensorboard")


def test_a_folder_that_cannot_be_made_stops_only_the_view(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    said = []
    logger = TensorBoard(echo=said.append)
    logger.start(SimpleNamespace(folder=tmp_path))
    logger.write([("train", {**AXES, "train/loss": 1.0})])
    logger.finish({})
    (line,) = said
    assert line.startswith("TensorBoard: stopped (")
    assert line.endswith("; training goes on, metrics.jsonl has every row")


@pytest.mark.parametrize("method", ["add_scalar", "close"])
def test_a_writer_that_fails_stops_only_the_view(tmp_path, monkeypatch, method):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    said = []
    logger = TensorBoard(echo=said.append)
    logger.start(SimpleNamespace(folder=tmp_path))
    writer = logger._writer
    monkeypatch.setattr(writer, method, fail)
    logger.write([("train", {**AXES, "train/loss": 1.0})])
    logger.write([("train", {**AXES, "train/loss": 1.0})])
    logger.finish({})
    monkeypatch.undo()
    writer.close()
    assert len(said) == 1
