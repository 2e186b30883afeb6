"""Components: what the run builds by an importable name and arguments; one, or several by name.

Also what all sections of the configuration have in common.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictStr,
    Tag,
)


class Section(BaseModel):
    """A part of the configuration: frozen, complete, closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class Component(Section):
    """An object that the run builds or takes: an importable name, and the arguments of its call.

    Any argument may itself be such a mapping, or hold some in lists and mappings, as deep as
    needed.
    """

    class_path: Annotated[StrictStr, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]
    """Importable name of a class, a function or another object, such as torch.nn.CrossEntropyLoss.
    Naming it runs its module."""

    args: tuple[Any, ...] = ()
    """Positional arguments of the call."""

    init_args: dict[str, Any] = {}
    """Keyword arguments of the call. In them and in args, {env: NAME} stands for the value of an
    environment variable, which is read when the object is built and is written down nowhere."""

    call: StrictBool = True
    """false: take what class_path names without calling it; with arguments, a functools.partial of
    it that holds them."""


_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")


def are_named_sets(value: Any) -> bool:
    """Whether a value of ``data.eval`` holds several components by name, rather than being one."""
    if not isinstance(value, Mapping) or not value or value.keys() & Component.model_fields:
        return False
    return all(isinstance(each, (Mapping, Component)) for each in value.values())


def check_set_names(where: str, names: Mapping[Any, Any]) -> None:
    """Refuse names of held-out sets that are no part of a metric's name.

    Raises:
        ValueError: There is one, or no set at all; the message is a whole sentence.
    """
    for name in names:
        if not (isinstance(name, str) and _SET_NAME.fullmatch(name)) or name in (
            Component.model_fields
        ):
            raise ValueError(
                f"{where} has a set of the name {name!r}; use letters, digits, hyphen and "
                "underscore, and no key of a component"
            )


def _checked_sets(sets: dict[str, Component]) -> dict[str, Component]:
    check_set_names("data.eval", sets)
    return sets


# The tags come up in the places of errors, between keys: no set can have such a name.
COMPONENT_TAG, SETS_TAG = "<component>", "<sets>"
HeldOut = Annotated[
    Annotated[Component, Tag(COMPONENT_TAG)]
    | Annotated[dict[StrictStr, Component], AfterValidator(_checked_sets), Tag(SETS_TAG)],
    Discriminator(lambda value: SETS_TAG if are_named_sets(value) else COMPONENT_TAG),
]
"""One component, or several by name."""
