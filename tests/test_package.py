"""The package as a whole: what importing it costs, what it offers, how it is laid out."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from limits import WAIT_S

import ddp_sgd

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path.relative_to(ROOT / "ddp_sgd")
    for path in (ROOT / "ddp_sgd").rglob("*.py")
    if path.name != "__init__.py"
)
VAGUE = {"base", "common", "helper", "helpers", "misc", "util", "utils"}


def _loaded_by(program):
    """Names of the modules that a fresh interpreter holds after a program."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{program}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)",
        ],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "program",
    [
        "import ddp_sgd",
        "from ddp_sgd import Plan, RunConfig, UserError, make_plan",
        "from ddp_sgd.train import main; main(['--print_config'])",
        "from ddp_sgd.explain import main; main(['--world_size=8'])",
        "import ddp_sgd.launch",
        "import ddp_sgd.data",
    ],
)
def test_what_needs_no_torch_loads_none(program):
    assert _loaded_by(program) & {"torch", "wandb", "tqdm"} == set()


def test_training_loads_wandb_only_where_it_is_used():
    program = "from ddp_sgd import fit, start_runtime"
    assert _loaded_by(program) & {"torch", "wandb", "tensorboard"} == {"torch"}


@pytest.mark.parametrize("name", ddp_sgd.__all__)
def test_public_names_are_there_and_documented(name):
    assert getattr(ddp_sgd, name).__doc__
    assert name in dir(ddp_sgd)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        ddp_sgd.Trainer  # noqa: B018


def test_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ddp_sgd.__version__ == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_types_are_shipped():
    assert (ROOT / "ddp_sgd" / "py.typed").exists()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_a_name_a_docstring_and_a_test_file(module):
    assert module.stem not in VAGUE
    name = ".".join(("ddp_sgd", *module.with_suffix("").parts))
    assert importlib.import_module(name).__doc__
    assert (ROOT / "tests" / module.parent / f"test_{module.stem.strip('_')}.py").exists()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_is_in_the_table_of_the_architecture(module):
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert f"`{module.name}`" in page or f"`{module.parent}/`" in page


def test_modules_and_functions_stay_short():
    for module in MODULES:
        text = (ROOT / "ddp_sgd" / module).read_text()
        assert text.count("\n") <= 400, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (module, node.name)


def test_shipped_versions_are_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in pin and " " not in pin for pin in pins)
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= set(pins)
    assert not [pin for pin in pins if pin.startswith("ddp")]
