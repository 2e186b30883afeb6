# ruff: noqa: E501
from dataclasses import replace

from made_up_ranks import answers, cluster, links

from ddp_sgd.doctor.facts import Clock
from ddp_sgd.doctor.links import SIZES, Link, Timing, facts_table, link_table, timing_table


def shown(lines):
    return "\n".join(lines)


def test_ranks_of_a_host_share_a_line():
    facts = cluster(4, 2)
    for rank in facts:
        address = {"address": f"10.0.0.{rank // 2 + 1}", "interface": "eth0"}
        facts[rank] = replace(facts[rank], cpus=8, threads=4, **address)
    clocks = {2: Clock(-0.0012, 0.0004), 3: Clock(-0.0011, 0.0002)}
    known = answers(facts, clocks)
    known.shares.update({2: False, 3: False})
    assert (
        shown(facts_table(known))
        == """\
ranks  host   device  backend  address          python  torch   CPUs  threads  folder    free disk  clock
0-1    node1  cpu     gloo     10.0.0.1 (eth0)  3.12.4  2.14.1  8     4        rank 0's  1000.0 GB  0
2-3    node2  cpu     gloo     10.0.0.2 (eth0)  3.12.4  2.14.1  8     4        its own   1000.0 GB  -1.10 ms +- 0.20

rank 0 has ddp_sgd 0.1.0, numpy 2.4.6
MASTER_ADDR is node1 (10.0.0.1)
output_dir is /shared/runs"""
    )


def test_what_is_different_has_its_own_line():
    facts = cluster(3, 3, r1={"threads": 7, "free_bytes": None, "address": None})
    facts[2] = replace(facts[2], versions={}, master_addresses=[])
    lines = facts_table(answers(facts, silent=[1, 2]))
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert lines[2].split() == [
        "1", "node1", "cpu", "gloo", "none", "3.12.4", "2.14.1", "1", "7", "?", "?", "?",
    ]  # fmt: skip
    assert lines[3].split()[5:7] == ["?", "?"]
    assert lines[-2] == (
        "MASTER_ADDR is node1 (10.0.0.1) on ranks 0-1 (node1) and node1 (unknown) on rank 2 (node1)"
    )


def test_lone_ranks_apart():
    facts = cluster(4, 4, r1={"pid": 1}, r2={"device": "cuda"})
    lines = facts_table(answers(facts))
    assert [line.split()[0] for line in lines[1:3]] == ["0-1,3", "2"]


def test_timings_by_size():
    timings = [
        Timing(4, 0.00025, 25),
        Timing(2**12, 0.0005, 25),
        Timing(2**16, 0.004, 20),
        Timing(2**20, 0.005, 20),
        Timing(2**24, 0.01, 3),
    ]
    assert (
        shown(timing_table(timings, 4))
        == """
all-reduce of 4 ranks  median time  bus bandwidth  rounds
4 B                    0.25 ms      24 kB/s        25
4 KiB                  0.5 ms       12.3 MB/s      25
64 KiB                 4 ms         24.6 MB/s      20
1 MiB                  5 ms         315 MB/s       20
16 MiB                 10 ms        2.52 GB/s      3"""
    )
    assert timing_table([], 1) == []


def test_messages_that_were_left_out_are_named():
    timings = [Timing(size, 1.0, 1) for size in SIZES]
    assert timing_table(timings, 2)[-1].startswith("16 MiB  ")
    assert timing_table(timings[:3], 2)[-1] == "1 MiB, 16 MiB would take too long here"


def test_pairs_of_hosts_slowest_first():
    assert (
        shown(link_table(links(ab=0.01, ac=0.06), 0))
        == """
pair of hosts, slowest first  4 B     1 MiB  bus bandwidth
a - c                         0.1 ms  60 ms  17.5 MB/s
a - b                         0.1 ms  10 ms  105 MB/s"""
    )
    assert link_table([], 0) == []


def test_of_many_pairs_the_slowest_are_shown():
    many = [Link(("a", f"b{number}"), 1e-4, 0.01 + number / 1e3) for number in range(20)]
    lines = link_table(many, 3)
    assert len(lines) == 20
    assert lines[2].startswith("a - b19 ")
    assert lines[-2:] == [
        "and 4 faster pairs",
        "3 pairs were left out, since the time for them was over",
    ]
