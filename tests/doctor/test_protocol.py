"""Whole examinations, with ranks that say what they are told to say."""

import json
import os
import threading
from dataclasses import replace

import pytest
from ranks import rank_environment, run_ranks

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.environment import read_ranks
from ddp_sgd.doctor.facts import gather_facts
from ddp_sgd.doctor.protocol import Diagnosis, coordinate, visit
from ddp_sgd.host import free_port


def take_part(_, rank, world_size, port, folder, changes, runtime):
    """Be a rank that is different in ``changes``; return its code, and what rank 0 tells."""
    os.environ.update(rank_environment(rank, world_size, port))
    ranks = read_ranks(os.environ)
    config = RunConfig(output_dir=folder, runtime={"device": "cpu", "timeout_s": 30.0} | runtime)
    facts = replace(gather_facts(config, ranks, os.environ), **changes)
    told = []

    def tell(diagnosis):
        told.extend([diagnosis.lines(), json.loads(json.dumps(diagnosis.as_row()))])

    code = visit(config, ranks, facts) if rank else coordinate(config, ranks, facts, tell)
    return int(code), told


def consult(folder, world_size=2, missing=(), runtime=None, **changes):
    """Start ranks; ``r1={...}`` changes facts of rank 1. Return codes, lines and row of rank 0."""
    port = free_port()
    results = {}

    def start(rank):
        changed = changes.get(f"r{rank}", {})
        work = (rank, world_size, port, str(folder), changed, runtime or {})
        results[rank] = run_ranks(1, take_part, *work)[0]

    threads = [
        threading.Thread(target=start, args=(rank,))
        for rank in range(world_size)
        if rank not in missing
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines, row = results[0][1]
    return [results[rank][0] for rank in sorted(results)], lines, row


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_agree_are_timed(ranks, tmp_path):
    codes, lines, row = consult(tmp_path / "runs", ranks)
    assert codes == [0] * ranks
    assert lines[-1] == f"all {ranks} ranks on 1 host agree and reach each other"
    assert [each["rank"] for each in row["ranks"]] == list(range(ranks))
    assert [each["shares_folder"] for each in row["ranks"]] == [None] + [True] * (ranks - 1)
    assert len(row["all_reduce"]) == 5
    assert row["findings"] == row["links"] == []
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_several_hosts_are_timed_in_pairs(tmp_path):
    hosts = {
        f"r{rank}": {"host": f"node{rank}", "own_addresses": [f"10.0.0.{rank}"]}
        for rank in range(3)
    }
    codes, lines, row = consult(tmp_path, 3, **hosts)
    assert codes == [0, 0, 0]
    assert sorted(link["hosts"] for link in row["links"]) == [
        ["node0", "node1"], ["node0", "node2"], ["node1", "node2"],
    ]  # fmt: skip
    assert "all 3 ranks on 3 hosts agree and reach each other" in lines


def test_a_rank_with_another_torch_is_shown_and_nothing_hangs(tmp_path):
    codes, lines, row = consult(
        tmp_path, 3, r2={"versions": {"python": "3.12.1", "torch": "1.0", "ddp_sgd": "0.1.0"}}
    )
    assert codes == [64, 64, 64]
    (fault,) = (line for line in lines if "torch" in line and line.startswith("fault: "))
    assert " and 1.0 on rank 2 (" in fault
    assert row["all_reduce"] == []
    assert row["exit_code"] == 64


def test_a_rank_that_does_not_come_is_named_in_time(tmp_path):
    codes, lines, row = consult(tmp_path, 3, missing=[1], runtime={"timeout_s": 20.0})
    assert codes == [69, 69]
    assert lines[-1].startswith("fault: rank 1 of 3 did not come;") or (
        lines[-1].startswith("fault: rank 1 (") and "of 3 did not come;" in lines[-1]
    )
    assert [line.split()[0] for line in lines[1:2]] == ["0,2"]
    assert [each["rank"] for each in row["ranks"]] == [0, 2]


def test_a_group_that_cannot_be_joined_leaves_the_table(tmp_path):
    """No such interface: gloo refuses on every rank, and says why."""
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    try:
        codes, lines, row = consult(tmp_path)
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]
    assert codes == [69, 69]
    assert lines[0].startswith("ranks ")
    assert lines[1].split()[0] == "0-1"
    assert any(line.startswith("fault: ") and "could not join" in line for line in lines)
    assert row["all_reduce"] == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    codes, lines, row = consult(tmp_path / "file" / "runs")
    assert codes == [73, 73]
    assert "cannot write: Not a directory; set it to another one." in lines[-1]
    assert len(row["all_reduce"]) == 5  # the rest is examined all the same


def test_alone(tmp_path):
    config = RunConfig(output_dir=str(tmp_path), runtime={"device": "cpu"})
    ranks = read_ranks({})
    told: list[Diagnosis] = []
    assert coordinate(config, ranks, gather_facts(config, ranks, {}), told.append) == 0
    assert told[0].lines()[-1] == "the only rank is ready"
    assert told[0].as_row()["world_size"] == 1
