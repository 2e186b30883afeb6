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
