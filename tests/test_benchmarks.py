"""Benchmarks in short: they run, and what they count holds. Nothing here depends on time."""

import sys
from itertools import pairwise

import pytest

from benchmarks import before_after, order, ranks, scaling
from benchmarks.rank_costs import Bytecodes


def test_order_takes_no_memory_for_a_billion_samples():
    ours = order.measure_apart(("Order", 10**9, 1024, "the middle"))
    theirs = order.measure_apart(("DistributedSampler", 10**6, 1, "its start"))
    assert ours["peak_mb"] < 8 < theirs["peak_mb"]  # a list of a million numbers alone has 8 MB
    found = {("Order", 10**9, 1024, "the middle"): [ours, ours | {"later_us": None}]}
    assert "| `Order` | 1e+09 | 1024 | the middle |" in order.report(found, "command")


def test_every_size_and_place_is_measured():
    small = list(order.cases(10**4))
    assert len(small) == 2 * (3 + 1)
    assert all(next(order.batches_of(case)) is not None for case in small)
    assert ("DistributedSampler", 10**9, 1, "its start") not in set(order.cases(10**9))


def test_what_is_neither_compute_nor_all_reduce_is_as_much_on_three_ranks_as_on_two():
    two, three = (ranks.run(number, 20, in_turns=True, counting=True) for number in (2, 3))
    assert [len(found) for found in (two, three)] == [2, 3]
    for one, other in ((two[0], three[0]), (two[-1], three[-1])):
        assert ranks.rest(one) > 100
        assert ranks.rest(other) == pytest.approx(ranks.rest(one), rel=0.02)
        assert other["compute"] == pytest.approx(one["compute"])
    found = {2: [two], 3: [three]}
    text = ranks.report({"together": found, "in turns": found, "counted": found}, "command")
    assert text.count("\n| 3 | ") == 3


def test_bytecodes_are_counted():
    def work(count):
        return sum(number * number for number in range(count))

    before = sys.gettrace()
    clock = Bytecodes()
    try:
        readings = [clock()]
        for count in (10, 10, 20):
            work(count)
            readings.append(clock())
    finally:
        sys.settrace(before)
    once, again, twice = (round(1e6 * (b - a)) for a, b in pairwise(readings))
    assert once == again < twice < 2 * once


def test_scaling_recovers_the_network_that_made_the_timings():
    made = scaling.Network(bandwidth_gbit=0.1, latency_us=50.0)
    measurements = scaling.Measurements()
    for number in scaling.RANKS:
        sizes = (4, 2**20, 2**24)
        links = [(size, made.all_reduce_s(size, number), 1) for size in sizes]
        steps = {"gradient_bytes": 2**20, "alone": [10.0, 10.0], "joined": [200.0, 200.0]}
        found = dict.fromkeys(scaling.WORKLOADS, steps)
        measurements.add({"links": links, **found}, "100 Mbit/s", number)
    network = measurements.network("100 Mbit/s")
    assert abs(network.bandwidth_gbit / made.bandwidth_gbit - 1) < 1e-4
    assert abs(network.latency_us / made.latency_us - 1) < 0.01  # four bytes take a little, too
    text = scaling.report(measurements, 1, [0.0, 0.0])
    assert "| 100 Mbit/s | 4 | 1,048,576 | 126.1" in text
    assert "| +0 % |" in text


def test_two_trees_are_measured_in_turn():
    pair = before_after.in_turn(before_after.HERE, 1, ranks=1, epochs=3)
    assert min(pair) > 0
    text = before_after.report([(100.0, 90.0)] * 3 + [(100.0, 110.0)] * 2, 1, 0.0)
    # Logarithms: mean -0.0251, standard deviation 0.1099; with t = 2.776 the half width is 0.1364.
    assert "| 1 | 100 | 90 | 0.975 | 0.851 to 1.118 | 0.900, 1.100 |" in text
