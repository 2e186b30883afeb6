"""Real all-reduces between real ranks; what they take is not tested, but who is told what is."""

import time
from itertools import pairwise

import pytest
from ranks import run_ranks

from ddp_sgd.doctor import links
from ddp_sgd.doctor.findings import judge_links
from ddp_sgd.doctor.links import SIZES, Timing, choose_pairs, time_all_ranks, time_pairs


def time_everything(runtime, *budget):
    return time_all_ranks(runtime, *budget)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_time_every_size(ranks):
    per_rank = run_ranks(ranks, time_everything)
    for timings in per_rank:
        assert [timing.num_bytes for timing in timings] == list(SIZES)
        assert all(timing.seconds > 0 for timing in timings)
    rounds = {tuple(timing.rounds for timing in timings) for timings in per_rank}
    assert len(rounds) == 1  # else they would wait for each other


def time_slowly(runtime, budget_s):
    quick = links._reduce

    def slow(message, group):
        if runtime.rank == 1:
            time.sleep(message.numel() / 2**18 / 5)  # 0.2 s for 1 MiB
        return quick(message, group)

    links._reduce = slow
    return time_all_ranks(runtime, budget_s)


def test_sizes_that_would_take_too_long_are_left_out():
    first, second = run_ranks(2, time_slowly, 2.0)
    assert [timing.num_bytes for timing in first] == list(SIZES[:-1])
    assert [timing.num_bytes for timing in second] == list(SIZES[:-1])


def test_no_time_still_times_once():
    (first, _) = run_ranks(2, time_everything, 0.0)
    assert [timing.rounds for timing in first] == [1]


def test_bus_bandwidth_counts_what_a_link_carries():
    assert Timing(1000, 0.5, 1).bus_bandwidth(2) == 2000
    assert Timing(1000, 0.5, 1).bus_bandwidth(4) == 3000


def time_hosts(runtime, hosts, *budget):
    return time_pairs(runtime, hosts, *budget)


def test_pairs_of_hosts_are_timed_by_one_rank_of_each():
    per_rank = run_ranks(4, time_hosts, ["a", "a", "b", "c"])
    assert all(found == per_rank[0] for found in per_rank)
    timed, num_left_out = per_rank[0]
    assert [link.hosts for link in timed] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(link.latency_s > 0 and link.seconds > 0 for link in timed)
    assert num_left_out == 0


def test_one_host_has_no_pairs():
    assert run_ranks(2, time_hosts, ["a", "a"]) == [([], 0)] * 2


def test_pairs_are_left_out_when_time_is_over():
    for timed, num_left_out in run_ranks(3, time_hosts, ["a", "b", "c"], 1e-9):
        assert len(timed) == 1
        assert num_left_out == 2


def time_with_a_slow_host(runtime):
    quick = links._reduce

    def slow(message, group):
        began = time.perf_counter()
        if runtime.rank == 2 and group is not None:
            time.sleep(0.05)
        quick(message, group)
        return time.perf_counter() - began

    links._reduce = slow
    return time_pairs(runtime, ["a", "b", "c"], 60.0)[0]


def test_a_slow_host_is_found_among_real_ranks():
    (found,) = judge_links(run_ranks(3, time_with_a_slow_host)[0])
    assert found.text.startswith("c is ")


def test_few_hosts_are_paired_each_with_each():
    assert choose_pairs(["a"] * 3) == []
    assert choose_pairs(["a", "a", "b", "b"]) == [(0, 2)]
    assert len(choose_pairs(list("abcdef"))) == 15


@pytest.mark.parametrize("num_hosts", [7, 20])
def test_many_hosts_are_a_ring_and_a_star(num_hosts):
    hosts = [f"node{rank // 2}" for rank in range(2 * num_hosts)]
    pairs = choose_pairs(hosts)
    firsts = range(0, 2 * num_hosts, 2)
    assert set(pairs) == {(0, other) for other in firsts[1:]} | set(pairwise(firsts))
    assert len(pairs) == len(set(pairs)) == 2 * num_hosts - 3
