"""Configuration sources merged in order: defaults, files, environment, command line.

Also the changes of a configuration on a resume, and which of them would change the weights.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_sgd.config.component import Component, are_named_sets
from ddp_sgd.config.keys import all_keys
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.yaml_io import MAX_DEPTH, read_value, read_words, read_yaml_file
from ddp_sgd.errors import ConfigError
from ddp_sgd.host import FACTOR, timeout_factor
from ddp_sgd.text import MASK, env_name, is_secret

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
    object. So is the length of the run, where the upper layer gives it in the other unit: epochs or
    steps.
    """
    origins, under = dict(below.origins), dict(below.values)
    for length, other in (("steps", "epochs"), ("epochs", "steps")):
        if above.values.get(length) is not None and other not in above.values and other in under:
            under[other] = RunConfig.model_fields[other].default  # one takes the other's place
            origins.pop(other, None)
    values = _merge(under, above.values, "", origins)
    return Sources(values, origins | above.origins)


def _merge(
    below: Mapping[str, Any], above: Mapping[str, Any], path: str, origins: dict[str, str]
) -> dict[str, Any]:
    """Merge mappings and forget the origins of what is dropped or replaced."""
    merged = dict(below)
    if path == "data.eval" and _is_of_other_kind(below, above):
        _forget(origins, path, below)
        merged = {}
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


