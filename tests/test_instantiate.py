import collections
import gc
import sys
import textwrap
from functools import partial

import pytest
import torch
import user_code
from torch import nn

from ddp_sgd.config import Component
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.instantiate import instantiate, uncollected
from ddp_sgd.models import MLP


def _build(path, where="data.train", failure=ConfigError, **init_args):
    return instantiate(Component(class_path=path, init_args=init_args), where, failure=failure)


def _taken(path, *args, **init_args):
    """What a configuration names with ``call: false``."""
    component = Component(class_path=path, args=args, init_args=init_args, call=False)
    return instantiate(component, "x")


def _called(path, *args, **init_args):
    return instantiate(Component(class_path=path, args=args, init_args=init_args), "x")


def _held(**init_args):
    return _build("user_code.Holder", **init_args)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that a configuration can name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    return write


def test_class_with_its_arguments():
    model = _build("ddp_sgd.models.MLP", inputs=3, hidden=[5], classes=2)
    assert isinstance(model, MLP)
    assert model(torch.zeros(7, 3)).shape == (7, 2)


def test_function_as_a_factory():
    layer = _build("user_code.linear", inputs=3)
    assert (layer.in_features, layer.out_features) == (3, 10)


def test_class_that_hides_its_signature():
    assert _build("builtins.dict", one=1) == {"one": 1}


def test_attribute_of_a_class():
    assert _build("collections.OrderedDict.fromkeys", iterable=["a"]) == collections.OrderedDict(
        a=None
    )


def test_class_inside_a_package_that_also_has_a_module_of_that_name(module):
    module("shapes.__init__", "from shapes.square import square\n")
    module("shapes.square", "def square():\n    return 'made'\n")
    assert _build("shapes.square") == "made"


def test_submodule_that_its_package_does_not_import(module):
    module("tools.__init__", "")
    module("tools.deep", "class Thing:\n    pass\n")
    assert type(_build("tools.deep.Thing")).__name__ == "Thing"


def test_positional_arguments():
    layer = _called("torch.nn.Linear", 3, 5, bias=False)
    assert (layer.in_features, layer.out_features, layer.bias) == (3, 5, None)
    assert _called("user_code.by_position", 1, "b", 3, [4], last=5) == (1, "b", (3, [4]), 5)


def test_layers_in_a_row():
    linear = {"class_path": "torch.nn.Linear", "args": [12, 2]}
    model = _called("torch.nn.Sequential", {"class_path": "torch.nn.Flatten"}, linear)
    assert [type(layer) for layer in model] == [nn.Flatten, nn.Linear]
    assert model(torch.zeros(5, 3, 4)).shape == (5, 2)


def test_class_weights():
    weight = {"class_path": "torch.tensor", "args": [[1.0, 2.5]]}
    loss = _called("torch.nn.CrossEntropyLoss", weight=weight)
    assert torch.equal(loss.weight, torch.tensor([1.0, 2.5]))


def test_dtype_by_position():
    assert _called("user_code.by_position", "torch.int8", "torch.int8", "torch.int8") == (
        torch.int8, "torch.int8", (torch.int8,), None,
    )  # fmt: skip
    assert _called("torch.zeros", 2, dtype="torch.int8").dtype is torch.int8


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("torch.nn.ReLU", nn.ReLU),
        ("torch.nn.functional.cross_entropy", nn.functional.cross_entropy),
        ("user_code.Shade.LIGHT", user_code.Shade.LIGHT),
        ("user_code.NOT_CALLABLE", 3),
        ("torch.float16", torch.float16),
        ("torch.nn.functional", nn.functional),
    ],
)
def test_what_is_named_without_a_call(path, named):
    assert _taken(path) is named


def test_what_is_named_without_a_call_nests():
    shade = {"class_path": "user_code.Shade.DARK", "call": False}
    norm = {"class_path": "torch.nn.LayerNorm", "init_args": {"eps": 0.5}, "call": False}
    held = _held(value=[shade, {"norm": norm}])
    assert held.value[0] is user_code.Shade.DARK
    assert held.value[1]["norm"](4).eps == 0.5
    assert _called("user_code.by_position", shade, "")[0] is user_code.Shade.DARK


def test_partial_holds_arguments_that_are_built():
    relu = {"class_path": "torch.nn.ReLU"}
    held = _taken("user_code.by_position", relu, last=relu)
    assert isinstance(held, partial)
    first, second, rest, last = held("b", 3)
    assert (type(first), second, rest, type(last)) == (nn.ReLU, "b", (3,), nn.ReLU)


def test_partial_of_a_function_lacks_what_the_caller_gives():
    loss = _taken("torch.nn.functional.cross_entropy", label_smoothing=0.5)
    outputs, targets = torch.eye(3), torch.arange(3)
    wanted = nn.functional.cross_entropy(outputs, targets, label_smoothing=0.5)
    assert torch.equal(loss(outputs, targets), wanted)


