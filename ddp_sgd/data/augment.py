"""Transforms on the device: augmentation of whole batches, with random numbers for each sample.

Random crop, horizontal flip, cutout and normalization of images, and the interface for others.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ddp_sgd.data.dataset_checks import shape_of
from ddp_sgd.data.draws import Draws, Indices, Number, sample_keys
from ddp_sgd.errors import ConfigError, Use, UserError, refuse_out_of_memory
from ddp_sgd.seeds import seed_for
from ddp_sgd.tree import tensors_in


class Transform(Protocol):
    """Interface of a transform: any callable of (batch, draws), such as a class of one's own.

    It is called with the inputs of a micro-batch on the device, as the data set gives them: a
    tensor of shape (m, ...), or a container of such; ``draws`` are where its first tensor is. It
    returns the inputs of the model, leaves its argument unchanged, and takes random numbers from
    ``draws`` only. A micro-batch may have any number of samples from 1 on. What a transform makes
    of a sample should not depend on the others, or else results depend on how samples are split
    into micro-batches.

    Under ``compute.cuda_graphs`` a transform is captured once and replayed: shapes are fixed, and
    no branch may depend on values that are on the device.

    Example:
        >>> class Brightness:
        ...     def __call__(self, batch, draws):
        ...         return batch * (0.5 + draws.uniform())[:, :, None, None]
    """

    def __call__(self, batch: Any, draws: Draws) -> Any:
        """Return the transformed batch."""


class Transforms:
    """The transforms of a run, in order, as a function of (inputs, indices, epoch).

    Args:
        transforms: Those of ``data.train_transforms``, or of ``data.eval_transforms``.
        seed: Seed of the run.
        where: Key in the configuration, for errors.

    Raises:
        ConfigError: One of them cannot be called, or is a class.
    """

    def __init__(
        self,
        transforms: Sequence[Transform] = (),
        *,
        seed: int = 0,
        where: str = "data.train_transforms",
    ) -> None:
        self._where = where
        self._transforms = tuple(transforms)
        self._names = [_name_of(each) for each in transforms]
        for number, each in enumerate(transforms):
            if not callable(each) or isinstance(each, type):
                raise ConfigError(
                    f"{where}[{number}] is a {type(each).__name__}; name a class whose objects are "
                    "called with (batch, draws), or a function of these with call: false."
                )
        self._base = seed_for("draws", seed)
        seen: Counter[str] = Counter()
        self._streams = []
        for name in self._names:
            self._streams.append(seed_for(f"transform {name}", seed, seen[name]))
            seen[name] += 1

    def __len__(self) -> int:
        return len(self._transforms)

    def __call__(self, inputs: Any, indices: Indices, epoch: Number) -> Any:
        """Transform the inputs of a micro-batch.

        Args:
            inputs: On the device: a tensor of shape (m, ...), or a container of such.
            indices: Which samples they are, of shape (m,).
            epoch: Number of the epoch, or ``EVAL_EPOCH``; a tensor on the device without
                dimensions gives the same.

        Raises:
            ConfigError: A transform fails.
        """
        if not self._transforms:
            return inputs
        keys = self._keys(inputs, indices, epoch)
        for number in range(len(self._transforms)):
            inputs = self._apply(number, inputs, keys)
        return inputs

    def check(self, inputs: Any, indices: Indices, epoch: Number) -> Any:
        """Transform a batch, and look whether each transform keeps to its interface.

        Args:
            inputs: As for a call.
            indices: Which samples they are.
            epoch: Number of the epoch.

        Returns:
            What a call returns.

        Raises:
            ConfigError: A transform fails for this batch or one sample of it, changes its argument,
                draws other random numbers than ``draws``, or gives another number of samples.
        """
        if not self._transforms:
            return inputs
        keys = self._keys(inputs, indices, epoch)
        for number in range(len(self._transforms)):
            inputs = self._check(number, inputs, keys)
        return inputs

    def _check(self, number: int, inputs: Any, keys: torch.Tensor) -> Any:
        transform = self._transforms[number]
        if isinstance(transform, nn.Module):
            transform.to(keys.device)
        before = _copies(inputs)
        result = self._apply(number, inputs, keys)
        if not _are_close(before, _copies(inputs)):
            raise self._error(number, "changes its batch in place", "let it return a new one")
        if not _are_close(_copies(result), _copies(self._apply(number, inputs, keys))):
            raise self._error(
                number,
                "gives another result for the same batch and draws",
                "let it take random numbers from draws only",
            )
        if isinstance(result, torch.Tensor) and result.shape[:1] != keys.shape:
            what = f"gives {_describe(result)} for {len(keys)} samples"
            raise self._error(number, what, "let it give one row for each sample")
        if isinstance(inputs, torch.Tensor) and inputs.layout is torch.strided:
            # Ranks have batches of one sample, too.
            self._apply(number, inputs[:1].clone(), keys[:1])
        return result

    def _keys(self, inputs: Any, indices: Indices, epoch: Number) -> torch.Tensor:
        """Hash (seed, epoch, index) of each sample, where the inputs are."""
        rows = torch.as_tensor(indices)
        first = next(tensors_in(inputs), rows)
        return sample_keys(self._base, epoch, rows.to(first.device, non_blocking=True))

    def _apply(self, number: int, inputs: Any, keys: torch.Tensor) -> Any:
        try:
            return self._transforms[number](inputs, Draws(keys, self._streams[number]))
        except UserError:
            raise
        except Exception as error:  # any error of a user's transform
            refuse_out_of_memory(error, Use.STEP)
            what = f"fails on inputs of {_describe(inputs)}, {type(error).__name__}: {error}"
            raise self._error(number, what, "make it fit the data, or leave it out") from error

    def _error(self, number: int, what: str, remedy: str) -> ConfigError:
        return ConfigError(
            f"{self._where}[{number}] is {self._names[number]}, which {what}; {remedy}."
        )


NO_TRANSFORMS = Transforms()


def _name_of(transform: Any) -> str:
    if isinstance(transform, partial):
        return _name_of(transform.func)
    return getattr(transform, "__name__", type(transform).__name__)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return shape_of(value)


def _copies(tree: Any) -> list[torch.Tensor]:
    """Copy dense tensors to the host."""
    return [each.to("cpu", copy=True) for each in tensors_in(tree) if each.layout is torch.strided]


def _are_close(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether tensors are equal to some rounding, since not every kernel repeats its last bits."""
    if [(a.shape, a.dtype) for a in ones] != [(b.shape, b.dtype) for b in others]:
        return False
    wide = [torch.complex128 if a.is_complex() else torch.float64 for a in ones]
    return all(
        torch.allclose(a.to(dtype), b.to(dtype), rtol=1e-4, equal_nan=True)
        for a, b, dtype in zip(ones, others, wide, strict=True)
    )


