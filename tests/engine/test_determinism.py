import os
import warnings

import pytest
import torch
from torch.backends import cudnn
from torch.utils import deterministic

from ddp_sgd.engine.determinism import deterministic_algorithms

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        warnings.showwarning,
        list(warnings.filters),
    )


def refuse(line):
    raise AssertionError(line)


def put():
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # has no deterministic implementation


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_torch_is_set_for_a_while(device, enabled, raises, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    try:
        with deterministic_algorithms(device, refuse, enabled=enabled):
            assert torch.are_deterministic_algorithms_enabled() == enabled
            assert cudnn.benchmark != enabled
            assert cudnn.deterministic == enabled
            assert deterministic.fill_uninitialized_memory != enabled
            workspace = ":4096:8" if enabled and device == CUDA else None
            assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == workspace
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert settings() == before


def test_a_workspace_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_algorithms(CUDA, refuse, enabled=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_errors_that_a_user_has_asked_for_stay():
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        with deterministic_algorithms(CPU, refuse, enabled=True), pytest.raises(RuntimeError):
            put()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch._C._set_deterministic_algorithms(False)


def test_an_operation_without_a_deterministic_implementation_is_named_once():
    lines = []
    with deterministic_algorithms(CPU, lines.append, enabled=True):
        put()
        put()
    assert lines == [
        "compute.deterministic is true, but put_ has no deterministic implementation: bits may "
        "differ from run to run"
    ]
    put()  # no warning any more, which would be an error


def test_other_warnings_about_determinism_keep_their_words():
    lines = []
    with deterministic_algorithms(CPU, lines.append, enabled=True):
        warnings.warn("Flash Attention defaults to a non-deterministic algorithm.\nx", stacklevel=1)
    assert lines == [
        "compute.deterministic is true, but torch warns: Flash Attention defaults to a "
        "non-deterministic algorithm."
    ]


def test_other_warnings_pass():
    with deterministic_algorithms(CPU, refuse, enabled=True):
        with pytest.warns(UserWarning, match="something else"):
            warnings.warn("something else", stacklevel=1)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            seen = []
            warnings.showwarning = lambda message, *rest: seen.append(str(message))
            warnings.warn("and another", stacklevel=1)
        assert seen == ["and another"]


def gradient_of_rows(rows, indices):
    rows = rows.clone().requires_grad_()
    taken = rows[indices]
    (taken * torch.linspace(0, 1, taken.numel()).view_as(taken)).sum().backward()
    return rows.grad


def test_threads_add_up_in_one_order():
    """Without the setting these differ within a few calls, on two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows, indices = torch.randn(100, 64), torch.randint(0, 3, (20_000,))
        with deterministic_algorithms(CPU, refuse, enabled=True):
            first, *others = (gradient_of_rows(rows, indices) for _ in range(6))
        assert all(torch.equal(first, other) for other in others)
    finally:
        torch.set_num_threads(threads)
