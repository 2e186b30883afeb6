"""From ``class_path`` and ``init_args`` to the object: the one place that imports user code."""

import difflib
import gc
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from ddp_sgd.config.sections import Component
from ddp_sgd.errors import ConfigError, UserError


def build(component: Component, where: str, *, failure: type[UserError] = ConfigError) -> Any:
    """Build the object that a configuration describes, with all that is nested in its arguments.

    Args:
        component: Importable name and keyword arguments.
        where: Key of the component in the configuration, for errors.
        failure: Class of the error when the call itself fails.

    Returns:
        What the call returns.

    Raises:
        ConfigError: The name cannot be imported, or the arguments do not fit its signature.
        UserError: The call raised; an error that already says WHERE, WHAT and REMEDY passes
            unchanged.
    """
    factory = _find(component.class_path, f"{where}.class_path")
    arguments = _resolve_arguments(factory, component, where)
    try:
        return factory(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise failure(
            f"{where} is {component.class_path}, which failed with {type(error).__name__}: "
            f"{error}; check {where}.init_args, it accepts ({_accepted(factory)})."
        ) from error


def _find(path: str, where: str) -> Callable[..., Any]:
    """Import the longest part of the path that is a module, then follow attributes."""
    parts = path.split(".")
    found, rest = _import_longest(parts, where, path)
    for part in rest:
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            name = getattr(found, "__name__", path)
            hint = f"did you mean {near[0]}?" if near else "check the spelling."
            raise ConfigError(f"{where} is {path}, but {name} has no {part}; {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"{where} is {path}, a {type(found).__name__}; name a class or a function."
        )
    return found  # type: ignore[no-any-return]


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without garbage collection: large modules make objects by the hundred thousand.

    None of them is for the bin, and looking through them again and again takes a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _import_longest(parts: list[str], where: str, path: str) -> tuple[Any, list[str]]:
    module = None
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        if module is not None and hasattr(module, parts[length - 1]) and length == len(parts):
            return module, parts[length - 1 :]
        try:
            with uncollected():
                module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # the module exists, something that it needs does not
                raise ConfigError(
                    f"{where} is {path}, which needs the module {error.name}; install it."
                ) from error
            if module is None:
                raise ConfigError(
                    f"{where} is {path}, but there is no module {name}; install it, or check the "
                    "spelling."
                ) from error
            return module, parts[length - 1 :]
        except Exception as error:
            raise ConfigError(
                f"{where} is {path}, whose import failed with {type(error).__name__}: {error}; "
                f"mend {name}."
            ) from error
    return module, []


def _resolve_arguments(
    factory: Callable[..., Any], component: Component, where: str
) -> dict[str, Any]:
    try:
        signature: inspect.Signature | None = inspect.signature(factory)
    except (TypeError, ValueError):  # some built-in classes hide theirs
        signature = None
    arguments = {}
    for name, value in component.init_args.items():
        parameter = signature.parameters.get(name) if signature else None
        wants_dtype = parameter is None or (
            parameter.annotation is parameter.empty or "dtype" in str(parameter.annotation)
        )
        arguments[name] = _resolve(value, f"{where}.init_args.{name}", wants_dtype=wants_dtype)
    if signature:
        _check_signature(signature, arguments, component.class_path, where)
    return arguments


def _resolve(value: Any, where: str, *, wants_dtype: bool) -> Any:
    """Turn plain data into what it describes; lists and mappings are searched in depth."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            return build(_as_component(value, where), where)
        return {
            key: _resolve(item, f"{where}.{key}", wants_dtype=wants_dtype)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            _resolve(item, f"{where}[{number}]", wants_dtype=wants_dtype)
            for number, item in enumerate(value)
        ]
    if wants_dtype and isinstance(value, str) and value.startswith("torch."):
        import torch

        dtype = getattr(torch, value.removeprefix("torch."), None)
        return dtype if isinstance(dtype, torch.dtype) else value
    return value


def _as_component(value: Mapping[str, Any], where: str) -> Component:
    try:
        return Component.model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, (where, *fault["loc"])))
        raise ConfigError(
            f"{key} is {fault['input']!r}; a nested object takes class_path and init_args."
        ) from error


def _check_signature(
    signature: inspect.Signature, arguments: Mapping[str, Any], path: str, where: str
) -> None:
    try:
        signature.bind(**arguments)
    except TypeError as error:
        unknown = [name for name in arguments if name not in signature.parameters]
        accepted = _accepted_names(signature)
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            near = difflib.get_close_matches(unknown[0], accepted, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{where}.init_args.{unknown[0]} is not an argument of {path}; {hint}"
                f"it accepts ({', '.join(accepted)})."
            ) from error
        raise ConfigError(
            f"{where}.init_args is {sorted(arguments)} while {path} says: {error}; "
            f"it accepts ({', '.join(accepted)})."
        ) from error


def _accepted_names(signature: inspect.Signature) -> list[str]:
    return [
        f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name
        for p in signature.parameters.values()
        if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)
    ]


def _accepted(factory: Callable[..., Any]) -> str:
    try:
        return ", ".join(_accepted_names(inspect.signature(factory)))
    except (TypeError, ValueError):
        return "see its documentation"
