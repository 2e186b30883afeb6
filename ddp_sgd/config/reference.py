"""Configuration reference for ``--help`` and docs/configuration.md, generated from the sections."""

import textwrap
from collections.abc import Iterator

from ddp_sgd.config.keys import Key, all_keys, keys_below, yaml_value


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


def reference_markdown() -> str:
    """Text of ``docs/configuration.md``."""
    rows = "\n".join(_row(key, key.leaf) for key in keys_below("loss"))
    parts = [_INTRODUCTION.replace("COMPONENT_ROWS", rows)]
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
    if key.kind != "component" or key.default is None:
        return yaml_value(key.default)
    arguments = ", ".join(
        f"{name}={yaml_value(value)}" for name, value in key.default["init_args"].items()
    )
    return f"{key.default['class_path']}({arguments})"


def _cell(text: str) -> str:
    """Escape what Markdown would take for a cell border or an emphasis."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


_INTRODUCTION = """# Configuration

<!-- Made by ddp_sgd.config.reference.reference_markdown(); a test fails when it is stale. -->

A run is described by one nested mapping. Every key has a default, which trains the embedded
digits; you write down only what differs. The whole of it is checked before anything slow is
imported, and all faults are reported together.

## Sources, and which one wins

From the weakest to the strongest:

1. the defaults in the tables below;
2. YAML files, in the order of their `--config FILE` flags;
3. environment variables: `DDP_SGD_` and the key in capitals, with `__` for the dot, such as
   `DDP_SGD_OPTIM__LR=0.1`. A variable with this prefix that names no key is an error;
4. the command line: `--optim.lr=0.1` or `--optim.lr 0.1`.

Values in variables and on the command line are YAML, so that `--schedule.milestones='[30, 60]'`
is a list and `--data.eval=null` is null. Where a key takes text, its words are taken as they are:
`--name=12345`, `--output_dir='/x/run #3'` and `DDP_SGD_WANDB__NAME='lr: 0.1'` need no quotes of
their own; if such a key may be null, `null` and an empty value are null, and `"null"` in quotes is
text. In any value of one line `#` is text, too. In a file, comments are left out, and
`name: "12345"` needs the quotes. `~` at the head of `output_dir`, `resume` or `--config` is the
home folder, which the resolved configuration writes out.

`--print_config` prints what all sources come to; saved to a file and given as `--config`, it
resolves to the same.

```bash
python -m ddp_sgd.train --optim.lr=0.1 --epochs=5 --print_config
```

Mappings merge key by key; lists and other values are replaced whole. One more rule: where a
source gives a component another `class_path`, the `args`, `init_args` and `call` from weaker
sources are dropped, since they belong to another object.

## Components

`model`, `loss`, `data.train` and `data.eval` name what the run builds: an importable class or
function, and the arguments of its call. A component has four keys:

| key | type | default | meaning |
|---|---|---|---|
COMPONENT_ROWS

An argument may be a component itself, as deep as needed, also inside lists and mappings:

```yaml
data:
  train:
    class_path: torchvision.datasets.MNIST
    init_args:
      root: datasets
      transform:
        class_path: torchvision.transforms.v2.Compose
        init_args:
          transforms:
            - class_path: torchvision.transforms.v2.ToImage
            - class_path: torchvision.transforms.v2.ToDtype
              init_args: {dtype: torch.float32, scale: true}
```

Positional arguments, where a class takes them only so:

```yaml
model:
  class_path: torch.nn.Sequential
  args:
    - class_path: torch.nn.Flatten
    - {class_path: torch.nn.Linear, args: [64, 32]}
    - {class_path: torch.nn.ReLU}
    - {class_path: torch.nn.Linear, init_args: {in_features: 32, out_features: 10}}
```

A tensor, such as class weights:

```yaml
loss:
  class_path: torch.nn.CrossEntropyLoss
  init_args:
    weight: {class_path: torch.tensor, args: [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0]]}
```

A function or a class that is not called here, since `call` is false. With arguments it is a
`functools.partial`, which holds them for the call to come:

```yaml
loss:
  class_path: torch.nn.functional.cross_entropy
  init_args: {label_smoothing: 0.1}
  call: false
```

An enum member, or any other object that can be imported, is named with `call: false` as well. A
dtype is written `torch.float32`:

```yaml
data:
  train:
    class_path: torchvision.datasets.MNIST
    init_args:
      root: datasets
      transform:
        class_path: torchvision.transforms.v2.Compose
        args:
          - - class_path: torchvision.transforms.v2.Resize
              init_args:
                size: 32
                interpolation:
                  class_path: torchvision.transforms.v2.InterpolationMode.BILINEAR
                  call: false
            - class_path: torchvision.transforms.v2.ToImage
            - class_path: torchvision.transforms.v2.ToDtype
              args: [torch.float32]
              init_args: {scale: true}
```

On the command line the keys are `--model.args='[64, 10]'` and `--loss.call=false`.

**A `class_path` imports code and runs it.** Configurations are trusted input: read a file from
somebody else before you run it, as you would read their script.

## YAML

Files follow the core schema of YAML 1.2: only `true` and `false` are booleans, so that `on`,
`yes` and `no` are text; `1e-3` is a number, `010` is ten, `0o10` is eight; `1:30` and dates are
text. To make a number text, put it in quotes. Refused, each with file and line: duplicate keys,
keys that are not text, tags (`!!...`), merge keys (`<<`), a second document, more than 1 MiB,
more than 64 levels, and more than 100,000 values with aliases expanded.

## Keys
"""
