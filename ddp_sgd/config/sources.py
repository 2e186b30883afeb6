"""Configuration sources merged in order: defaults, files, environment, command line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_sgd.config.keys import all_keys
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import Component
from ddp_sgd.config.yaml_events import MAX_DEPTH
from ddp_sgd.config.yaml_text import read_value, read_words, read_yaml_file
from ddp_sgd.errors import ConfigError
from ddp_sgd.host import FACTOR, timeout_factor
from ddp_sgd.text import env_name

PREFIX = "DDP_SGD_"
_FROM_ENVIRONMENT = re.compile(r"\{ *env: *(\w+) *\}")
_BESIDE_CLASS_PATH = Component.model_fields.keys() - {"class_path"}


@dataclass(frozen=True, slots=True)
class Sources:
    """The merged configuration before it is checked.

    Args:
        values: Plain nested data.
        origins: Where each leaf came from, by dotted path: a file, a variable, or a flag with its
            dashes. A default has none.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def gather(
    files: Sequence[str | Path],
    environ: Mapping[str, str],
    overrides: Sequence[tuple[str, str]],
) -> Sources:
    """Merge all sources: defaults, then files in order, then the environment, then overrides.

    Args:
        files: YAML files.
        environ: Variables such as ``DDP_SGD_OPTIM__LR``; those without the prefix are left alone,
            and so is ``DDP_SGD_TIMEOUT_FACTOR``, which is no key.
        overrides: Dotted keys, without dashes, and their values as YAML; but for a key that is
            text, the words as they are.

    Raises:
        ConfigError: A file or a value cannot be read, two settings of one layer contradict each
            other, or the factor of the timeouts is out of range.
    """
    if timeout_factor(environ) is None:
        raise ConfigError(f"{FACTOR} is {environ[FACTOR]!r}; choose a number in [1, 1000].")
    sources = Sources(RunConfig().model_dump(mode="python"))
    for file in files:
        sources = lay_over(sources, _leaves_of(read_yaml_file(file), str(file)))
    variables = [
        (name.removeprefix(PREFIX).lower().replace("__", "."), text, name)
        for name, text in sorted(environ.items())
        if name.startswith(PREFIX) and name != FACTOR
    ]
    flags = [(key, text, f"--{key}") for key, text in overrides]
    for settings in (variables, flags):
        layer = Sources()
        for key, text, origin in settings:
            _set(layer, key, _read(key, text, origin), origin)
        sources = lay_over(sources, layer)
    for path, value in _values_by_path(sources.values, ""):
        _refuse_environment(path, value)
    return sources


def lay_over(below: Sources, above: Sources) -> Sources:
    """Merge two layers; neither is changed.

    Mappings merge key by key, anything else is replaced whole. Where the upper layer gives a
    component another class_path, its other keys from below are dropped: they belong to another
    object.
    """
    origins = dict(below.origins)
    values = _merge(below.values, above.values, "", origins)
    return Sources(values, origins | above.origins)


def _merge(
    below: Mapping[str, Any], above: Mapping[str, Any], path: str, origins: dict[str, str]
) -> dict[str, Any]:
    """Merge mappings and forget the origins of what is dropped or replaced."""
    merged = dict(below)
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        for key in _BESIDE_CLASS_PATH & merged.keys():
            _forget(origins, _join(path, key), merged.pop(key))
    for key, value in above.items():
        here, under = _join(path, key), merged.get(key)
        if isinstance(value, Mapping) and (isinstance(under, Mapping) or under is None):
            origins.pop(here, None)
            merged[key] = _merge(under or {}, value, here, origins)
        else:
            _forget(origins, here, under)
            merged[key] = value
    return merged


def _set(layer: Sources, key: str, value: Any, origin: str) -> None:
    """Put one value into a layer, in place; a mapping is made where there is none, or null.

    Within a layer a class_path drops nothing, so that the order of flags does not matter.
    """
    *parents, leaf = key.split(".")
    if not all((*parents, leaf)) or not key.isprintable():
        raise ConfigError(
            f"{ascii(origin)[1:-1]} names no key; "
            f"write --optim.lr=0.05 or {PREFIX}OPTIM__LR=0.05, for example."
        )
    if len(parents) > MAX_DEPTH:
        raise ConfigError(f"{origin[:40]}... nests deeper than {MAX_DEPTH} levels; flatten it.")
    here = layer.values
    for number, parent in enumerate(parents, start=1):
        standing = here.get(parent)
        if standing is None:
            here[parent] = {}
            layer.origins.pop(".".join(parents[:number]), None)
        elif not isinstance(standing, Mapping):
            raise ConfigError(
                f"{layer.origins['.'.join(parents[:number])]} is {standing!r} while {origin} sets "
                "a key below it; leave one of the two out."
            )
        here = here[parent]
    nested = _leaves_of({leaf: value}, origin, ".".join(parents))
    merged = _merge(here, nested.values, ".".join(parents), layer.origins)
    here.update(merged)
    layer.origins.update(nested.origins)


def _read(key: str, text: str, origin: str) -> Any:
    """Read the value of a variable or a flag, by the type of its key."""
    known = all_keys().get(key)
    if known is not None and known.is_text:
        return read_words(text, origin, may_be_null=known.may_be_null)
    return read_value(text, origin)


def _leaves_of(values: dict[str, Any], origin: str, path: str = "") -> Sources:
    return Sources(values, dict.fromkeys(_leaf_paths(values, path), origin))


def _leaf_paths(value: Any, path: str) -> list[str]:
    if not isinstance(value, Mapping) or not value:
        return [path]
    return [leaf for key, below in value.items() for leaf in _leaf_paths(below, _join(path, key))]


def _values_by_path(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Yield every key but those of the arguments of components, each with its value."""
    for key, value in values.items():
        if key in ("args", "init_args"):
            continue
        here = _join(path, key)
        yield here, value
        if isinstance(value, Mapping):
            yield from _values_by_path(value, here)


def _refuse_environment(path: str, value: Any) -> None:
    """Refuse ``{env: NAME}`` outside of the arguments of components: it would be taken as it is."""
    written = _FROM_ENVIRONMENT.fullmatch(value) if isinstance(value, str) else None
    if name := written[1] if written else env_name(value):
        variable = PREFIX + path.upper().replace(".", "__")
        raise ConfigError(
            f"{path} is {{env: {name}}}, which only an argument of a component can be; set "
            f'{variable}="${name}" in the environment instead.'
        )


def _forget(origins: dict[str, str], path: str, value: Any) -> None:
    """Drop the origins of a value and of all that stands below it."""
    for leaf in _leaf_paths(value, path):
        origins.pop(leaf, None)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
