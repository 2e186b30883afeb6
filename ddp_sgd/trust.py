"""Trusted class paths: what a checkpoint may instantiate without ``--trust``.

A checkpoint holds the class paths of its run, and whoever builds them runs their code. No torch,
unless a name is one of torch's.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from ddp_sgd.errors import RefusedError

_CLASSES_IN = (
    *("ddp_sgd.data", "ddp_sgd.models", "torch.nn", "torch.utils.data"),
    *("torchvision.datasets", "torchvision.models", "torchvision.ops", "torchvision.transforms"),
    *("timm.data", "timm.layers", "timm.loss", "timm.models"),
)
_FUNCTIONS_IN = (
    *("torch.nn.functional", "torchvision.models", "torchvision.ops", "torchvision.transforms"),
)
_PACKAGES = (*_CLASSES_IN, *_FUNCTIONS_IN)
_FUNCTIONS = (
    *("torch.tensor", "torch.as_tensor", "torch.utils.data.default_collate"),
    *("timm.create_model", "timm.models.create_model"),
)


def refuse_untrusted(named: Any, given: Any, where: str) -> None:
    """Refuse class paths that run code of somebody's, unless the caller has named them.

    Args:
        named: Nested plain data with the components that are about to be built.
        given: The same of what the caller set: command line, files and environment.
        where: What named them, such as the path of the checkpoint.

    Raises:
        RefusedError: There are such class paths; they are listed.
    """
    asked_for = set(_class_paths(given))
    found = [
        path
        for path in dict.fromkeys(_class_paths(named))
        if path not in asked_for and not is_trusted(path)
    ]
    if found:
        raise RefusedError(
            f"{where} names {', '.join(found)}, whose code would run; give --trust if you trust "
            "the file, or name them yourself by --config or by options such as --model.class_path."
        )


def is_trusted(path: str) -> bool:
    """Whether a class path may be built without being asked for.

    That holds for models, losses, data sets and transforms of ddp_sgd, torch, torchvision and timm:
    for what they define themselves, not for the modules of others that they import.

    Args:
        path: Dotted name; nothing outside of these packages is imported.
    """
    if path in _FUNCTIONS:
        return True
    if not _is_in(path, _PACKAGES):
        return False
    try:
        found = _follow(path)
    except ModuleNotFoundError:  # nothing to run; building it says what is missing
        return True
    if found is None or not _is_in(f"{getattr(found, '__module__', None)}.", _PACKAGES):
        return False
    return not inspect.isroutine(found) or _is_in(path, _FUNCTIONS_IN)


def _follow(path: str) -> Any:
    """Import what a name stands for; None where it leads out of the trusted packages."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        if part.startswith("_"):
            return None
        if not hasattr(found, part):
            if not isinstance(found, ModuleType):
                raise ModuleNotFoundError(path)
            importlib.import_module(".".join(parts[:number]))
        found = getattr(found, part, None)
        if isinstance(found, ModuleType) and not _leads_to_packages(found.__name__):
            return None
    return None if isinstance(found, ModuleType) else found


def _leads_to_packages(module: str) -> bool:
    return _is_in(f"{module}.", _PACKAGES) or any(p.startswith(f"{module}.") for p in _PACKAGES)


def _is_in(path: str, packages: tuple[str, ...]) -> bool:
    return any(path.startswith(f"{package}.") for package in packages)


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        for item in value.values():
            yield from _class_paths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _class_paths(item)
