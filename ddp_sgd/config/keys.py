"""Configuration keys: type in words, default, range and meaning of each; the reference of all keys.

The reference is the text of ``--help``, and the tables of docs/configuration.md.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.yaml_io import write_yaml

Node = Mapping[str, Any]

# What an example looks like where the default is null or empty and so shows nothing.
_EXAMPLES = {
    "integer": "256",
    "number": "1.0",
    "array of number": "[30, 60]",
    "array of string": "[a, b]",
    "array of component": "[{class_path: ddp_sgd.data.augment.RandomHorizontalFlip}]",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of the configuration.

    Args:
        name: Dotted path, such as ``optim.lr``.
        kind: ``section`` holds keys of its own, ``component`` those of ``Component``.
        choices: What it takes, such as ``a value in [0, 1)``.
        names: The words that it takes, if there are some to choose from.
        example: A good value as YAML; empty if there is none to offer.
        default: Plain data.
        meaning: The docstring of the field, on one line.
        is_text: Whether it takes any text, and perhaps null, but nothing else.
        may_be_null: Whether it takes null.
    """

    name: str
    kind: Literal["section", "component", "value"]
    choices: str
    names: tuple[str, ...]
    example: str
    default: Any
    meaning: str
    is_text: bool
    may_be_null: bool

    @property
    def setting(self) -> str:
        """The key with a good value, ready to paste after two dashes."""
        if self.kind == "section":
            return next(key for key in keys_below(self.name) if key.kind == "value").setting
        if self.kind == "component":
            if self.default is None:
                return f"{self.name}.class_path=MODULE.NAME"
            if isinstance(self.default, dict):
                return f"{self.name}.class_path={self.default['class_path']}"
            return f"{self.name}={yaml_value(self.default)}"
        is_switch = isinstance(self.default, bool)
        return f"{self.name}={'true' if is_switch else self.example or yaml_value(self.default)}"

    @property
    def parent(self) -> str:
        """Dotted path of the section that holds the key; empty at the top."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Last part of the dotted path."""
        return self.name.rpartition(".")[2]


@cache
def all_keys() -> Mapping[str, Key]:
    """Every key by its dotted path, in the order of the models."""
    schema = RunConfig.model_json_schema()
    defaults = RunConfig().model_dump(mode="json")
    return {key.name: key for key in _walk("", schema, schema["$defs"], defaults)}


def find_key(path: str) -> Key | None:
    """Find a key by its dotted path; keys of a named held-out set are those of ``data.eval``.

    Args:
        path: Such as ``optim.lr`` or ``data.eval.clean.init_args``.
    """
    _, is_eval, below = path.partition("data.eval.")
    keys = all_keys()
    if path in keys or not is_eval:
        return keys.get(path)
    _, dot, leaf = below.partition(".")
    return keys.get(f"data.eval{dot}{leaf}")


def keys_below(parent: str) -> tuple[Key, ...]:
    """Keys that a section or component holds itself; those at the top for an empty path."""
    return tuple(key for key in all_keys().values() if key.parent == parent)


def yaml_value(value: Any) -> str:
    """A value on one line, as YAML."""
    return write_yaml(value, on_one_line=True).removesuffix("...\n").rstrip("\n")


def _walk(parent: str, model: Node, models: Node, defaults: Any) -> Iterator[Key]:
    for leaf, node in model["properties"].items():
        name = f"{parent}.{leaf}" if parent else leaf
        default = defaults.get(leaf) if isinstance(defaults, dict) else None
        reference = next((part["$ref"] for part in _alternatives(node) if "$ref" in part), "")
        below = models.get(reference.rpartition("/")[2])
        meaning = node.get("description") or (below or {}).get("description", "")
        yield Key(
            name=name,
            kind=_kind(below),
            choices=_choices(node),
            names=tuple(name for part in _alternatives(node) for name in part.get("enum", ())),
            example=_example(node, default),
            default=default,
            meaning=" ".join(meaning.split()),
            is_text=_is_text(node),
            may_be_null=any(part.get("type") == "null" for part in _alternatives(node)),
        )
        if below:
            yield from _walk(name, below, models, default)


def _kind(model: Node | None) -> Literal["section", "component", "value"]:
    if model is None:
        return "value"
    return "component" if "class_path" in model["properties"] else "section"


def _is_text(node: Node) -> bool:
    types = {part.get("type") for part in _alternatives(node) if part.get("type") != "null"}
    is_choice = any("const" in part or "enum" in part for part in _alternatives(node))
    return types == {"string"} and not is_choice


def _alternatives(node: Node) -> list[Node]:
    """The members of a union, null last, since it is what people look for last."""
    parts = [part for each in node.get("anyOf", [node]) for part in each.get("oneOf", [each])]
    return sorted(parts, key=lambda part: part.get("type") == "null")


def _choices(node: Node) -> str:
    return " or ".join(_words(part) for part in _alternatives(node))


def _words(node: Node) -> str:
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return f"one of {', '.join(node['enum'])}"
    words: dict[str, Callable[[], str]] = {
        "boolean": lambda: "true or false",
        "integer": lambda: f"a whole number{_range(node)}",
        "number": lambda: f"a number{_range(node)}".replace("a number in", "a value in"),
        "string": lambda: f"text{_form(node)}",
        "array": lambda: f"a list{_items(node['items'])}",
        "null": lambda: "null",
        "object": lambda: "components by name" if "$ref" in _values(node) else "a mapping",
    }
    return words.get(node.get("type", ""), lambda: "a mapping")()


