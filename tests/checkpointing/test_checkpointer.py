import threading

import pytest
import torch
from limits import WAIT_S
from saved_training import Training, save_steps, until_over
from saving import fill, names, small_disk

from ddp_sgd.checkpointing import checkpointer as module
from ddp_sgd.errors import ExitCode, OutputError


@pytest.fixture
def training(tmp_path):
    return Training(tmp_path / "checkpoints")


class Gate:
    """Holds every write up until it is opened, and counts those that are going on."""

    def __init__(self, monkeypatch):
        self.open, self.reached = threading.Event(), threading.Event()
        self.now = self.most = 0
        self._write = module.write_checkpoint
        monkeypatch.setattr(module, "write_checkpoint", self._wait)

    def _wait(self, *args, **kwargs):
        self.now += 1
        self.most = max(self.most, self.now)
        self.reached.set()
        assert self.open.wait(WAIT_S)
        try:
            return self._write(*args, **kwargs)
        finally:
            self.now -= 1


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def test_rows_come_before_the_checkpoint_that_they_belong_to(training):
    with training.open() as checkpoints:
        for _ in range(2):
            training.step()
            checkpoints.save(*training.state_dict())
        checkpoints.finish()
    names = [[file.name for file in files] for files in training.files_before]
    assert names == [[], ["step-00000001.json", "step-00000001.pt"]]


def break_writes(monkeypatch, *failures):
    """Have writes fail the way a list says, where an entry is one; None writes."""
    write, failures = module.write_checkpoint, iter(failures)

    def attempt(*args, **kwargs):
        if failure := next(failures, None):
            raise failure
        return write(*args, **kwargs)

    monkeypatch.setattr(module, "write_checkpoint", attempt)


def test_what_is_saved_is_the_moment_of_the_save(training, gate):
    """Training goes on while the disk is slow, and changes weights and momentum in place."""
    with training.open() as checkpoints:
        training.step()
        weight = training.model.weight.detach().clone()
        momentum_buffer = training.optimizer.momentum_buffers[training.model.weight].clone()
        checkpoints.save(*training.state_dict())
        assert gate.reached.wait(WAIT_S)
        for _ in range(5):
            training.step()
            checkpoints.poll()
        assert training.told == []  # it is being written still
        assert not (training.folder / "last").exists()
        gate.open.set()
        checkpoints.finish()
    saved = training.saved()
    assert saved["cursor"] == {"epoch": 0, "position": 10, "step": 1, "samples": 10}
    assert torch.equal(saved["model"]["weight"], weight)
    assert torch.equal(saved["optimizer"]["momentum_buffer"]["weight"], momentum_buffer)
    assert not torch.equal(training.model.weight, weight)


def test_a_save_waits_for_the_one_before(training, gate):
    with training.open(keep=9) as checkpoints:
        training.step()
        checkpoints.save(*training.state_dict())
        training.step()
        second = threading.Thread(target=checkpoints.save, args=training.state_dict())
        second.start()
        assert gate.reached.wait(WAIT_S)
        second.join(0.1)
        assert second.is_alive()
        gate.open.set()
        second.join(WAIT_S)
        assert not second.is_alive()
        checkpoints.finish()
    assert [step for step, row in training.told if "file" in row] == [1, 2]
    assert gate.most == 1


@pytest.mark.parametrize("failing", [False, True])
def test_leaving_waits_for_the_save_that_is_going_on(failing, training, gate):
    training.step()

    def leave():
        with training.open() as checkpoints:
            checkpoints.save(*training.state_dict())
            if failing:
                raise KeyError("of the user's")

    ended = []

    def run():
        try:
            leave()
        except KeyError:
            ended.append("failed")
        ended.append("left")

    thread = threading.Thread(target=run)
    thread.start()
    assert gate.reached.wait(WAIT_S)
    thread.join(0.1)
    assert ended == []
    gate.open.set()
    thread.join(WAIT_S)
    assert ended == ["failed", "left"][not failing :]
    assert training.saved()["cursor"]["step"] == 1


