import pytest
import yaml

from ddp_sgd.config.yaml_events import DocumentBuilder, plain_scalar
from ddp_sgd.errors import ConfigError


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", None)])
def test_both_parsers_of_pyyaml_give_the_same(loader):
    if loader is None:
        pytest.skip("PyYAML was built without libyaml")
    events = yaml.parse("a: [010, 'on', &x {b: ~}]\nc: *x\n", Loader=loader)
    assert DocumentBuilder("x").build(events) == {"a": [10, "on", {"b": None}], "c": {"b": None}}


def test_no_document_is_none():
    assert DocumentBuilder("x").build([]) is None


def test_the_place_stands_in_the_message():
    with pytest.raises(ConfigError, match=r"^here line 1 has the tag !x; "):
        DocumentBuilder("here").build(yaml.parse("!x 1", Loader=yaml.SafeLoader))


def test_plain_scalars():
    assert [plain_scalar(text) for text in ("1", "1.0", "on", "")] == [1, 1.0, "on", None]
