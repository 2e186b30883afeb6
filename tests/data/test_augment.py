"""Transforms against plain Python, their interface, and the errors of those that break it."""

import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from ddp_sgd.data.augment import (
    NO_TRANSFORMS,
    Cutout,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    Transforms,
)
from ddp_sgd.data.draws import Draws
from ddp_sgd.errors import ConfigError

FORMATS = [torch.contiguous_format, torch.channels_last]
MANY = 20_000


def images(count=5, channels=3, height=6, width=7, dtype=torch.uint8):
    values = torch.arange(count * channels * height * width) * 37 % 251
    return values.reshape(count, channels, height, width).to(dtype)


def draws(count=5):
    return Draws(torch.arange(count) * 1_000_003)


def cropped(batch, tops, lefts, size, padding, fill, mode):
    """Crop by plain Python: pixel (y, x) of the window is pixel (top + y - padding, ...)."""

    def pixel(image, channel, y, x):
        height, width = len(image[channel]), len(image[channel][0])
        if mode == "reflect":
            y, x = (side - 1 - abs(side - 1 - abs(at)) for at, side in ((y, height), (x, width)))
        inside = 0 <= y < height and 0 <= x < width
        return image[channel][y][x] if inside else fill

    return [
        [
            [
                [
                    pixel(image, channel, top + y - padding, left + x - padding)
                    for x in range(size[1])
                ]
                for y in range(size[0])
            ]
            for channel in range(len(image))
        ]
        for image, top, left in zip(batch.tolist(), tops, lefts, strict=True)
    ]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(
    ("size", "padding", "fill", "mode"),
    [
        (4, 0, 0, "constant"),
        ([6, 7], 2, 0, "constant"),
        ([3, 8], 1, 9, "constant"),
        ([6, 7], 3, 0, "reflect"),
        ([6, 7], 0, 0, "constant"),
        (1, 5, 0, "reflect"),
    ],
)
def test_a_crop_equals_plain_python(size, padding, fill, mode, dtype, memory_format):
    batch = images(dtype=dtype).contiguous(memory_format=memory_format)
    window = [size, size] if isinstance(size, int) else size
    result = RandomCrop(size, padding, fill, mode)(batch, draws())
    same = draws()
    tops, lefts = (
        same.integers(0, side + 2 * padding - length + 1)[:, 0].tolist()
        for side, length in zip((6, 7), window, strict=True)
    )
    assert result.tolist() == cropped(batch, tops, lefts, window, padding, fill, mode)
    assert result.dtype == dtype
    assert result.shape == (5, 3, *window)
    assert result.is_contiguous(memory_format=memory_format)


def test_crops_are_uniform_over_all_places():
    places = torch.arange(9 * 9).reshape(1, 1, 9, 9).expand(MANY, 1, 9, 9)
    chosen = RandomCrop(1)(places, draws(MANY)).flatten()
    counts = torch.bincount(chosen, minlength=81).double()
    assert counts.min() > 0
    assert ((counts - MANY / 81) ** 2 / (MANY / 81)).sum() < 133  # 80 degrees: 1 in 5,000


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_a_flip_equals_plain_python(p, dtype, memory_format):
    batch = images(40, dtype=dtype).contiguous(memory_format=memory_format)
    result = RandomHorizontalFlip(p)(batch, draws(40))
    chosen = [number < p for number in draws(40).uniform()[:, 0].tolist()]
    assert result.tolist() == [
        [[row[::-1] if flip else row for row in channel] for channel in image]
        for image, flip in zip(batch.tolist(), chosen, strict=True)
    ]
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=memory_format)
    assert p not in (0, 1) or set(chosen) == {bool(p)}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_flips_are_as_frequent_as_asked(p):
    batch = torch.tensor([0, 1]).expand(MANY, 1, 1, 2)
    flipped = RandomHorizontalFlip(p)(batch, draws(MANY))[:, 0, 0, 0].double().mean().item()
    assert abs(flipped - p) < 4 * (p * (1 - p) / MANY) ** 0.5


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("size", "fill"), [(1, 0), (2, 0), (3, 5), (4, 0), (20, 1)])
def test_a_cutout_equals_plain_python(size, fill, dtype, memory_format):
    batch = images(dtype=dtype).contiguous(memory_format=memory_format)
    result = Cutout(size, fill)(batch, draws())
    same = draws()
    centres = zip(*(same.integers(0, side)[:, 0].tolist() for side in (6, 7)), strict=True)

    def covers(centre, at):
        return centre - size // 2 <= at < centre - size // 2 + size

    assert result.tolist() == [
        [
            [
                [
                    fill if covers(row, y) and covers(column, x) else value
                    for x, value in enumerate(line)
                ]
                for y, line in enumerate(channel)
            ]
            for channel in image
        ]
        for image, (row, column) in zip(batch.tolist(), centres, strict=True)
    ]
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=memory_format)