def _is_of_other_kind(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether one is a component, and the other holds components by name."""
    if "class_path" in below:
        return are_named_sets(above) and any("class_path" in each for each in above.values())
    return "class_path" in above and are_named_sets(below)


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
    return Sources(values, {leaf: origin for leaf, _ in leaves(values, path)})


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
    for leaf, _ in leaves(value, path):
        origins.pop(leaf, None)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


_ARGUMENTS = re.compile(r"data\.(train|test|eval(\.[\w-]+)?)\.(args|init_args)(\.|$)")
"""Keys of the arguments of data sets, each with all that is below it."""
_STARTS = ("/", "~", "file://")
"""Absolute paths, those below a home folder, and URLs of files. A relative path is a name that the
user chose: it leads to the same place wherever the folder of the job is.
"""
_PLACE = "a path of its own"


def without_places(key: str, value: Any) -> Any:
    """Replace the paths in an argument of a data set by words that are equal for all paths.

    Hosts may keep copies of the data at different places, and a job may have a scratch folder of
    its own; the samples are compared instead.

    Args:
        key: Dotted key of the argument; other keys than those of data sets keep their values.
        value: Plain data; paths are looked for at any depth.

    Example:
        >>> without_places("data.train.init_args.root", "/scratch/job1/images")
        'a path of its own'
        >>> without_places("data.train.init_args.split", "train")
        'train'
    """
    return _without(value) if _ARGUMENTS.match(key) else value


def _without(value: Any) -> Any:
    if isinstance(value, str):
        return _PLACE if value.startswith(_STARTS) else value
    if isinstance(value, list):
        return [_without(item) for item in value]
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items()}
    return value


_MATTERS = (
    *("seed", "model", "loss", "data.train", "data.collate", "data.train_transforms", "data.tail"),
    *("data.order", "data.input", "data.target"),
    *("optim", "schedule", "parallel.compression", "parallel.local_sgd"),
    *("compute.precision", "compute.compile", "compute.deterministic"),
)
"""Keys on which the weights depend, each with all that is below it."""

_BEFORE = {
    "data.order": "shuffled",
    "data.input": None,
    "data.target": None,
    "eval.batch_size": None,
    "optim.clip_value": None,
    "schedule.curve": None,
    "schedule.by": "step",
    "schedule.warmup": "multiply",
    "schedule.warmup_steps": None,
    "schedule.momentum_start": None,
    "compute.precision": "fp32",
    "compute.channels_last": False,
    "compute.compile": False,
    "compute.cuda_graphs": False,
    "compute.deterministic": True,  # as far as there was a choice: no kernel was chosen by timing
}
"""What runs of releases did that had no such key, whatever its default is today."""

_SAME_BUT_FOR_ROUNDING = {"compute.channels_last": "steps", "eval.batch_size": "scores"}
"""Keys that may change in a run, though the last bits of what comes later change with them."""


def changes_that_matter(before: Mapping[str, Any], now: RunConfig) -> list[str]:
    """List the keys on which the weights depend and that were given another value.

    More epochs or steps are no change: the run goes on. Nor are other micro-batches of the same
    total, since the steps stay the same. A data set at another place is none either: its samples
    are compared when it is read.

    Args:
        before: An earlier configuration, as plain data.
        now: The configuration of today.

    Returns:
        Lines such as ``optim.lr was 0.05, is 0.1``.
    """
    old, new = _settings_of_run(before), _settings(now.model_dump(mode="json"))
    default = {
        key: value
        for key, value in _settings(RunConfig().model_dump(mode="json")).items()
        if ".init_args." not in key  # those of the default class mean nothing to another one
    }
    changes = []
    for key in sorted(old.keys() | new.keys()):
        was, is_now = (_value_of(key, values, default) for values in (old, new))
        moved = without_places(key, was) == without_places(key, is_now)
        if was != is_now and not moved and _is_in(key, _MATTERS):
            changes.append(
                f"{key} was {MASK}, is {MASK}"
                if is_secret(key)
                else f"{key} was {was}, is {is_now}"
            )
    if rank_batch(before) != rank_batch(now.model_dump()):
        was, is_now = rank_batch(before), rank_batch(now.model_dump())
        changes.append(f"data.batch_size x data.accumulate was {was}, is {is_now}")
    length = "epochs" if now.steps is None else "steps"
    was, is_now = before.get(length), getattr(now, length)
    in_one_unit = (before.get("steps") is None) == (now.steps is None)
    if in_one_unit and was is not None and is_now < was:
        changes.append(f"{length} was {was}, is {is_now}")
    return changes


def _settings_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of an earlier configuration, perhaps of a release that lacked some of today's."""
    settings = _settings(config)
    return {key: value for key, value in _BEFORE.items() if not _has(key, settings)} | settings


def _value_of(key: str, values: Mapping[str, Any], default: Mapping[str, Any]) -> Any:
    """Return the value of a key, or its default unless there are keys below it instead."""
    return values.get(key) if _has(key, values) else default.get(key)


def _has(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a key, or one below it, is set: a component may be in the place of a word."""
    return key in settings or any(each.startswith(f"{key}.") for each in settings)


def shortened(before: Mapping[str, Any], now: RunConfig, steps_per_epoch: int) -> list[str]:
    """Describe that a run got fewer steps, where one length is in epochs and the other in steps.

    Args:
        before: An earlier configuration, as plain data.
        now: The configuration of today.
        steps_per_epoch: Steps of an epoch of the run that was saved.

    Returns:
        A line such as ``epochs was 20, steps is 100``, or none.
    """
    steps_before = before.get("steps")
    if (steps_before is None) == (now.steps is None):
        return []
    was = steps_before or before.get("epochs", 0) * steps_per_epoch
    if (now.steps or now.epochs * steps_per_epoch) >= was:
        return []
    if now.steps is None:
        return [f"steps was {steps_before}, epochs is {now.epochs}"]
    return [f"epochs was {before.get('epochs')}, steps is {now.steps}"]


def rounding_notes(before: Mapping[str, Any], now: RunConfig) -> list[str]:
    """List the changes on a resume that change the last bits of later steps, or scores.

    Args:
        before: An earlier configuration, as plain data.
        now: The configuration of today.

    Returns:
        Lines such as ``compute.channels_last was False, is True: ...``.
    """
    old, new = _settings_of_run(before), _settings(now.model_dump(mode="json"))
    return [
        f"{key} was {old[key]}, is {new[key]}: the last bits of later {what} may differ"
        for key, what in _SAME_BUT_FOR_ROUNDING.items()
        if old[key] != new[key]
    ]


def _is_in(key: str, keys: Sequence[str]) -> bool:
    """Whether a key is one of these, or below one of them; ``data.train_x`` is not ``data.train``.

    Arguments of components may have any names, so that no list of whole keys would do.
    """
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value; an empty mapping is as good as none."""
    settings = {key: value for key, value in leaves(config) if value != {}}
    if "loss" in settings:  # null, in whose place there is a component by default
        settings["loss.class_path"] = settings.pop("loss")
    return settings


def rank_batch(config: Mapping[str, Any]) -> int:
    """Samples of one rank in one step, as configured."""
    data = config.get("data", {})
    return int(data.get("batch_size", 0)) * int(data.get("accumulate", 0))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings, each with its value.

    Args:
        value: Mappings within mappings; an empty one is a value.
        path: Key of the whole.
    """
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, item in value.items():
        yield from leaves(item, _join(path, str(key)))
