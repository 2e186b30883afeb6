"""Real allocations that fail, of 32 TiB, and other errors of torch in the words of a user."""

import numpy as np
import pytest
import torch
from torch import nn

from ddp_sgd.config.sections import Component
from ddp_sgd.errors import (
    ConfigError,
    DataError,
    DeviceError,
    Use,
    describe_out_of_memory,
    memory_for,
    translate_errors,
)
from ddp_sgd.instantiate import instantiate
from ddp_sgd.optim.sgd import SGD

HUGE = 2**45


def huge_parameter():
    return nn.Parameter(torch.zeros(1).expand(HUGE))


@pytest.mark.parametrize(
    ("work", "cause"),
    [
        (lambda: torch.empty(HUGE), "tried to allocate 140737488355328 bytes"),
        (lambda: np.empty(HUGE), "Unable to allocate 256. TiB"),
        (
            lambda: SGD([{"params": [huge_parameter()], "weight_decay": 0.0}], momentum=0.9),
            "tried to allocate",
        ),
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
    ("batch", "remedy"),
    [
        ((256, 1), "set data.batch_size=128 data.accumulate=2, which keeps the steps the same"),
        ((33, 2), "set data.batch_size=11 data.accumulate=6, which keeps the steps the same"),
        ((7, 1), "set data.batch_size=1 data.accumulate=7, which keeps the steps the same"),
        ((1, 8), "make the model or the samples smaller, or take a device with more memory"),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_named_with_one_that_takes_the_same_steps(batch, remedy):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(ConfigError) as caught, translate_errors(batch=batch):
        raise error
    assert str(caught.value) == (
        f"data.batch_size is {batch[0]}, a micro-batch that is too large for the memory of the "
        f"device: CUDA out of memory. Tried to allocate 2.00 GiB; {remedy}."
    )


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
    with pytest.raises(ConfigError, match=r"^eval\.batch_size, which .* is too large for"):
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


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("tried to allocate 2 GiB"),
            ConfigError,
            "raise data.accumulate by the same factor",
        ),
        (
            RuntimeError(
                "Expected to have finished reduction in the prior iteration before starting"
            ),
            ConfigError,
            "set parallel.find_unused_parameters=true",
        ),
        (
            IndexError("Target 12 is out of bounds."),
            DataError,
            "a label that the model has no score for: Target 12",
        ),
        (
            RuntimeError("multi_margin_loss(): target out of range"),
            DataError,
            "a label that the model has no score for: multi_margin",
        ),
        (
            RuntimeError("Class values must be smaller than num_classes."),
            DataError,
            "a label that the model has no score for: Class values",
        ),
        (IndexError("index out of range in self"), DataError, "set num_embeddings of the embed"),
        (
            RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be"),
            DataError,
            "a label that the model has no score for: CUDA error: device-side assert triggered",
        ),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"),
            DeviceError,
            "the device reports: CUDA error: an illegal memory access was encountered; set CUDA_",
        ),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
            DataError,
            "data.workers lost a process: DataLoader worker .pid 12. is killed by signal: Killed",
        ),
    ],
)
def test_torch_s_errors_in_the_words_of_the_configuration(error, kind, message):
    with pytest.raises(kind, match=message) as caught, translate_errors():
        raise error
    assert caught.value.__cause__ is error


def late_label(loss):
    return lambda: loss(torch.zeros(2, 3), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    "work",
    [
        late_label(nn.CrossEntropyLoss()),
        late_label(nn.MultiMarginLoss()),
        lambda: nn.functional.one_hot(torch.tensor([5]), 3),
        lambda: nn.Embedding(3, 2)(torch.tensor([5])),
    ],
)
def test_torch_says_what_is_looked_for(work):
    with pytest.raises(DataError), translate_errors():
        work()


@pytest.mark.parametrize("error", [RuntimeError("else"), IndexError("list index"), KeyError("x")])
def test_errors_that_nothing_names_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, translate_errors():
        raise error
    assert caught.value is error