def test_partial_of_what_hides_its_signature():
    assert _taken("builtins.dict", one=1)(two=2) == {"one": 1, "two": 2}


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (
            {"class_path": "user_code.Shade.DARK"},
            "x.class_path is user_code.Shade.DARK, a Shade; name a class or a function, or set "
            "x.call=false to take it as it is.",
        ),
        (
            {"class_path": "user_code.Shade.DARK", "call": False, "args": [1]},
            "x.class_path is user_code.Shade.DARK, a Shade; name a class or a function, or leave "
            "the arguments out to take it as it is.",
        ),
        (
            {"class_path": "torch.nn.functional.mse_loss"},
            "x.init_args is [] while torch.nn.functional.mse_loss says: missing a required "
            "argument: 'input'; it accepts (input, target, size_average, reduce, reduction, "
            "weight), or set x.call=false to take it without a call.",
        ),
        (
            {"class_path": "torch.nn.Flatten", "args": [1, 2, 3]},
            "x.args is [1, 2, 3] while torch.nn.Flatten says: too many positional arguments; "
            "it accepts (start_dim, end_dim).",
        ),
        (
            {"class_path": "torch.nn.Flatten", "args": [1], "init_args": {"start_dim": 2}},
            "x.args is [1] and x.init_args is ['start_dim'] while torch.nn.Flatten says: multiple "
            "values for argument 'start_dim'; it accepts (start_dim, end_dim).",
        ),
        (
            {"class_path": "user_code.by_position", "init_args": {"first": 1}},
            "; it accepts (first, second, *rest, last).",
        ),
        (
            {"class_path": "ddp_sgd.models.MLP", "call": False, "init_args": {"hiden": 3}},
            "x.init_args.hiden is not an argument of ddp_sgd.models.MLP; did you mean hidden?",
        ),
        (
            {"class_path": "torch.nn.Flatten", "call": False, "args": [1, 2, 3]},
            "x.args is [1, 2, 3] while torch.nn.Flatten says: too many positional arguments; ",
        ),
        (
            {"class_path": "torch.tensor", "args": [["a"]]},
            "x is torch.tensor, which failed with ValueError: ",
        ),
        (
            {"class_path": "torch.tensor", "args": [["a"]]},
            "; check x.args and x.init_args, it accepts (see its documentation).",
        ),
    ],
)
def test_arguments_that_do_not_fit(component, message):
    with pytest.raises(ConfigError) as caught:
        instantiate(Component.model_validate(component), "x")
    assert message in str(caught.value)


def test_components_nest_in_lists_and_mappings():
    relu = {"class_path": "torch.nn.ReLU"}
    inner = {"class_path": "user_code.Holder", "init_args": {"value": [relu]}}
    held = _held(value={"layers": [relu, [relu]], "size": 3}, other=(inner,))
    assert [type(held.value["layers"][0]), type(held.value["layers"][1][0])] == [nn.ReLU, nn.ReLU]
    assert held.value["size"] == 3
    assert isinstance(held.others["other"][0].value[0], nn.ReLU)


def test_pipeline_of_torchvision():
    pytest.importorskip("torchvision")
    steps = [
        {
            "class_path": "torchvision.transforms.v2.ToDtype",
            "init_args": {"dtype": "torch.float64"},
        },
        {
            "class_path": "torchvision.transforms.v2.Normalize",
            "init_args": {"mean": [1], "std": [2]},
        },
    ]
    pipeline = _build("torchvision.transforms.v2.Compose", transforms=steps)
    image = torch.full((1, 2, 2), 5, dtype=torch.float32)
    assert torch.equal(pipeline(image), torch.full((1, 2, 2), 2.0, dtype=torch.float64))


def test_dtype_where_one_is_asked_for():
    assert _held(dtype="torch.float16").dtype is torch.float16


def test_dtype_where_nothing_is_said_of_the_type():
    assert _held(value=["torch.int8"]).value == [torch.int8]


def test_text_that_looks_like_a_dtype_where_text_is_asked_for():
    assert _held(text="torch.float16").text == "torch.float16"


@pytest.mark.parametrize("text", ["torch.nn", "torch.no_such_type", "float32"])
def test_text_that_names_no_dtype_stays_text(text):
    assert _held(dtype=text).dtype == text


def test_plain_data_stays_as_it_is():
    data = {"a": [1, 2.5, None, True], "b": {"c": "text"}}
    assert _held(value=data).value == data


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such.Net", "x.class_path is no_such.Net, but there is no module no_such; install it,"),
        ("torch.nn.Liner", "but torch.nn has no Liner; did you mean Linear?"),
        ("torch.nnn.Linear", "but torch has no nnn; did you mean nn?"),
        ("torch.nn.qqqqqqqq", "but torch.nn has no qqqqqqqq; check the spelling."),
        ("torch.nn.Linear.in_featurez", "but Linear has no in_featurez; "),
        (
            "user_code.NOT_CALLABLE",
            "is user_code.NOT_CALLABLE, a int; name a class or a function, or",
        ),
        ("torch.nn", "x.class_path is torch.nn, a module; name a class or a function, or"),
    ],
)
def test_name_that_leads_nowhere(path, message):
    with pytest.raises(ConfigError) as caught:
        _build(path, where="x")
    assert message in str(caught.value)


