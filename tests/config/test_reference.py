import re
from pathlib import Path

import pytest
import torch

from ddp_sgd.config.keys import all_keys, keys_text, reference_markdown
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import Component
from ddp_sgd.config.sources import gather
from ddp_sgd.instantiate import instantiate

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def _shown_keys():
    keys = all_keys()
    return [key for key in keys.values() if key.kind != "section" and key.parent not in _components]


_components = [key.name for key in all_keys().values() if key.kind == "component"]


def test_the_document_is_up_to_date():
    assert reference_markdown(PAGE) == PAGE, "run: make docs"


def test_tables_that_are_stale_are_written_again():
    stale = re.sub(r"^\| `.*", "| `old` |", PAGE, flags=re.MULTILINE)
    assert len(stale) < len(PAGE) / 2
    assert reference_markdown(stale) == PAGE


def test_the_document_has_a_row_for_every_key():
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGE, flags=re.MULTILINE)
    names = [key.name for key in _shown_keys()]
    assert sorted(rows) == sorted([*names, *Component.model_fields])


def _read_blocks(folder):
    """Configurations of the document, one a block."""
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL):
        file = folder / "block.yaml"
        file.write_text(block)
        yield RunConfig.model_validate(gather([file], {}, []).values)


def test_models_and_losses_of_the_document_can_be_built(tmp_path):
    inputs, targets = torch.zeros(5, 64), torch.arange(5)
    configs = list(_read_blocks(tmp_path))
    assert len(configs) > 4
    for config in configs:
        model, loss = instantiate(config.model, "model"), instantiate(config.loss, "loss")
        assert loss(model(inputs), targets).ndim == 0


def test_transforms_of_the_document_can_be_built(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    sets = [config.data.train for config in _read_blocks(tmp_path)]
    nested = [part.init_args["transform"] for part in sets if "transform" in part.init_args]
    assert len(nested) > 1
    for component in nested:
        transform = instantiate(Component.model_validate(component), "transform")
        image = transform(torchvision.transforms.v2.functional.to_pil_image(torch.ones(1, 28, 28)))
        assert (image.dtype, image.max()) == (torch.float32, 1)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_help_names_every_key_and_fits(width):
    text = keys_text(width=width)
    assert all(f"--{key.name}: " in text for key in _shown_keys())
    assert max(len(line) for line in text.splitlines()) <= width


def test_help_gives_range_default_and_meaning():
    assert (
        "  --optim.momentum: a value in [0, 1), default 0.9\n"
        "      Share of the last update direction that is kept, in [0, 1).\n"
    ) in keys_text(width=100)
