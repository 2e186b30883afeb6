"""Precision of a run: autocast, TF32, the loss scale against a replay, channels_last."""

import math
from collections import namedtuple

import pytest
import torch
from ranks import run_ranks
from torch import nn

from ddp_sgd.config import ComputeConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.precision import LossScale, Numerics, float32_precision
from ddp_sgd.errors import ConfigError
from ddp_sgd.losses import Objective
from ddp_sgd.models import MLP, ConvNet

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "image row")


def numerics(**compute):
    return Numerics(ComputeConfig(**compute), CPU)


def tf32():
    backends = torch.backends
    return (
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.rnn.fp32_precision,
    )


def by_the_older_interface():
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize(
    ("precision", "older"),
    [("tf32", (True, True, "high")), ("ieee", (False, False, "highest"))],
)
@pytest.mark.parametrize("raises", [False, True])
def test_tf32_is_set_for_a_while_in_both_interfaces(precision, older, raises):
    before = tf32(), by_the_older_interface()
    try:
        with float32_precision(precision):
            assert tf32() == (precision,) * 3
            assert by_the_older_interface() == older
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert (tf32(), by_the_older_interface()) == before


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_other_precisions_leave_tf32_as_it_is(precision):
    before = tf32()
    with float32_precision(precision):
        assert tf32() == before


def test_what_a_user_has_set_comes_back():
    before = tf32()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with float32_precision("ieee"):
            assert tf32()[0] == "ieee"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.fp32_precision = before[0]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_passes_have_16_bits_and_losses_32(precision, dtype):
    model = nn.Linear(4, 3)
    objective = numerics(precision=precision).objective(
        lambda outputs, targets: (outputs - targets).square().mean(), torch.zeros(2, 3)
    )
    outputs = objective.outputs(model, torch.ones(2, 4))
    assert outputs.dtype == dtype
    loss = objective(outputs, torch.zeros(2, 3, dtype=dtype))
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_weights_are_cast_again_after_each_pass():
    """Else a step would use the weights of the one before."""
    model = nn.Linear(1, 1, bias=False)
    objective = numerics(precision="bf16").objective(nn.MSELoss(), torch.zeros(1, 1))
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        assert objective.outputs(model, torch.ones(1, 1)).item() == value


@pytest.mark.parametrize("precision", ["fp32", "ieee", "tf32"])
def test_with_32_bits_there_is_nothing_around_a_pass(precision):
    objective = numerics(precision=precision).objective(nn.MSELoss(), torch.zeros(1, 1))
    assert type(objective) is Objective


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_noted(dtype):
    (note,) = numerics().check_parameters(MLP(4, [], 3).to(dtype))
    assert str(dtype).removeprefix("torch.") in note
    assert "updates below one part in 256" in note
    assert numerics(precision="bf16").check_parameters(MLP(4, [], 3)) == ()


def test_fp16_needs_parameters_of_32_bits():
    with pytest.raises(ConfigError, match=r"compute.precision is fp16 while .* set compute"):
        numerics(precision="fp16").check_parameters(MLP(4, [], 3).half())


def test_images_and_convolutions_get_the_memory_format():
    model = numerics(channels_last=True).arrange(ConvNet(widths=[4, 4], batch_norm=True))
    weights = [p for p in model.parameters() if p.ndim == 4]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    pointwise = numerics(channels_last=True).arrange(nn.Conv2d(8, 4, 1))
    assert pointwise.weight.stride() == (8, 1, 8, 8)  # as its gradient, where images are so, too
    images, row = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3)
    pair = numerics(channels_last=True).inputs(Pair(images, [row]))
    assert pair.image.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(pair, Pair)
    assert pair.row[0] is row
    assert numerics().inputs(pair) is pair


def replay(finite):
    """Follow the rule in plain Python; yields scale and overflows after each step."""
    scale, good, overflows = 65536.0, 0, 0
    for is_finite in finite:
        if is_finite:
            good += 1
            if good == 2000:
                scale, good = scale * 2, 0
        else:
            overflows += scale > 1
            scale, good = scale / 2, 0
        yield scale, good, overflows


def test_the_scale_follows_its_rule():
    finite = [k % 2500 > 7 for k in range(6000)] + [False] * 30
    scale = LossScale(CPU)
    for step, (is_finite, expected) in enumerate(zip(finite, replay(finite), strict=True)):
        before = scale.scale.item()
        used, overflows = scale.update(torch.tensor(float(not is_finite)))
        assert used.item() == before, step
        numbers = (scale.scale.item(), scale.good_steps.item(), scale.overflow_steps.item())
        assert numbers == expected, step
        assert overflows.item() == expected[2]
    assert scale.scale < 1


def test_unscaling_does_not_round():
    scale = LossScale(CPU)
    gradient = [torch.randn(100), torch.randn(3, dtype=torch.float64), torch.randn(2, 2)]
    scaled = [part * scale.scale for part in gradient]
    scale.unscale(scaled)
    assert all(map(torch.equal, scaled, gradient))
    scale.unscale([])


def test_infinity_stays_so():
    scale = LossScale(CPU)
    gradient = [torch.tensor([1.0, math.inf, math.nan])]
    scale.unscale(gradient)
    assert gradient[0].isfinite().tolist() == [True, False, False]


def numbers_of(scale):
    return {name: value.item() for name, value in scale.state_dict().items()}


def load_on_rank_0(runtime):
    scale = LossScale(CPU)
    saved = {"scale": torch.tensor(8.0), "good_steps": torch.tensor(7, dtype=torch.int32)}
    scale.load_state_dict(saved if runtime.rank == 0 else None, runtime)
    return numbers_of(scale)


def agree(runtime):
    scale = LossScale(CPU)
    for _ in range(runtime.rank):
        scale.update(torch.ones(()))
    scale.agree(runtime)
    return numbers_of(scale)


def test_all_ranks_go_on_from_the_scale_of_rank_0():
    expected = {"scale": 8.0, "good_steps": 7, "overflow_steps": 0}
    assert run_ranks(2, load_on_rank_0) == [expected] * 2


def test_ranks_that_went_their_own_ways_take_the_smallest_scale():
    expected = {"scale": 2.0**14, "good_steps": 0, "overflow_steps": 2}
    assert run_ranks(3, agree) == [expected] * 3


def test_one_rank_begins_with_the_first_scale():
    scale = LossScale(CPU)
    scale.load_state_dict(None, Runtime())
    assert numbers_of(scale) == {"scale": 65536.0, "good_steps": 0, "overflow_steps": 0}