def test_module_that_needs_another(module):
    module("needy", "import no_such_dependency\n\nclass Net:\n    pass\n")
    with pytest.raises(ConfigError, match="which needs the module no_such_dependency; install it"):
        _build("needy.Net")


def test_module_whose_import_fails(module):
    module("broken", "1 / 0\n")
    with pytest.raises(
        ConfigError, match=r"whose import failed with ZeroDivisionError: .*; fix broken\."
    ):
        _build("broken.Net")


def test_module_that_does_not_parse(module):
    module("torn", "def net(:\n")
    with pytest.raises(ConfigError, match="whose import failed with SyntaxError"):
        _build("torn.Net")


def test_unknown_argument():
    with pytest.raises(ConfigError) as caught:
        _build("ddp_sgd.models.MLP", where="model", inputs=3, hiden=[5], classes=2)
    assert str(caught.value) == (
        "model.init_args.hiden is not an argument of ddp_sgd.models.MLP; did you mean hidden? "
        "it accepts (inputs, hidden, classes)."
    )


def test_missing_argument():
    with pytest.raises(ConfigError) as caught:
        _build("ddp_sgd.models.MLP", where="model", inputs=3)
    assert str(caught.value) == (
        "model.init_args is ['inputs'] while ddp_sgd.models.MLP says: missing a required argument: "
        "'hidden'; it accepts (inputs, hidden, classes)."
    )


def test_call_that_raises():
    with pytest.raises(ConfigError) as caught:
        _build("user_code.Unbuildable", where="model")
    assert str(caught.value) == (
        "model is user_code.Unbuildable, which failed with ValueError: width is odd; "
        "check model.init_args, it accepts ()."
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_call_that_raises_without_a_signature():
    with pytest.raises(ConfigError, match=r"it accepts \(see its documentation\)"):
        _build("builtins.range")


def test_kind_of_the_failure_is_the_callers_choice():
    with pytest.raises(DataError, match=r"failed with ValueError: width is odd"):
        _build("user_code.Unbuildable", failure=DataError)


def test_error_that_says_what_to_do_passes_unchanged():
    with pytest.raises(DataError) as caught:
        _build("ddp_sgd.data.Digits", split="all")
    assert str(caught.value) == "split is 'all'; choose train or eval."


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        (
            {"class_path": "torch.nn.Liner"},
            "data.train.init_args.value.steps[1].class_path is torch.nn.Liner, but torch.nn has no",
        ),
        (
            {"class_path": "torch.nn.Linear", "init_args": {"in_featurez": 3}},
            "data.train.init_args.value.steps[1].init_args.in_featurez is not an argument of torch",
        ),
        (
            {"class_path": "user_code.Unbuildable"},
            "data.train.init_args.value.steps[1] is user_code.Unbuildable, which failed with Value",
        ),
        (
            {"class_path": 3},
            "data.train.init_args.value.steps[1].class_path is 3; choose text that matches",
        ),
        (
            {"class_path": "torch.nn.ReLU", "args": "ab"},
            "data.train.init_args.value.steps[1].args is 'ab'; choose a list.",
        ),
        (
            {"class_path": "torch.nn.ReLU", "init_args": [1]},
            "data.train.init_args.value.steps[1].init_args is [1]; choose a mapping.",
        ),
        (
            {"class_path": "torch.nn.ReLU", "call": "no"},
            "data.train.init_args.value.steps[1].call is 'no'; choose true or false.",
        ),
        (
            {"class_path": "torch.nn.Sequential", "args": [{"class_path": "torch.nn.Liner"}]},
            "data.train.init_args.value.steps[1].args[0].class_path is torch.nn.Liner, but torch",
        ),
        (
            {"class_path": "torch.nn.ReLU", "arguments": {}},
            "data.train.init_args.value.steps[1].arguments is {}; a nested object takes "
            "class_path, args, init_args, call.",
        ),
    ],
)
def test_fault_of_a_nested_object_names_its_place(nested, message):
    with pytest.raises(ConfigError) as caught:
        _held(value={"steps": [1, nested]})
    assert message in str(caught.value)


def test_what_is_imported_is_not_collected_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "looks_at_collection.py").write_text(
        "import gc\nON = gc.isenabled()\nmake = dict\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    instantiate(Component(class_path="looks_at_collection.make", init_args={}), "model")
    assert sys.modules["looks_at_collection"].ON is False
    assert gc.isenabled()


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
