import pytest
import torch
from torch import nn

from ddp_sgd.checkpointing.manifest import SkippedSteps
from ddp_sgd.engine.error_translation import refuse_divergence, translate_errors
from ddp_sgd.errors import ConfigError, DataError, DeviceError, DivergedError, ExitCode


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
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, translate_errors():
        raise error
    assert caught.value is error


def test_ten_in_a_row_end_the_run():
    refuse_divergence(SkippedSteps(40, 1, 9), 0.1)
    with pytest.raises(
        DivergedError, match=r"not finite for 10 steps in a row at a rate of 0.1; lower optim.lr"
    ):
        refuse_divergence(SkippedSteps(10, 0, 10), 0.1)
    assert DivergedError.exit_code == ExitCode.DIVERGED
