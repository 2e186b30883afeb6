"""Instantiation of components by ``class_path``: the one place that imports user code.

Trusted class paths: what a checkpoint may instantiate without ``--trust``.

A checkpoint holds the class paths of its run, and to build them runs their code. No torch,
unless a name is one of torch's.
"""

import difflib
import gc
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from ddp_sgd.config.component import Component
from ddp_sgd.config.faults import show
from ddp_sgd.config.keys import all_keys
from ddp_sgd.errors import ConfigError, RefusedError, Use, UserError, refuse_out_of_memory
from ddp_sgd.text import env_name, read_secret

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
    """Refuse class paths that run untrusted code, unless the caller has named them.

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
    """Whether a class path may be built without ``--trust``.

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
    except ModuleNotFoundError:  # nothing to run; building it reports what is missing
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


_ONLY_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


def instantiate(component: Component, where: str, *, failure: type[UserError] = ConfigError) -> Any:
    """Build the object that a configuration describes, with all that is nested in its arguments.

    Args:
        component: Importable name, arguments, and whether to call.
        where: Key of the component in the configuration, for errors.
        failure: Class of the error when the call itself fails.

    Returns:
        What the call returns. With ``call: false`` the named object itself, or a
        ``functools.partial`` of it if there are arguments.

    Raises:
        ConfigError: The name cannot be imported, or the arguments do not fit its signature.
        UserError: The call raised; an error that already has WHERE, WHAT and REMEDY passes
            unchanged.
    """
    named = _find(component.class_path, f"{where}.class_path")
    if not component.call and not component.args and not component.init_args:
        return named
    _check_callable(named, component, where)
    args, init_args = _resolve_arguments(named, component, where)
    if not component.call:
        return partial(named, *args, **init_args)
    try:
        return named(*args, **init_args)
    except UserError:
        raise
    except Exception as error:
        refuse_out_of_memory(error, _use_of(where), where)
        keys = f"{where}.args and {where}.init_args" if args else f"{where}.init_args"
        raise failure(
            f"{where} is {component.class_path}, which failed with {type(error).__name__}: "
            f"{error}; check {keys}, it accepts ({_accepted(named)})."
        ) from error


def _use_of(where: str) -> Use:
    return Use.DATA if where.startswith("data.") else Use.MODEL


def _find(path: str, where: str) -> Any:
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
    return found


def _check_callable(named: Any, component: Component, where: str) -> None:
    if callable(named):
        return
    remedy = f"set {where}.call=false" if component.call else "leave the arguments out"
    raise ConfigError(
        f"{where}.class_path is {component.class_path}, a {type(named).__name__}; "
        f"name a class or a function, or {remedy} to take it as it is."
    )


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
                f"fix {name}."
            ) from error
    return module, []


def _resolve_arguments(
    named: Callable[..., Any], component: Component, where: str
) -> tuple[list[Any], dict[str, Any]]:
    """Build what is nested in the arguments, and check them against the signature."""
    try:
        signature: inspect.Signature | None = inspect.signature(named)
    except (TypeError, ValueError):  # some built-in classes hide theirs
        signature = None
    args = [
        _resolve(value, f"{where}.args[{number}]", _at_position(signature, number))
        for number, value in enumerate(component.args)
    ]
    init_args = {
        name: _resolve(value, f"{where}.init_args.{name}", _by_name(signature, name))
        for name, value in component.init_args.items()
    }
    if signature:
        is_bare_function = not (args or init_args or inspect.isclass(named))
        hint = f", or set {where}.call=false to take it without a call" if is_bare_function else ""
        _check_signature(signature, args, init_args, component, where, hint)
    return args, init_args


def _at_position(signature: inspect.Signature | None, number: int) -> inspect.Parameter | None:
    """The parameter that takes the positional argument with this number, if one is known."""
    for place, parameter in enumerate(signature.parameters.values() if signature else ()):
        if parameter.kind is parameter.VAR_POSITIONAL or place == number:
            return parameter
    return None


def _by_name(signature: inspect.Signature | None, name: str) -> inspect.Parameter | None:
    return signature.parameters.get(name) if signature else None


def _resolve(value: Any, where: str, parameter: inspect.Parameter | None) -> Any:
    """Turn plain data into what it describes; lists and mappings are searched in depth.

    ``{env: NAME}`` becomes the value of an environment variable.
    """
    if isinstance(value, Mapping):
        if name := env_name(value):
            return _from_environment(name, where)
        if "class_path" in value:
            return instantiate(_as_component(value, where), where)
        return {key: _resolve(item, f"{where}.{key}", parameter) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [
            _resolve(item, f"{where}[{number}]", parameter) for number, item in enumerate(value)
        ]
    if isinstance(value, str) and value.startswith("torch.") and _may_be_dtype(parameter):
        import torch

        dtype = getattr(torch, value.removeprefix("torch."), None)
        return dtype if isinstance(dtype, torch.dtype) else value
    return value


def _from_environment(name: str, where: str) -> str:
    value = read_secret(name)
    if value is None:
        raise ConfigError(
            f"{where} is {{env: {name}}}, but the variable {name} is not set; set it, or write the "
            "value out."
        )
    return value


def _may_be_dtype(parameter: inspect.Parameter | None) -> bool:
    """Whether an argument may be a dtype: it has that annotation, or none."""
    return (
        parameter is None
        or parameter.annotation is parameter.empty
        or "dtype" in str(parameter.annotation)
    )


def _as_component(value: Mapping[str, Any], where: str) -> Component:
    try:
        return Component.model_validate(dict(value))
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        what = f"{where}.{name} is {show(value[name])}"
        if name not in Component.model_fields:
            remedy = f"a nested object takes {', '.join(Component.model_fields)}"
        else:
            remedy = f"choose {all_keys()[f'model.{name}'].choices}"
        raise ConfigError(f"{what}; {remedy}.") from error


def _check_signature(
    signature: inspect.Signature,
    args: Sequence[Any],
    init_args: Mapping[str, Any],
    component: Component,
    where: str,
    hint: str,
) -> None:
    bind = signature.bind if component.call else signature.bind_partial
    try:
        bind(*args, **init_args)
    except TypeError as error:
        _refuse_unknown(signature, init_args, component.class_path, where)
        what = [f"{where}.args is {show(component.args)}"] if args else []
        what += [f"{where}.init_args is {sorted(init_args)}"] if init_args or not args else []
        raise ConfigError(
            f"{' and '.join(what)} while {component.class_path} says: {error}; "
            f"it accepts ({_shown(signature)}){hint}."
        ) from error


def _refuse_unknown(
    signature: inspect.Signature, init_args: Mapping[str, Any], path: str, where: str
) -> None:
    parameters = signature.parameters
    unknown = [name for name in init_args if name not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names = [name for name, p in parameters.items() if p.kind not in _ONLY_BY_POSITION]
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"{where}.init_args.{unknown[0]} is not an argument of {path}; {hint}"
            f"it accepts ({_shown(signature)})."
        )


def _shown(signature: inspect.Signature) -> str:
    """Names of the parameters, as a signature writes them but without types and defaults."""
    bare = [p.replace(annotation=p.empty, default=p.empty) for p in signature.parameters.values()]
    return ", ".join(map(str, bare))


def _accepted(named: Callable[..., Any]) -> str:
    try:
        return _shown(inspect.signature(named))
    except (TypeError, ValueError):
        return "see its documentation"