def test_cutouts_are_uniform_over_all_pixels():
    cut = Cutout(1, fill=1)(torch.zeros(MANY, 1, 6, 7), draws(MANY)).sum(dim=(0, 1)).flatten()
    assert cut.sum() == MANY
    assert ((cut - MANY / 42) ** 2 / (MANY / 42)).sum() < 81  # 41 degrees of freedom: 1 in 5,000


MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "unit", "gives", "tolerance"),
    [
        (torch.uint8, 255, torch.float32, 5e-7),
        (torch.float32, 1, torch.float32, 5e-7),
        (torch.float64, 1, torch.float64, 1e-15),
        (torch.bfloat16, 1, torch.bfloat16, 2**-8),
        (torch.float16, 1, torch.float16, 2**-11),
    ],
)
def test_normalization_equals_plain_python(dtype, unit, gives, tolerance, memory_format):
    batch = images() if dtype == torch.uint8 else images().double() / 255
    batch = batch.to(dtype).contiguous(memory_format=memory_format)
    result = Normalize(MEAN, STD)(batch, draws())
    expected = [
        [
            [[(value / unit - mean) / std for value in row] for row in channel]
            for channel, mean, std in zip(image, MEAN, STD, strict=True)
        ]
        for image in batch.tolist()
    ]
    assert result.dtype == gives
    assert result.is_contiguous(memory_format=memory_format)
    close = torch.isclose(
        result.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    assert close.all()


def test_bytes_are_normalized_by_one_product_and_one_sum():
    result = Normalize(MEAN, STD)(images(), draws())
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        factor, summand = np.float32(1 / (255 * std)), np.float32(-mean / std)
        values = images()[:, channel].numpy().astype(np.float32)
        assert np.array_equal(result[:, channel].numpy(), values * factor + summand)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 5), (4, 2, 3, 5)])
def test_any_number_of_dimensions_is_normalized(shape):
    batch = torch.rand(shape)
    result = Normalize([0.5, 0.25], [2.0, 4.0])(batch, draws(4))
    expected = torch.stack([(batch[:, 0] - 0.5) / 2, (batch[:, 1] - 0.25) / 4], dim=1)
    assert torch.allclose(result, expected)
    assert torch.allclose(Normalize(0.5, 2.0)(batch, draws(4)), (batch - 0.5) / 2)


@pytest.mark.parametrize(
    ("transform", "batch", "message"),
    [
        (RandomCrop(8), images(), "images of 6 x 7, padding included, are smaller than the crop"),
        (RandomCrop([6, 8]), images(), "are smaller than the crop of 6 x 8"),
        (RandomCrop(6, 6, mode="reflect"), images(), "padding of 6 cannot be reflected from 6"),
        (RandomCrop(2), images()[0], "takes images of shape (m, c, h, w), not uint8 of shape (3,"),
        (RandomHorizontalFlip(), [images()], "takes images of shape (m, c, h, w), not a list of 1"),
        (Cutout(1), {"a": 1}, "takes images of shape (m, c, h, w), not a mapping with a"),
        (Normalize(0.0, 1.0), torch.zeros(3), "of shape (m, c, ...), not float32 of shape (3,)"),
        (Normalize(0.0, 1.0), torch.zeros(3, 1).long(), "bytes or floating point numbers, not int"),
        (Normalize([0.0] * 2, [1.0] * 2), images(), "mean has 2 numbers for 3 channels"),
    ],
)
def test_what_does_not_fit_is_named(transform, batch, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        transform(batch, draws())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomCrop(0), "size is 0; choose at least 1"),
        (lambda: RandomCrop([3, 0]), "size is [3, 0]; choose at least 1"),
        (lambda: RandomCrop(3, -1), "padding is -1; choose at least 0"),
        (lambda: RandomCrop(3, mode="wrap"), "mode is 'wrap'; choose constant or reflect"),
        (lambda: RandomHorizontalFlip(1.5), "p is 1.5; choose a number in [0, 1]"),
        (lambda: RandomHorizontalFlip(float("nan")), "p is nan; choose a number in [0, 1]"),
        (lambda: Normalize([0.0], [1.0, 2.0]), "mean has 1 numbers while std has 2"),
        (lambda: Normalize(0.0, 0.0), "std is 0.0; choose numbers above 0"),
        (lambda: Normalize([], []), "std is []; choose numbers above 0"),
        (lambda: Cutout(0), "size is 0; choose at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


# The transforms of a run


def plus_one(batch, draws):
    return batch + 1


class Times:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, batch, draws):
        return batch * self.factor


class Scaled(nn.Module):
    def forward(self, batch, draws):
        factor = draws.uniform()
        return {key: value * factor for key, value in batch.items()}


def apply(transforms, batch=None, indices=range(5), epoch=0, seed=0):
    batch = images(dtype=torch.float32) if batch is None else batch
    return Transforms(transforms, seed=seed).check(batch, np.array(indices), epoch)


def test_transforms_are_applied_in_order():
    ones = torch.ones(5, 1)
    assert torch.equal(apply([plus_one, Times(3)], ones), ones * 6)
    assert torch.equal(apply([Times(3), plus_one], ones), ones * 4)