def _require_images(batch: Any) -> torch.Tensor:
    if not isinstance(batch, torch.Tensor) or batch.ndim != 4:
        raise ValueError(f"it takes images of shape (m, c, h, w), not {_describe(batch)}")
    return batch


def _as_pair(size: int | Sequence[int], name: str, least: int = 1) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < least:
        raise ValueError(f"{name} is {size}; choose at least {least}")
    return height, width


class RandomCrop:
    """Random crop: pads images, and cuts out a window at a place that is uniform for each image.

    Takes and gives (m, c, h, w), with the height and width of ``size``.

    Args:
        size: Side of the window, or its [height, width], at least 1.
        padding: Pixels that are added on each side before, at least 0.
        fill: Value of the pixels that are added.
        mode: ``constant`` adds pixels of value ``fill``, ``reflect`` mirrors the image at its
            outermost pixels, which needs padding below its height and width.

    Source:
        Krizhevsky et al. 2012 (AlexNet); with padding, Lee et al. 2015, arXiv:1409.5185.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int = 0,
        fill: float = 0.0,
        mode: str = "constant",
    ) -> None:
        self._size = _as_pair(size, "size")
        if padding < 0:
            raise ValueError(f"padding is {padding}; choose at least 0")
        if mode not in ("constant", "reflect"):
            raise ValueError(f"mode is {mode!r}; choose constant or reflect")
        self._padding, self._fill, self._mode = padding, fill, mode

    def __call__(self, batch: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Crop each image; the number type and the memory format stay."""
        padded = self._pad(_require_images(batch))
        (height, width), sides = self._size, padded.shape[2:]
        rows, columns = (side - size for side, size in zip(sides, self._size, strict=True))
        if min(rows, columns) < 0:
            raise ValueError(
                f"images of {sides[0]} x {sides[1]}, padding included, are smaller than the crop "
                f"of {height} x {width}"
            )
        top, left = draws.integers(0, rows + 1)[:, 0], draws.integers(0, columns + 1)[:, 0]
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (m, c, top, left, h, w)
        chosen = windows[torch.arange(len(batch), device=batch.device), :, top, left]
        return chosen.contiguous(memory_format=_format_of(batch))

    def _pad(self, batch: torch.Tensor) -> torch.Tensor:
        pixels = self._padding
        if pixels == 0:
            return batch
        if self._mode == "constant":
            return nn.functional.pad(batch, [pixels] * 4, value=self._fill)
        for dim in (2, 3):  # torch reflects no bytes
            batch = batch.index_select(dim, _reflected(batch.shape[dim], pixels, batch.device))
        return batch


def _reflected(side: int, padding: int, device: torch.device) -> torch.Tensor:
    if padding >= side:
        raise ValueError(f"padding of {padding} cannot be reflected from {side} pixels")
    places = torch.arange(-padding, side + padding, device=device).abs()
    return (side - 1) - ((side - 1) - places).abs()


