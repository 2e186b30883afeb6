import pytest
import torch
from saving import header, names, tensors, write

from ddp_sgd.checkpointing import serialization
from ddp_sgd.checkpointing.serialization import write_checkpoint
from ddp_sgd.checkpointing.store import FORMAT, CheckpointFolder


def test_torch_alone_reads_what_was_written(tmp_path):
    manifest = write(tmp_path / "new", 13)
    content = torch.load(tmp_path / "new" / manifest.file, weights_only=True)
    assert content["format"] == FORMAT
    assert content["cursor"] == {"epoch": 1, "position": 30, "step": 13, "samples": 130}
    assert set(content) == {
        "format", "cursor", "model", "optimizer", "plan", "config", "run_id", "versions", "loss",
        "scores", "scored_at", "skipped", "world_size",
    }  # fmt: skip
    assert content["model"]["weight"].tolist() == [13.0] * 64
    assert content["optimizer"]["momentum_buffer"]["weight"].tolist() == [-13.0] * 64
    assert content["config"] == header().config
    assert CheckpointFolder(tmp_path / "new").choose().manifest == manifest
    assert names(tmp_path / "new") == {"step-00000013.pt", "step-00000013.json", "last"}


def test_tensors_that_are_one_are_written_once(tmp_path):
    weight = torch.zeros(100_000)
    sizes = [
        write_checkpoint(
            CheckpointFolder(tmp_path), header(step), {"model": {"a": weight, "b": b}}, keep=9
        ).size_bytes
        for step, b in ((1, weight), (2, weight.clone()))
    ]
    assert 400_000 < sizes[0] < 420_000
    assert 800_000 < sizes[1] < 820_000


def test_room_is_reserved_for_all_that_is_written(tmp_path):
    tree = {"model": {f"layer{n}.weight": torch.zeros(n) for n in range(300)}}
    manifest = write_checkpoint(CheckpointFolder(tmp_path), header(), tree, keep=1)
    assert manifest.size_bytes <= serialization._room_for(tree)
    assert manifest.size_bytes == (tmp_path / manifest.file).stat().st_size


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    write(tmp_path, 1)
    before = names(tmp_path)
    with pytest.raises(Exception, match="pickle") as caught:
        write_checkpoint(
            CheckpointFolder(tmp_path), header(2), tensors(2) | {"more": lambda: 0}, keep=1
        )
    assert not isinstance(caught.value, OSError)
    assert names(tmp_path) == before
