"""Benchmarks in short: they run, and what they count holds. Nothing here depends on time."""

import sys
import time
from itertools import pairwise

import commands
import pytest
import torch

from benchmarks import before_after, gpu, harness, order, ranks, scaling, slow_network, step_time


@pytest.fixture
def forked(monkeypatch):
    """Where a start of the interpreter is not what is measured."""
    monkeypatch.setattr(harness, "subprocess", commands)


def test_the_order_of_a_round_moves_on_and_every_case_is_measured_in_each():
    seen = []
    cases = {name: (lambda name=name: seen.append(name) or len(seen)) for name in "abc"}
    found = harness.alternate(cases, 4)
    assert "".join(seen) == "abcbcacababc"
    assert found == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00012345, "0.000123"),
        (0.5, "0.500"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (-0.25, "-0.250"),
        (99.96, "100"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert harness.number(value) == text


def test_cells_are_text_numbers_or_the_spread_of_several():
    rows = [("a", 1234, 0.5, None, [3.0, 1.0, 2.0, None], [7.0], [])]
    text = harness.markdown_table("a | b | c | d | e | f | g", rows)
    assert text.splitlines() == [
        "| a | b | c | d | e | f | g |",
        "|---|---|---|---|---|---|---|",
        "| a | 1,234 | 0.500 |  | 2.00 (1.00 to 3.00) | 7.00 |  |",
    ]
    assert harness.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.00 (2.00 to 4.00)"


def test_the_interval_of_a_ratio_is_that_of_its_logarithms():
    pairs = [(100.0, 90.0)] * 3 + [(100.0, 110.0)] * 2
    # Logarithms: mean -0.0251, standard deviation 0.1099; with t = 2.776 the half width is 0.1364.
    assert harness.ratio_interval(pairs) == pytest.approx((0.851, 0.975, 1.118), abs=5e-4)
    assert harness.ratio_interval([(1.0, 2.0)]) == (0.0, pytest.approx(2.0), float("inf"))


def test_a_result_goes_above_the_earlier_ones(tmp_path):
    path = harness.write_result(tmp_path, "speed", "# First")
    assert harness.write_result(tmp_path, "speed", "# Second") == path
    assert path.read_text() == "# Second\n\n# First\n"


@pytest.mark.usefixtures("forked")
def test_a_program_that_fails_is_reported_with_its_error():
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3:.*out of luck"):
        harness.run_python("-c", "import sys; print('out of luck', file=sys.stderr); sys.exit(3)")
    assert harness.run_python("-c", "print('fine'); raise SystemExit(3)", may_fail=True) == "fine\n"


def test_the_docstring_describes_the_method_and_the_result_is_kept(tmp_path, monkeypatch, capsys):
    parser = harness.option_parser("Speed.\n\nUsage: none.\n\nOf light.", rounds=2)
    monkeypatch.setattr(sys, "argv", ["speed", f"--write={tmp_path}", "--rounds=3"])
    text = harness.run_benchmark("speed", parser, lambda options: [f"{options.rounds} rounds"])
    title, facts, *blocks = text.split("\n\n")
    assert (title, blocks) == ("# Speed", ["Of light.", "3 rounds"])
    assert "torch 2." in facts
    (file,) = tmp_path.glob("speed_*.md")
    assert file.read_text() == capsys.readouterr().out == f"{text}\n"


def test_order_takes_no_memory_for_a_billion_samples():
    case = ("TrainSampler", 10**9, 1024, "the middle")
    ours = harness.run_worker(order.MODULE, *case)
    theirs = harness.run_worker(order.MODULE, "DistributedSampler", 10**6, 1, "its start")
    assert ours["peak_mb"] < 8 < theirs["peak_mb"]  # a list of a million numbers alone has 8 MB
    table, _ = order.report({case: [ours, ours | {"later_us": None}]})
    assert "| `TrainSampler` | 1e+09 | 1,024 | the middle |" in table


def test_every_size_and_place_is_measured():
    small = list(order.cases(10**4))
    assert len(small) == 2 * (3 + 1)
    assert all(next(order.batches_of(case)) is not None for case in small)
    assert ("DistributedSampler", 10**9, 1, "its start") not in set(order.cases(10**9))


@pytest.mark.usefixtures("forked")
def test_what_is_neither_compute_nor_all_reduce_is_as_much_on_three_ranks_as_on_two():
    two, three = (ranks.run(number, 10, in_turns=True, counting=True) for number in (2, 3))
    assert [len(found) for found in (two, three)] == [2, 3]
    for one, other in ((two[0], three[0]), (two[-1], three[-1])):
        assert ranks.rest(one) > 100
        assert ranks.rest(other) == pytest.approx(ranks.rest(one), rel=0.02)
        assert other["compute"] == pytest.approx(one["compute"])
    found = {2: [two], 3: [three]}
    assert "\n".join(ranks.report(found, found, found)).count("\n| 3 | ") == 3


def test_bytecodes_are_counted():
    def work(count):
        return sum(number * number for number in range(count))

    before = sys.gettrace()
    clock = ranks.Bytecodes()
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
    steps = {"gradient_bytes": 2**20, "alone": [10.0, 10.0], "joined": [200.0, 200.0]}
    found = {}
    for number in scaling.RANKS:
        links = [(size, made.all_reduce_s(size, number), 1) for size in (4, 2**20, 2**24)]
        works = dict.fromkeys(scaling.WORKLOADS, steps)
        found["100 Mbit/s", number] = [{"links": links, **works}]
    network = scaling.network_of(found, "100 Mbit/s")
    assert abs(network.bandwidth_gbit / made.bandwidth_gbit - 1) < 1e-4
    assert abs(network.latency_us / made.latency_us - 1) < 0.01  # four bytes take a little, too
    text = "\n".join(scaling.report(found))
    assert "| 100 Mbit/s | 4 | 1,048,576 | 126 | 126 | 0 |" in text
    assert text.count("| 200 (200 to 200) |") == 2 * len(scaling.WORKLOADS)


def test_a_gain_is_the_time_of_plain_ddp_in_the_same_round():
    def row(step, time, **figures):
        return {"step": step, "time": time, "time/step_ms": 5.0, **figures}

    steps = [row(4, 10.0), row(8, 11.0)]
    scores = [row(4, 12.0, **{"eval/accuracy": 0.9}), row(8, 14.0, **{"eval/accuracy": 0.96})]
    run = slow_network.summarize(steps, scores, 16_000)
    assert run == slow_network.Run(reached_s=4.0, accuracy=0.96, step_ms=5.0, sent_kb=2.0)
    never = run._replace(reached_s=None)
    table = slow_network.report(
        {("slow", slow_network.PLAIN): [run], ("slow", "a"): [run._replace(reached_s=2.0)]}
        | {("slow", "b"): [never]}
    )
    assert "| slow | a | 2.00 | 2.00 | 5.00 | 2.00 | 96.0 | 1 of 1 |" in table
    assert "| slow | b |  |  | 5.00 | 2.00 | 96.0 | 0 of 1 |" in table


def test_every_part_of_a_step_is_measured_in_both_loops():
    (found,) = step_time.run_ranks(1, step_time.work_as_rank, 1, 1)
    assert set(found) == {"tutorial", "ddp_sgd"}
    assert all(spent > 0 for (parts,) in found.values() for spent in parts.values())


def test_the_loops_of_the_benchmark_for_gpus_run_on_the_cpu():
    case, cpu = gpu.small(gpu.CASES["mlp"]), torch.device("cpu")
    loops = gpu.loops_of("mlp", case, cpu, is_cuda=False)
    assert list(loops)[:4] == ["by hand", "ddp_sgd", "by hand, eager", "ddp_sgd, eager"]
    assert all(loops[name]() > 0 for name in list(loops)[:4])
    assert gpu.take_first_step("ddp_sgd", time.time()) > 0


@pytest.mark.usefixtures("forked")
def test_two_trees_are_measured_beside_each_other():
    assert before_after.steps_per_s(harness.ROOT, ranks=1, epochs=3, saves=3) > 0
    text = before_after.table([(100.0, 90.0)] * 3 + [(100.0, 110.0)] * 2, 1)
    assert "| 1 | 100 (100 to 100) | 90.0 (90.0 to 110) | 0.975 | 0.851 to 1.118 |" in text
