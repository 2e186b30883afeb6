import pytest
import torch
from saving import header
from torch import nn

from ddp_sgd.checkpointing.checkpointer import Snapshot
from ddp_sgd.checkpointing.serialization import write_checkpoint
from ddp_sgd.checkpointing.store import CheckpointFolder

CPU = torch.device("cpu")


def odd_ones():
    """Tensors of every kind that a state may hold."""
    torch.manual_seed(0)
    numbers = torch.randn(3, 4)
    strided = torch.randn(6, 8)
    nan = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return {
        **{
            str(dtype): (100 * numbers).to(dtype)
            for dtype in (
                torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
                torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
                torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.bool,
            )
        },
        "empty": torch.empty(0),
        "no rows": torch.empty(0, 5, dtype=torch.bfloat16),
        "number": torch.tensor(7),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": strided.t(),
        "every other": strided[::2, 1::3],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "special": nan,
        "parameter": nn.Parameter(numbers.clone()),
    }  # fmt: skip


def same_bits(one, other):
    return (
        (one.dtype, one.shape) == (other.dtype, other.shape)
        and one.contiguous().view(-1).view(torch.uint8).equal(
            other.contiguous().view(-1).view(torch.uint8)
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", odd_ones())
def test_a_copy_is_equal_bit_by_bit_in_memory_of_its_own(name):
    tensor = odd_ones()[name].detach()
    copy = Snapshot(CPU).take({"x": tensor})["x"]
    assert same_bits(copy, tensor)
    assert not copy.requires_grad
    assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()


def test_all_of_them_come_back_from_a_file(tmp_path):
    tree = odd_ones()
    copy = Snapshot(CPU).take({"model": tree})
    manifest = write_checkpoint(CheckpointFolder(tmp_path), header(), copy, keep=1)
    content = torch.load(tmp_path / manifest.file, weights_only=True)
    assert list(content["model"]) == list(tree)
    assert all(same_bits(content["model"][name], tree[name].detach()) for name in tree)


def test_training_on_does_not_change_a_copy():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    snapshot = Snapshot(CPU)
    copy = snapshot.take(model.state_dict())
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(copy[name], kept[name]) for name in kept)
    assert not torch.equal(copy["0.weight"], model[0].weight)


def test_lists_inside_a_state_are_copied_too():
    """As of a module with extra state."""
    tree = {"extra": [torch.zeros(3), (torch.zeros(2), {"n": [1, 2]})], "name": "x"}
    copy = Snapshot(CPU).take(tree)
    tree["extra"][0].fill_(1)
    tree["extra"][1][0].fill_(1)
    tree["extra"][1][1]["n"].append(3)
    assert torch.equal(copy["extra"][0], torch.zeros(3))
    assert torch.equal(copy["extra"][1][0], torch.zeros(2))
    assert copy["extra"][1][1] == {"n": [1, 2]}
    assert copy["name"] == "x"


def test_tied_tensors_stay_tied():
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    model[1].weight = model[0].weight
    copy = Snapshot(CPU).take(model.state_dict())
    assert copy["0.weight"] is copy["1.weight"]
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    copy = Snapshot(CPU).take(model.state_dict())
    assert copy["0.weight"].data_ptr() != copy["1.weight"].data_ptr()


def test_a_tie_takes_no_room_in_the_file(tmp_path):
    weight = torch.randn(300, 300)
    copy = Snapshot(CPU).take({"model": {"a": weight, "b": weight}})
    manifest = write_checkpoint(CheckpointFolder(tmp_path), header(), copy, keep=1)
    assert weight.nbytes < manifest.size_bytes < 1.1 * weight.nbytes


def test_a_part_of_a_tensor_takes_no_more_room_than_it_needs(tmp_path):
    copy = Snapshot(CPU).take({"model": {"row": torch.randn(1000, 1000)[0]}})
    manifest = write_checkpoint(CheckpointFolder(tmp_path), header(), copy, keep=1)
    assert manifest.size_bytes < 20_000


def test_the_memory_is_kept():
    tree = {"model": odd_ones()}
    snapshot = Snapshot(CPU)
    places = {name: value.data_ptr() for name, value in snapshot.take(tree)["model"].items()}
    tree["model"]["special"].fill_(3)
    copy = snapshot.take(tree)["model"]
    assert {name: value.data_ptr() for name, value in copy.items()} == places
    assert torch.equal(copy["special"], tree["model"]["special"])


def test_memory_is_reserved_beforehand():
    tree = {"model": {"weight": torch.randn(100)}, "extra": [torch.randn(5)]}
    snapshot = Snapshot(CPU)
    snapshot.reserve(tree)
    reserved = {tensor.data_ptr() for tensor in snapshot._kept.values()}
    copy = snapshot.take(tree)
    assert {copy["model"]["weight"].data_ptr(), copy["extra"][0].data_ptr()} == reserved
    assert torch.equal(copy["model"]["weight"], tree["model"]["weight"])


def test_pageable_memory_takes_the_place_of_page_locked_memory_that_is_not_to_be_had():
    """As on a machine without a device, where torch locks no memory."""
    if torch.accelerator.is_available():
        pytest.skip("memory can be locked here")
    with pytest.raises(RuntimeError):
        torch.empty(3, pin_memory=True)
    tree = {"a": torch.randn(5), "b": torch.randn(7)}
    Snapshot(torch.device("cuda")).reserve(tree)
    copy = Snapshot(torch.device("cuda"))._copy(tree)
    assert torch.equal(copy["a"], tree["a"])
    assert torch.equal(copy["b"], tree["b"])


def test_what_went_away_is_forgotten_and_what_is_new_is_copied():
    snapshot = Snapshot(CPU)
    first, second = torch.randn(10), torch.randn(20)
    snapshot.take({"a": first})
    copy = snapshot.take({"b": second})
    assert torch.equal(copy["b"], second)
    assert len(snapshot._kept) == 1


def test_on_the_host_there_is_nothing_to_wait_for():
    snapshot = Snapshot(CPU)
    snapshot.take({"a": torch.zeros(1)})
    snapshot.wait()