def test_what_a_save_took_is_told(training, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    write = module.write_checkpoint
    returned = threading.Event()  # the clock is one for both threads

    def slow(*args, **kwargs):
        assert returned.wait(WAIT_S)
        now[0] += 5
        return write(*args, **kwargs)

    monkeypatch.setattr(module, "write_checkpoint", slow)
    with training.open() as checkpoints:
        estimate = 1.0 + 4 * 8 / 1e8
        assert checkpoints.save_s == pytest.approx(estimate)
        training.step()
        checkpoints.save(*training.state_dict())
        returned.set()
        until_over(checkpoints)
        now[0] += 1000  # until somebody asks
        training.step()
        checkpoints.save(*training.state_dict())
        assert checkpoints.save_s == 5
        checkpoints.finish()
    (one, first), (two, second) = training.told
    assert (one, two) == (1, 2)
    assert (first["save_s"], second["save_s"]) == (5, 5)
    assert first["stall_s"] == 0
    assert first["file"] == "step-00000001.pt"
    assert first["bytes"] == (training.folder / first["file"]).stat().st_size


def test_a_failed_save_is_told_and_the_run_goes_on(training, monkeypatch):
    break_writes(monkeypatch, None, OSError(28, "No space left on device"))
    with training.open() as checkpoints:
        save_steps(training, checkpoints, 2)
        assert training.told[1] == (2, {"error": "not written: No space left on device"})
        assert training.saved()["cursor"]["step"] == 1
        save_steps(training, checkpoints, 1)
        checkpoints.finish()
    assert training.saved()["cursor"]["step"] == 3


def test_three_failures_in_a_row_end_the_run(training, monkeypatch):
    full = [OSError(28, "No space left on device") for _ in range(5)]
    break_writes(monkeypatch, *full[:2], None, *full[2:])
    with training.open() as checkpoints:
        save_steps(training, checkpoints, 5)  # the third was written, and counting began again
        with pytest.raises(
            OutputError,
            match=r"checkpoints does not take a checkpoint, 3 times in a row: No space left on "
            r"device; make room on its disk, or set output_dir to another, and start again\.$",
        ) as caught:
            save_steps(training, checkpoints, 1)
    assert caught.value.exit_code == ExitCode.OUTPUT == 73
    assert ["error" in row for _, row in training.told] == [True, True, False, True, True, True]
    assert training.saved()["cursor"]["step"] == 3


def test_a_third_failure_shows_at_the_next_save_too(training, monkeypatch):
    break_writes(monkeypatch, *[RuntimeError("of the kernel\nand more") for _ in range(3)])
    with training.open() as checkpoints:
        save_steps(training, checkpoints, 2)
        checkpoints.save(*training.state_dict())
        with pytest.raises(OutputError, match="3 times in a row: of the kernel; make"):
            checkpoints.save(*training.state_dict())


def test_a_run_whose_last_save_failed_does_not_end_well(training, monkeypatch):
    break_writes(monkeypatch, None, MemoryError())
    with training.open() as checkpoints:
        save_steps(training, checkpoints, 1)
        checkpoints.finish()
        training.step()
        checkpoints.save(*training.state_dict())
        with pytest.raises(
            OutputError,
            match="the state is too large to be copied for a checkpoint for the memory of the host",
        ):
            checkpoints.finish()
    assert training.saved()["cursor"]["step"] == 1


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        yield disk


def test_a_full_disk_costs_no_checkpoint_and_room_fixes_it(disk):
    training = Training(disk / "checkpoints", size=10_000)
    with training.open() as checkpoints:
        save_steps(training, checkpoints, 1)
        whole = names(training.folder)
        ballast = fill(disk)
        save_steps(training, checkpoints, 2)
        assert training.told[-1] == (3, {"error": "not written: No space left on device"})
        assert names(training.folder) == whole
        assert training.saved()["cursor"]["step"] == 1
        ballast.unlink()
        save_steps(training, checkpoints, 1)
        checkpoints.finish()
        assert training.saved()["cursor"]["step"] == 4
        fill(disk)
        save_steps(training, checkpoints, 2)
        with pytest.raises(OutputError, match="3 times in a row: No space left on device; make"):
            save_steps(training, checkpoints, 1)
        with pytest.raises(OutputError, match="No space left on device"):
            checkpoints.finish()
    assert training.saved()["cursor"]["step"] == 4


def test_copy_for_which_there_is_no_memory_is_a_failed_save(training):
    with training.open() as checkpoints:
        training.step()
        header, _ = training.state_dict()
        checkpoints.save(header, {"model": {"x": torch.zeros(1).expand(2**45)}})
        save_steps(training, checkpoints, 1)
        assert "too large to be copied" in training.told[0][1]["error"]
        checkpoints.finish()
    assert training.saved()["cursor"]["step"] == 2
