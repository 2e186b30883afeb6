"""Private names of torch that the package uses, each with a reason: they change without notice."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ddp_sgd"

REASONS = {
    "_abort_process_group": "ends a collective that waits for a lost rank; destroying waits for it",
    "_buffers": "buffers are replaced in place, also those of scripted modules, and None is kept",
    "_call_impl": "calls a compiled module uncompiled, for batches of another size",
    "_compiled_call_impl": "holds the compiled code of a module; one size of batches goes there",
    "_get_backend": "the backend of a device says whether its communicator has failed",
    "_load_from_state_dict": "shows whether a module loads its buffers in its own way",
    "_non_persistent_buffers_set": "says which buffers the state_dict of a module leaves out",
    "_orig_mod": "a compiled module takes any arguments; the module below has the signature",
    "_parameters": "parameters of scripted modules, and those registered as None",
    "_schema": "says which arguments an operator writes to",
    "_should_skip_dynamo": "asking torch's compiler not to look would import it, for 2 s",
    "_version": "counts writes to a tensor, also those that change no value",
    "torch._C._distributed_c10d.ErrorType": "the states in which a communicator can be",
    "torch._C._set_deterministic_algorithms": "the public one imports torch's compiler, for 2 s",
    "torch._amp_update_scale_": "adapts a loss scale on the device; torch.amp.GradScaler calls it",
    "torch._foreach_clamp_max_": "one call for many tensors; there is no public one",
    "torch._foreach_clamp_min_": "one call for many tensors; there is no public one",
    "torch._foreach_copy_": "one call for many tensors; there is no public one",
    "torch._foreach_mul_": "one call for many tensors; there is no public one",
    "torch._foreach_norm": "one call for many tensors; there is no public one",
    "torch._fused_sgd_": "torch.optim.SGD calls the same kernel, and imports torch's compiler",
    "torch.autograd.Variable._execution_engine": "a backward pass with a given gradient otherwise "
    "imports sympy, for half a second, and takes a fifth longer on a small model",
    "torch.nn.modules.batchnorm._BatchNorm": "the base of all batch normalization layers",
    "torch.nn.modules.batchnorm._NormBase": "the base of all layers with running statistics",
    "torch.utils._python_dispatch.TorchDispatchMode": "watches the operators of a pass",
    "torch.utils._pytree.tree_map": "follows the containers that torch itself knows",
}
"""Names that are used, and why nothing public takes their place."""

OF_PYTHON = {"_asdict", "_fields", "_make", "_replace", "os._exit"}
"""Documented, in spite of their names."""


def names_in(tree, methods_called=frozenset()):
    """List private names of others: imported, looked up on another object, or overridden.

    Attributes of ``self`` and ``cls`` are a class's own.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names if _is_foreign_and_private(each.name)}
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{each.name}" for each in node.names]
            found |= set(filter(_is_foreign_and_private, paths))
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls"):
                root = owner.split(".")[0]
                found.add(f"{owner}.{node.attr}" if root in ("torch", "os", "sys") else node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(str(name.value)):
                found.add(name.value)
        elif isinstance(node, ast.ClassDef) and node.bases:
            overridden = set(_private_methods(node)) - methods_called
            found |= overridden
    return found - OF_PYTHON


def _private_methods(node):
    """Name the private methods of a class but for pydantic's validators, which pydantic calls."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and _is_private(each.name):
            decorators = map(ast.unparse, each.decorator_list)
            yield from [] if any("validator" in text for text in decorators) else [each.name]


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


def _is_foreign_and_private(path):
    return not path.startswith("ddp_sgd.") and any(map(_is_private, path.split(".")))


def called_in(tree):
    """List the attributes of ``self`` and ``cls`` that are read."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
    }


def test_every_private_name_has_a_reason():
    """The last assertion names the file of a new one, or one that is listed and gone."""
    used = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for name in names_in(tree, called_in(tree)):
            used.setdefault(name, []).append(path.name)
    assert {name: files for name, files in used.items() if name not in REASONS} == {}
    assert set(REASONS) - set(used) == set()
    assert all(REASONS.values())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch._utils import x", {"torch._utils.x"}),
        ("from torch.nn.modules import batchnorm, _functions", {"torch.nn.modules._functions"}),
        ("torch._foreach_add_(x, y)", {"torch._foreach_add_"}),
        ("model._parameters.clear()", {"_parameters"}),
        ("getattr(model, '_orig_mod', None)", {"_orig_mod"}),
        ("class A(B):\n    def _hook(self): ...", {"_hook"}),
        ("class A(B):\n    def _own(self): ...\n    def do(self): self._own()", set()),
        ("self._parameters, x.__dict__, row._asdict()", set()),
        ("from ddp_sgd.config._hidden import x", set()),
    ],
)
def test_a_private_name_is_found_however_it_is_used(source, found):
    tree = ast.parse(source)
    assert names_in(tree, called_in(tree)) == found
