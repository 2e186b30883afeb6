"""Memory of a captured step: filled by tensors, or by the indices of rows."""

import pytest
import torch

from ddp_sgd.data.augment import NO_TRANSFORMS, Transforms
from ddp_sgd.data.loader import MicroBatch, StepBatches
from ddp_sgd.data.placement import ArrayPair
from ddp_sgd.engine.static_batches import StaticBatches, copy_batch
from ddp_sgd.errors import ConfigError

CPU = torch.device("cpu")
X = torch.arange(24.0).view(12, 2)
Y = torch.arange(12)


def step(number, *pairs, transforms=NO_TRANSFORMS, epoch=0):
    parts = tuple(
        MicroBatch(inputs, targets, 2, number == len(pairs), epoch, indices.numpy())
        for number, (inputs, targets, indices) in enumerate(pairs, 1)
    )
    return StepBatches(number, 2 * len(parts), parts, transforms)


def tensors(*starts):
    return [(X[at : at + 2], {"y": Y[at : at + 2]}, Y[at : at + 2]) for at in starts]


def content(static):
    return [(b.inputs.tolist(), b.targets["y"].tolist()) for b in static.batches.micro_batches]


def test_tensors_are_copied_to_where_they_were():
    static = StaticBatches(step(0, *tensors(0, 2)), CPU)
    pointers = [b.inputs.data_ptr() for b in static.batches.micro_batches]
    assert static.fill(step(1, *tensors(4, 8)))
    assert content(static) == [([[8, 9], [10, 11]], [4, 5]), ([[16, 17], [18, 19]], [8, 9])]
    assert [b.inputs.data_ptr() for b in static.batches.micro_batches] == pointers


@pytest.mark.parametrize(
    "other", [tensors(0), [(X[:1], {"y": Y[:1]}, Y[:1])] * 2, [(X[:2], {"y": X[:2]}, Y[:2])] * 2]
)
def test_a_step_of_another_form_is_left_alone(other):
    static = StaticBatches(step(0, *tensors(0, 2)), CPU)
    before = content(static)
    assert not static.fill(step(1, *other))
    assert content(static) == before


def test_of_rows_only_the_indices_are_copied_and_once():
    arrays = ArrayPair(X, Y)
    firsts = [(*arrays.rows(Y[at : at + 2]), Y[at : at + 2]) for at in (0, 2)]
    static = StaticBatches(step(0, *firsts), CPU)
    assert len(static._tensors) == 2
    assert static.fill(step(1, *((*arrays.rows(Y[at : at + 2]), Y[:2]) for at in (6, 10))))
    for batch, at in zip(static.batches.micro_batches, (6, 10), strict=True):
        assert batch.inputs.array is X
        assert torch.equal(batch.inputs.to(CPU), X[at : at + 2])
        assert torch.equal(batch.targets.to(CPU), Y[at : at + 2])


def test_there_may_be_several_arrays_and_no_targets():
    arrays = ArrayPair((X, Y), None)
    static = StaticBatches(step(0, (*arrays.rows(Y[:2]), Y[:2])), CPU)
    assert len(static._tensors) == 1
    assert static.fill(step(1, (*arrays.rows(Y[4:6]), Y[4:6])))
    (batch,) = static.batches.micro_batches
    assert batch.targets is None
    assert [rows.to(CPU).tolist() for rows in batch.inputs] == [X[4:6].tolist(), [4, 5]]
    copied = copy_batch(batch)
    assert copied.targets is None
    assert torch.equal(copied.inputs[1].to(CPU), Y[4:6])


def test_transforms_get_indices_and_epoch_from_memory():
    transforms = Transforms([lambda batch, draws: batch + draws.uniform(2)])
    static = StaticBatches(step(0, *tensors(0, 2), transforms=transforms), CPU)
    for epoch, at in ((0, 4), (1, 4), (1, 6)):
        made = step(1, *tensors(at, 8), transforms=transforms, epoch=epoch)
        assert static.fill(made)
        for here, there in zip(static.batches.micro_batches, made.micro_batches, strict=True):
            expected = transforms(there.inputs, there.indices, there.epoch)
            assert torch.equal(transforms(here.inputs, here.indices, here.epoch), expected)


def test_a_copy_of_a_batch_keeps_its_values():
    memory, indices = X.clone(), Y[:2].clone()
    rows = ArrayPair(X, Y).rows(indices)
    batches = step(0, (memory[:2], {"y": Y[:2]}, Y[:2]), (*rows, Y[:2])).micro_batches
    copies = [copy_batch(batch) for batch in batches]
    memory.zero_()
    indices.fill_(7)
    assert torch.equal(copies[0].inputs, X[:2])
    assert torch.equal(copies[1].inputs.to(CPU), X[:2])
    assert copies[1].inputs.indices is copies[1].targets.indices


def test_batches_of_other_things_than_tensors_are_refused():
    first = step(0, ({"x": X[:2], "names": "abc"}, {"y": Y[:2]}, Y[:2]))
    with pytest.raises(ConfigError, match="a batch holds a str"):
        StaticBatches(first, CPU)
