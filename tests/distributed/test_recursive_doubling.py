import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ddp_sgd.distributed import collectives
from ddp_sgd.distributed.collectives import MOST_BYTES, is_short, sum_over_ranks
from ddp_sgd.distributed.runtime import Runtime

FLOATS = torch.float32.itemsize


def numbers(rank, shape, dtype):
    """Whose sum depends on the order in which they are added."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 10**rank
    return drawn.to(dtype)


def in_pairs(parts):
    """Add in the order of the rounds: those beyond a power of two, neighbours, pairs, and so on."""
    paired = 1 << (len(parts).bit_length() - 1)
    sums = [
        part + parts[paired + number] if paired + number < len(parts) else part
        for number, part in enumerate(parts[:paired])
    ]
    while len(sums) > 1:
        sums = [sums[n] + sums[n + 1] for n in range(0, len(sums), 2)]
    return sums[0]


def bytes_of(tensor):
    return tensor.dtype, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def sum_all(runtime, shapes, dtypes):
    sums = []
    for dtype in dtypes:
        for shape in shapes:
            tensor = numbers(runtime.rank, shape, dtype)
            assert sum_over_ranks(tensor, runtime) is tensor
            sums.append(bytes_of(tensor))
    return sums


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_every_rank_has_the_same_sum_to_the_bit(world_size):
    shapes = [(), (1,), (7, 3), (5000,)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
    per_rank = run_ranks(world_size, sum_all, shapes, dtypes)
    expected = [
        bytes_of(in_pairs([numbers(rank, shape, dtype) for rank in range(world_size)]))
        for dtype in dtypes
        for shape in shapes
    ]
    assert per_rank == [expected] * world_size


def count_all_reduces(runtime):
    calls = []
    all_reduce = dist.all_reduce

    def counted(tensor):
        calls.append(tensor.nbytes)
        return all_reduce(tensor)

    collectives.dist.all_reduce = counted  # this process ends with the test
    most = MOST_BYTES // FLOATS
    sums = [sum_over_ranks(torch.ones(size), runtime) for size in (0, 1, most, most + 1)]
    return calls, [set(total.tolist()) for total in sums]


def test_what_is_empty_or_large_is_left_to_gloo():
    expected = [0, MOST_BYTES + FLOATS], [set(), {3.0}, {3.0}, {3.0}]
    assert run_ranks(3, count_all_reduces) == [expected] * 3


@pytest.mark.parametrize(
    ("backend", "device", "short"),
    [("gloo", "cpu", True), ("nccl", "cpu", False), ("gloo", "meta", False)],
)
def test_only_gloo_on_the_host_is_that_slow(backend, device, short):
    runtime = Runtime(world_size=2, backend=backend)
    assert is_short(torch.empty(8, device=device), runtime) is short


def fall_silent(runtime):
    if runtime.rank == 1:
        raise ValueError("of the user's")
    sum_over_ranks(torch.zeros(3), runtime)


def test_a_rank_that_is_gone_ends_the_exchange_with_its_fault():
    first, second = run_ranks(2, fall_silent, raises=True)
    assert (first.error, second.error) == ("RemoteError", "ValueError")