def test_without_transforms_nothing_happens():
    batch = images()
    assert NO_TRANSFORMS(batch, np.arange(5), 0) is batch
    assert NO_TRANSFORMS.check(batch, np.arange(5), 0) is batch
    assert len(NO_TRANSFORMS) == 0


def test_a_transform_gets_inputs_as_the_data_set_gives_them():
    batch = {"a": torch.ones(5, 2), "b": torch.ones(5, 1)}
    transforms = Transforms([Scaled()], seed=4)
    result = transforms.check(batch, np.arange(5), 2)
    assert torch.equal(result["a"][:, :1], result["b"])
    assert len(set(result["b"].flatten().tolist())) == 5
    again = transforms(batch, torch.arange(5), torch.tensor(2))
    assert all(torch.equal(again[key], result[key]) for key in batch)


def doubled(batch, draws):
    return nn.utils.rnn.PackedSequence(batch.data * 2, batch.batch_sizes)


def to_dense(batch, draws):
    return batch.to_dense()


def test_other_inputs_than_tensors_of_rows_are_passed_on():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    assert apply([doubled], packed, range(2)).data.tolist() == [2.0] * 5
    eye = torch.eye(5)
    assert torch.equal(apply([to_dense], eye.to_sparse()), eye)


@pytest.mark.parametrize("split", [[5], [1] * 5, [2, 3], [4, 1]])
def test_any_split_of_a_batch_gives_the_same(split):
    chain = [RandomCrop([6, 7], 2), RandomHorizontalFlip(), Cutout(3), Normalize(MEAN, STD)]
    indices = [7, 3, 11, 3_000_000_000, 0]
    transforms = Transforms(chain, seed=9)
    whole = transforms(images(), np.array(indices), 4)
    parts = [
        transforms(part, at, 4)
        for part, at in zip(images().split(split), torch.tensor(indices).split(split), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(transforms(images(), np.array(indices), 5), whole)
    assert not torch.equal(Transforms(chain, seed=8)(images(), np.array(indices), 4), whole)


def test_functions_and_partial_functions_have_numbers_of_their_own_name():
    def noise(batch, draws, factor=1):
        return batch + factor * draws.uniform()

    def other(batch, draws):
        return noise(batch, draws)

    zeros = torch.zeros(5, 1)
    plain = apply([noise], zeros)
    assert torch.equal(apply([partial(noise, factor=2)], zeros), 2 * plain)
    assert not torch.equal(apply([other], zeros), plain)


def in_place(batch, draws):
    return batch.add_(1)


def drawing_from_torch(batch, draws):
    return batch + torch.rand(())


def drawing_from_python(batch, draws):
    return batch + random.random()


def drawing_from_numpy(batch, draws):
    return batch + np.random.rand()


def losing_rows(batch, draws):
    return batch[1:]


def without_rows(batch, draws):
    return batch.sum()


def for_pairs(batch, draws):
    return batch + torch.stack([batch[0], batch[1]]).mean()


def broken(batch, draws):
    return batch.unknown


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (in_place, "changes its batch in place; let it return a new one."),
        (drawing_from_torch, "gives another result for the same batch and draws; let it take "),
        (drawing_from_python, "gives another result for the same batch and draws; let it take "),
        (drawing_from_numpy, "gives another result for the same batch and draws; let it take "),
        (nn.Dropout(), "fails on inputs of float32 of shape (5, 3, 6, 7), TypeError: "),
        (losing_rows, "gives float32 of shape (4, 3, 6, 7) for 5 samples; let it give one row "),
        (without_rows, "gives float32 of shape () for 5 samples; let it give one row for each "),
        (for_pairs, "fails on inputs of float32 of shape (1, 3, 6, 7), IndexError: index 1 "),
        (broken, "fails on inputs of float32 of shape (5, 3, 6, 7), AttributeError: "),
    ],
)
def test_a_transform_that_breaks_the_interface_is_named(transform, message):
    name = getattr(transform, "__name__", type(transform).__name__)
    with pytest.raises(ConfigError) as caught:
        apply([plus_one, transform])
    start = f"data.train_transforms[1] is {name}, which {message}"
    assert str(caught.value).startswith(start)


def test_a_failure_in_a_later_batch_is_named_as_well():
    transforms = Transforms([RandomCrop(6)], where="data.eval_transforms")
    transforms.check(images(), np.arange(5), 0)
    with pytest.raises(ConfigError, match=r"^data.eval_transforms\[0\] is RandomCrop, which fails"):
        transforms(images(height=5), np.arange(5), 0)


def test_where_memory_runs_out_the_batch_is_named():
    def greedy(batch, draws):
        raise MemoryError

    with pytest.raises(ConfigError, match="^data.batch_size is too large"):
        apply([greedy])


@pytest.mark.parametrize("what", [3, Times])
def test_what_is_no_transform_is_refused(what):
    message = rf"^data.train_transforms\[0\] is a {type(what).__name__}; name a class whose"
    with pytest.raises(ConfigError, match=message):
        Transforms([what])
