import pytest
import torch
from ranks import run_ranks

from ddp_sgd.distributed.collectives import broadcast_over_ranks, gather_over_ranks, sum_over_ranks


def talk(runtime):
    numbers = torch.tensor([1.0, 10.0**runtime.rank])
    same = sum_over_ranks(numbers, runtime)
    flags = [torch.tensor(runtime.rank), torch.tensor([runtime.rank + 7, 1])]
    broadcast_over_ranks(flags, runtime)
    return (
        same is numbers,
        numbers.tolist(),
        gather_over_ranks({"rank": runtime.rank}, runtime),
        [flag.tolist() for flag in flags],
    )


def test_every_rank_hears_the_same():
    answer = (True, [3.0, 111.0], [{"rank": 0}, {"rank": 1}, {"rank": 2}], [0, [7, 1]])
    assert run_ranks(3, talk) == [answer] * 3


def test_alone_nothing_is_sent():
    assert run_ranks(1, talk) == [(True, [1.0, 1.0], [{"rank": 0}], [0, [7, 1]])]


def layouts(rank):
    """Tensors of every layout and of types that backends lack; rank 0's are zero or false."""
    base = torch.full((4, 6), float(rank))
    return {
        "transposed": base.clone().t(),
        "strided": base.clone()[:, ::2],
        "channels_last": torch.full((2, 3, 4, 5), rank).contiguous(
            memory_format=torch.channels_last
        ),
        "expanded": torch.full((1, 3), float(rank)).expand(5, 3),
        "one of an expanded": torch.full((1,), float(rank)).expand(9).narrow(0, 0, 1),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(rank),
        "bool": torch.tensor([bool(rank)]),
        "int16": torch.tensor([rank], dtype=torch.int16),
        "uint16": torch.tensor([rank], dtype=torch.uint16),
        "float8": torch.tensor([float(rank)]).to(torch.float8_e4m3fn),
        "bfloat16": torch.tensor([float(rank)], dtype=torch.bfloat16),
        "complex": torch.complex(base, base).conj(),
        "sparse": (torch.eye(3) * rank).to_sparse(),
    }


def share_layouts(runtime):
    tensors = layouts(runtime.rank + 1)
    strides = {n: t.stride() for n, t in tensors.items() if t.layout is torch.strided}
    around = torch.full((4, 6), float(runtime.rank + 1))
    tensors["in between"] = around[:, 1::2]
    broadcast_over_ranks(tensors.values(), runtime)
    dense = {n: t.to_dense() if t.layout is not torch.strided else t for n, t in tensors.items()}
    kept = all(dense[name].stride() == stride for name, stride in strides.items())
    values = {
        n: t.resolve_conj().to(torch.complex64).abs().unique().tolist() for n, t in dense.items()
    }
    return values, kept, around[:, ::2].unique().tolist()


def test_any_layout_and_type_becomes_that_of_rank_0():
    first, second = run_ranks(2, share_layouts)
    assert first[0] == second[0]
    assert second[0]["transposed"] == [1.0]
    assert second[0]["expanded"] == [1.0]
    assert second[0]["complex"] == [pytest.approx(2**0.5)]
    assert second[0]["sparse"] == [0.0, 1.0]
    assert first[1]
    assert second[1]
    assert second[2] == [2.0]  # what lies in the gaps is somebody else's


def add_complex(runtime):
    numbers = torch.complex(torch.ones(3), torch.full((3,), float(runtime.rank)))
    return torch.view_as_real(sum_over_ranks(numbers, runtime)).tolist()


def test_complex_numbers_add_up():
    assert run_ranks(3, add_complex) == [[[3.0, 3.0]] * 3] * 3
