"""Named losses: several numbers that a loss returns, which of them is trained, and their units."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddp_sgd.errors import ConfigError
from ddp_sgd.tree import describe

LOSS = "loss"
"""Name of the number that is trained; where there is none of this name, the sum of all is."""

ACCURACY = "accuracy"
"""Name under which ``log.train_accuracy`` logs."""

_TAKEN = {
    *("loss_rank0", "lr", "momentum", "grad_norm", "skipped_steps", "loss_scale"),
    *("overflow_steps", "step", "count", ACCURACY, "correct", "accuracy_top5", "correct_top5"),
}
"""Names that ``train/...``, ``eval/...`` and ``test/...`` have for something else."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class LossForm:
    """Form of what a loss returns: one number, or several by name.

    Args:
        names: Names of the numbers besides ``loss``, which are logged; sorted.
        is_mapping: Whether the loss returns a mapping.
        adds_up: Whether the sum of the named numbers is trained, since there is no ``loss``.
        units_by_name: Whether each number has units of its own, from the loss's ``units``.
    """

    names: tuple[str, ...] = ()
    is_mapping: bool = False
    adds_up: bool = False
    units_by_name: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the numbers whose gradients a step adds up."""
        return self.names if self.sums_means else (LOSS,)

    @property
    def sums_means(self) -> bool:
        """Whether the loss is a sum of means over different units."""
        return self.adds_up and self.units_by_name

    def values(self, returned: Any) -> dict[str, torch.Tensor]:
        """Give the numbers by name; ``loss`` is always one of them.

        Args:
            returned: What the loss has returned.

        Raises:
            ConfigError: It has another form than before.
        """
        if not self.is_mapping:
            if not isinstance(returned, torch.Tensor):
                raise _changed("a tensor", returned)
            return {LOSS: returned}
        keys = {*self.names} if self.adds_up else {LOSS, *self.names}
        if not isinstance(returned, Mapping) or returned.keys() != keys:
            raise _changed(_listed(sorted(keys)), returned)
        return {LOSS: _sum_of(returned), **returned} if self.adds_up else dict(returned)


ONE_NUMBER = LossForm()


def _sum_of(returned: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first, *others = returned.values()
    for each in others:
        first = first + each
    return first


def _changed(before: str, returned: Any) -> ConfigError:
    now = _listed(sorted(map(str, returned))) if isinstance(returned, Mapping) else ""
    return ConfigError(
        f"loss gives {now or describe(returned)} while it gave {before} before the run; let it "
        "give the same names at every call, with zeros where there is nothing to add."
    )


def _listed(names: list[str]) -> str:
    return f"the names {', '.join(names)}" if names else "no name"


def form_of(returned: Any, who: str, device: torch.device) -> LossForm:
    """Find out the form of what a loss returns.

    Args:
        returned: What it returned for a batch.
        who: What gives it, for errors.
        device: Where the model is.

    Raises:
        ConfigError: It is neither a tensor without dimensions nor a mapping of such, or a name
            cannot be logged.
    """
    if isinstance(returned, torch.Tensor) and not returned.ndim:
        return ONE_NUMBER
    if not is_loss(returned):
        raise ConfigError(
            f"{who} gives {describe(returned)}; let it give the mean over samples, "
            "a tensor without dimensions, or a mapping from names to such tensors."
        )
    for name, value in returned.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{who} gives a number of the name {name!r}; begin names with a "
                "letter, and use letters, digits, dot, underscore and hyphen."
            )
        if name in _TAKEN:
            raise ConfigError(
                f"{who} gives a number of the name {name}, which is taken; choose "
                f"another one, such as {name}_loss."
            )
        is_number = isinstance(value, torch.Tensor) and not value.ndim
        if not is_number or value.device.type != device.type:
            on = f" on {value.device.type}" if is_number else ""
            raise ConfigError(
                f"{who} gives {describe(value)}{on} for {name}; let it give a "
                f"tensor without dimensions on {device.type}."
            )
    names = tuple(sorted(returned.keys() - {LOSS}))
    return LossForm(names, is_mapping=True, adds_up=LOSS not in returned)


def is_loss(returned: Any) -> bool:
    """Whether a value can be a loss, at a first look: a number, or several by name."""
    is_number = isinstance(returned, torch.Tensor) and not returned.ndim
    return is_number or (isinstance(returned, Mapping) and len(returned) > 0)


def units_of(loss: Any) -> Callable[[Any], Any] | None:
    """Return the method of a loss that gives the units of a micro-batch; None without one."""
    units = getattr(loss, "units", None)
    return units if callable(units) and not isinstance(units, nn.Module) else None


def read_units(returned: Any, form: LossForm, device: torch.device) -> dict[str, torch.Tensor]:
    """Give the units of every number of a micro-batch, on the device; nothing waits for it.

    Args:
        returned: What the method ``units`` of a loss has returned.
        form: Form of the loss.
        device: Where the model is.

    Returns:
        Tensors without dimensions, of the widest float type, by name. What cannot be counted by,
        since it is negative or infinite, is NaN: a step of it is skipped.

    Raises:
        ConfigError: It is neither a number nor one for each name; or, on the CPU, one of them is
            negative or not finite.
    """
    names = [*form.names] if form.adds_up else [LOSS, *form.names]
    if not form.units_by_name and not isinstance(returned, Mapping):
        return dict.fromkeys([LOSS, *form.names], _read_number(returned, "", device))
    if isinstance(returned, Mapping) and form.units_by_name and returned.keys() == set(names):
        return {name: _read_number(returned[name], f" for {name}", device) for name in names}
    is_mapping = isinstance(returned, Mapping)
    given = _listed(sorted(map(str, returned))) if is_mapping else describe(returned)
    raise ConfigError(
        f"loss.units gives {given}, while loss gives "
        f"{_listed(names) if form.is_mapping else 'one number'}; let it give a number, or one for "
        "each name of the loss, and the same at every call."
    )


def _read_number(value: Any, where: str, device: torch.device) -> torch.Tensor:
    wide = wide_float(device)
    if isinstance(value, torch.Tensor) and not value.ndim and not value.is_complex():
        number = value.detach().to(wide)
        if number.device.type != device.type:
            number = number.to(device)
    elif isinstance(value, (bool, int, float)):
        number = torch.full((), value, dtype=wide, device=device)
    else:
        raise ConfigError(
            f"loss.units gives {describe(value)}{where}; let it give a number, or a tensor without "
            "dimensions."
        )
    if not counts_on_host(device):
        return number.masked_fill(~(number >= 0) | number.isinf(), math.nan)
    if not 0 <= float(number) < math.inf:
        raise ConfigError(
            f"loss.units gives {float(number):g}{where}; let it give a finite number that is at "
            "least 0."
        )
    return number


def wide_float(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device, for sums and counts; Metal has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def counts_on_host(device: torch.device) -> bool:
    """Whether the units of targets are counted on the host: elsewhere that would wait for them."""
    return device.type == "cpu"
