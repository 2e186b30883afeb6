"""Columns of samples: which parts are the input and the target, by name or by position."""

from collections.abc import Mapping, Sequence
from typing import Any

from ddp_sgd.errors import DataError

Choice = str | int | Sequence[str] | Sequence[int]
"""Name or position of a part of a sample, or several of the same kind."""


class Selection:
    """Chooses input and target, from a sample or from a batch of stacked parts.

    Args:
        input: Name of a part of a mapping, or position of a part of a tuple or list. Several names
            give a mapping of these parts, several positions a tuple.
        target: The same; None: there is no target.
        keys: What the two are called in errors.

    Example:
        >>> Selection(["ids", "mask"], "label")({"ids": 1, "mask": 2, "label": 3}, "a row")
        ({'ids': 1, 'mask': 2}, 3)
        >>> Selection(0)((1, 2), "a row")
        (1, None)
    """

    def __init__(
        self,
        input: Choice,
        target: Choice | None = None,
        keys: tuple[str, str] = ("data.input", "data.target"),
    ) -> None:
        self.input = input
        self.target = target
        self._keys = keys

    @property
    def has_target(self) -> bool:
        """Whether there is a target."""
        return self.target is not None

    def __call__(self, sample: Any, where: str) -> tuple[Any, Any]:
        """Return (input, target); the target is None if none is chosen.

        Args:
            sample: A mapping, tuple or list.
            where: What it is, for errors.

        Raises:
            DataError: The sample lacks a part; the message lists those that it has.
        """
        of_input, of_target = self._keys
        chosen = _choose(sample, self.input, of_input, where)
        if self.target is None:
            return chosen, None
        return chosen, _choose(sample, self.target, of_target, where)

    def restore(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Turn lists into tuples again, where several positions were chosen.

        torch's default_collate makes a list of a tuple.

        Args:
            inputs: Inputs of a batch that was formed of what was chosen.
            targets: The same of targets.
        """
        return _restore(inputs, self.input), _restore(targets, self.target)


def _restore(part: Any, choice: Choice | None) -> Any:
    return part if isinstance(choice, (str, int)) or not isinstance(part, list) else tuple(part)


def _choose(sample: Any, choice: Choice, key: str, where: str) -> Any:
    if isinstance(choice, (str, int)):
        return _part(sample, choice, key, where)
    if isinstance(choice[0], str):
        return {name: _part(sample, name, key, where) for name in choice}
    return tuple(_part(sample, position, key, where) for position in choice)


def _part(sample: Any, name: str | int, key: str, where: str) -> Any:
    if isinstance(sample, Mapping):
        if name not in sample:
            names = ", ".join(map(str, sample)) or "no columns"
            raise DataError(f"{key} names {name} while {where} has {names}; name one of those.")
        return sample[name]
    if not isinstance(sample, (tuple, list)):
        raise DataError(
            f"{key} names {name} while {where} is a {type(sample).__name__}; let samples be "
            f"mappings, tuples or lists, or leave {key} out."
        )
    if not isinstance(name, int) or not -len(sample) <= name < len(sample):
        raise DataError(
            f"{key} names {name} while {where} is a {type(sample).__name__} of {len(sample)}; give "
            f"a position from 0 to {len(sample) - 1}."
        )
    return sample[name]