def _format_of(batch: torch.Tensor) -> torch.memory_format:
    is_nhwc = batch.is_contiguous(memory_format=torch.channels_last)
    is_plain = batch.is_contiguous()  # with one channel, or of one pixel, it may be both
    return torch.channels_last if is_nhwc and not is_plain else torch.contiguous_format


class RandomHorizontalFlip:
    """Random horizontal flip: mirrors each image, left to right, with a probability.

    Takes and gives (m, c, h, w).

    Args:
        p: Probability of a flip, in [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; choose a number in [0, 1]")
        self._p = p

    def __call__(self, batch: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Flip some images; the number type and the memory format stay."""
        flips = draws.uniform()[:, :, None, None] < self._p
        return torch.where(flips, _require_images(batch).flip(3), batch)


class Normalize:
    """Normalization: subtracts the mean of each channel, and divides by its standard deviation.

    Takes and gives (m, c, ...). Bytes (uint8) become float32 and count as fractions of 255;
    floating point numbers keep their type. It is one product and one sum: x a + b, with a = 1 / std
    and b = -mean / std (for bytes a = 1 / (255 std)) rounded to the type that is computed in,
    float32 for narrower ones. So CPU and GPU give the same bits.

    Args:
        mean: Mean of each channel, c numbers, or one for all.
        std: Standard deviation of each channel, above 0, in the same way.
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        means = [mean] if isinstance(mean, (int, float)) else list(mean)
        stds = [std] if isinstance(std, (int, float)) else list(std)
        if len(means) != len(stds):
            raise ValueError(f"mean has {len(means)} numbers while std has {len(stds)}")
        if not means or min(stds) <= 0:
            raise ValueError(f"std is {std}; choose numbers above 0, one for each channel")
        self._means, self._stds = means, stds
        self._on_device: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, batch: torch.Tensor, _: Draws) -> torch.Tensor:
        """Normalize a batch; the memory format stays."""
        if not isinstance(batch, torch.Tensor) or batch.ndim < 2:
            raise ValueError(f"it takes a tensor of shape (m, c, ...), not {_describe(batch)}")
        is_bytes = batch.dtype == torch.uint8
        if not is_bytes and not batch.is_floating_point():
            raise ValueError(f"it takes bytes or floating point numbers, not {_describe(batch)}")
        if len(self._means) not in (1, batch.shape[1]):
            raise ValueError(f"mean has {len(self._means)} numbers for {batch.shape[1]} channels")
        wide = torch.float64 if batch.dtype == torch.float64 else torch.float32
        scale, shift = self._constants(batch, wide, 255 if is_bytes else 1)
        # Two operations, since one could be a fused one on some device, which rounds once. The
        # product is of the type of the constants.
        result = (batch * scale).add_(shift)
        return result if is_bytes else result.to(batch.dtype)

    def _constants(
        self, batch: torch.Tensor, dtype: torch.dtype, unit: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give factor and summand of each channel, copied to a device once."""
        key = (batch.device, dtype, unit, batch.ndim)
        if key not in self._on_device:
            pairs = list(zip(self._means, self._stds, strict=True))
            numbers = [[1 / (unit * std) for _, std in pairs], [-mean / std for mean, std in pairs]]
            shape = (2, -1, *[1] * (batch.ndim - 2))
            constants = torch.tensor(numbers, dtype=dtype, device=batch.device).reshape(shape)
            self._on_device[key] = constants[0], constants[1]
        return self._on_device[key]


class Cutout:
    """Cutout: fills one square of each image, around a pixel that is uniform over the image.

    What lies beyond the border of the image is left out, so that squares at the border are smaller.
    Takes and gives (m, c, h, w).

    Args:
        size: Side of the square, at least 1; for the centre (y, x) it covers the rows from
            y - size // 2 on, and columns in the same way.
        fill: Value of its pixels: 0 is the mean after ``Normalize``.

    Source:
        DeVries, Taylor 2017, arXiv:1708.04552.
    """

    def __init__(self, size: int, fill: float = 0.0) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; choose at least 1")
        self._size, self._fill = size, fill

    def __call__(self, batch: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Fill a square of each image; the number type and the memory format stay."""
        height, width = _require_images(batch).shape[2:]
        rows = self._covers(draws.integers(0, height), height)
        columns = self._covers(draws.integers(0, width), width)
        square = rows[:, None, :, None] & columns[:, None, None, :]
        return batch.clone().masked_fill_(square, self._fill)  # a clone keeps the memory format

    def _covers(self, centre: torch.Tensor, side: int) -> torch.Tensor:
        """Whether the square covers each row, or column: bool of shape (m, side)."""
        places = torch.arange(side, device=centre.device)
        first = centre - self._size // 2
        return (first <= places) & (places < first + self._size)