def _values(node: Node) -> Node:
    """The schema of the values of a mapping; empty if they may be anything."""
    values = node.get("additionalProperties")
    return values if isinstance(values, dict) else {}


def _items(node: Node) -> str:
    if "$ref" in node:
        return " of components"
    return f", each item {_choices(node)}" if node else ""


def _range(node: Node) -> str:
    """The interval of a number as `` in [0, 1)``, `` above 0``, or nothing."""
    at_least, above = node.get("minimum"), node.get("exclusiveMinimum")
    at_most, less_than = node.get("maximum"), node.get("exclusiveMaximum")
    lower = above if at_least is None else at_least
    upper = less_than if at_most is None else at_most
    if lower is not None and upper is not None:
        left, right = "(" if at_least is None else "[", ")" if at_most is None else "]"
        return f" in {left}{_number(lower)}, {_number(upper)}{right}"
    if lower is not None:
        return f" {'above' if at_least is None else 'of at least'} {_number(lower)}"
    if upper is not None:
        return f" {'below' if at_most is None else 'of at most'} {_number(upper)}"
    return ""


def _number(value: float) -> str:
    if value >= 2**53 and int(value).bit_count() == 1:
        return f"2^{int(value).bit_length() - 1}"
    return str(int(value)) if value == int(value) else str(value)


def _form(node: Node) -> str:
    if pattern := node.get("pattern"):
        return f" that matches {pattern}"
    return " that is not empty" if node.get("minLength") else ""


def _example(node: Node, default: Any) -> str:
    if examples := node.get("examples"):
        return yaml_value(examples[0])
    if default not in (None, "auto", [], {}) and not isinstance(default, dict | bool):
        return "" if "enum" in node else yaml_value(default)
    for part in _alternatives(node):
        below = part.get("items", {})
        kind = "component" if "$ref" in below else below.get("type")
        items = f" of {kind}" if "items" in part else ""
        is_choice = default == "auto" or "const" in part
        if part.get("type") == "number" and "exclusiveMaximum" in part:
            return str(part["exclusiveMaximum"] / 2)
        if not is_choice and (example := _EXAMPLES.get(f"{part.get('type')}{items}")):
            return example
    return ""


_COMPONENT_TABLE = "| key | type | default | meaning |\n|---|---|---|---|\n"
_ALL_KEYS = "\n## Keys\n"


def keys_text(*, width: int = 100) -> str:
    """List every key by section, with type, range, default and meaning, as ``--help`` does.

    Args:
        width: Longest line, in characters.
    """
    lines = textwrap.wrap(
        "Keys of the configuration, as --key=value with a value in YAML, text as it is, or in a "
        "YAML file. Later sources win: defaults, files in order, variables such as "
        "DDP_SGD_OPTIM__LR=0.1, command line.",
        width,
    )
    for section, keys in _sections():
        title = f"{section.name}: {section.meaning}" if section else "the run:"
        lines += ["", *textwrap.wrap(title, width)]
        for key in keys:
            head = f"--{key.name}: {_type_of(key)}, default {_default_of(key)}"
            lines += _wrap(head, width, first=2, rest=4) + _wrap(
                key.meaning, width, first=6, rest=6
            )
    return "\n".join(lines) + "\n"


def reference_markdown(page: str) -> str:
    """Write the tables of ``docs/configuration.md`` again, and keep the prose before them."""
    rows = "\n".join(_row(key, key.leaf) for key in keys_below("loss"))
    head, _, rest = page.partition(_COMPONENT_TABLE)
    prose = rest[rest.index("\n\n") : rest.index(_ALL_KEYS)]
    parts = [f"{head}{_COMPONENT_TABLE}{rows}{prose}{_ALL_KEYS}"]
    for section, keys in _sections():
        title, about = (f"`{section.name}`", section.meaning) if section else ("The run", "")
        parts.append(f"### {title}\n")
        parts += [f"{about}\n"] if about else []
        table = ["| key | type and range | default | meaning |", "|---|---|---|---|"]
        table += [_row(key, key.name) for key in keys]
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def _row(key: Key, name: str) -> str:
    default = f"`{_default_of(key)}`" if name != "class_path" else ""
    return f"| `{name}` | {_cell(_type_of(key))} | {default} | {_cell(key.meaning)} |"


def _sections() -> Iterator[tuple[Key | None, tuple[Key, ...]]]:
    """The keys at the top, then each section with its keys."""

    def plain(parent: str) -> tuple[Key, ...]:
        return tuple(key for key in keys_below(parent) if key.kind != "section")

    yield None, plain("")
    for section in all_keys().values():
        if section.kind == "section":
            yield section, plain(section.name)


def _wrap(text: str, width: int, *, first: int, rest: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * first,
        subsequent_indent=" " * rest,
        break_on_hyphens=False,
    )


def _type_of(key: Key) -> str:
    return (
        key.choices.replace("a mapping", "a component") if key.kind == "component" else key.choices
    )


def _default_of(key: Key) -> str:
    if not (key.kind == "component" and isinstance(key.default, dict)):
        return yaml_value(key.default)
    arguments = ", ".join(
        f"{name}={yaml_value(value)}" for name, value in key.default["init_args"].items()
    )
    return f"{key.default['class_path']}({arguments})"


def _cell(text: str) -> str:
    """Escape what Markdown would take for a cell border or an emphasis."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
