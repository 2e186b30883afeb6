"""Real allocations that fail: 32 TiB."""

import numpy as np
import pytest
import torch
from torch import nn

from ddp_sgd.config.sections import Component
from ddp_sgd.errors import ConfigError
from ddp_sgd.instantiate import instantiate
from ddp_sgd.optim.sgd import SGD, Group
from ddp_sgd.out_of_memory import Use, describe_out_of_memory, memory_for

HUGE = 2**45


def huge_parameter():
    return nn.Parameter(torch.zeros(1).expand(HUGE))


@pytest.mark.parametrize(
    ("work", "cause"),
    [
        (lambda: torch.empty(HUGE), "tried to allocate 140737488355328 bytes"),
        (lambda: np.empty(HUGE), "Unable to allocate 256. TiB"),
        (lambda: SGD([Group([huge_parameter()], 0.0)], momentum=0.9), "tried to allocate"),
    ],
)
@pytest.mark.parametrize("use", list(Use))
def test_memory_of_the_host_that_runs_out_is_reported_by_what_it_was_for(work, cause, use):
    with pytest.raises(ConfigError) as caught, memory_for(use, "data.eval"):
        work()
    what, remedy = use.value
    assert str(caught.value).startswith(f"{what.format(where='data.eval')} for the memory of the")
    assert " for the memory of the host: " in str(caught.value)
    assert cause in str(caught.value)
    assert str(caught.value).endswith(f"; {remedy}.")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_of_the_device(error):
    text = describe_out_of_memory(error, Use.STEP)
    assert text.startswith("data.batch_size is too large for the memory of the device: ")
    assert text.endswith("data.accumulate by the same factor: the steps stay the same")
    assert "\n" not in text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("size"),
        OSError(28, "x"),
    ],
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, memory_for(Use.STEP):
        raise error
    assert caught.value is error


def test_the_innermost_use_is_the_one_that_is_told():
    with pytest.raises(ConfigError, match=r"data\.batch_size is too large, in an evaluation,"):
        with memory_for(Use.STEP), memory_for(Use.EVALUATION):
            torch.empty(HUGE)


@pytest.mark.parametrize(
    ("where", "name", "what"),
    [
        ("model", "torch.nn.Linear", "model is too large for the memory of the host: "),
        ("data.eval", "torch.nn.Linear", "data.eval is too large for the memory of the host: "),
    ],
)
def test_a_component_that_does_not_fit(where, name, what):
    arguments = {"in_features": HUGE // 1000, "out_features": 1000}
    with pytest.raises(ConfigError, match=what):
        instantiate(Component(class_path=name, init_args=arguments), where)
