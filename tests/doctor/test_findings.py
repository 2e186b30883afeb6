"""Every sentence, from facts and timings made by hand."""

import pytest
from made_up_ranks import VERSIONS, answers, cluster, links

from ddp_sgd.doctor.facts import Clock, Facts
from ddp_sgd.doctor.findings import (
    Finding,
    exit_code,
    judge_endpoint,
    judge_facts,
    judge_links,
    judge_surroundings,
    known_hosts,
    summarize,
)
from ddp_sgd.errors import ExitCode


def texts(findings):
    return [finding.text for finding in findings]


def test_ranks_that_agree():
    assert judge_facts(cluster(), 4) == []
    assert judge_facts(cluster(1, 1), 1) == []
    lines = summarize([], 4, 2)
    assert lines == ["all 4 ranks on 2 hosts agree and reach each other"]
    assert summarize([], 2, 1) == ["all 2 ranks on 1 host agree and reach each other"]
    assert summarize([], 1, 1) == ["the only rank is ready"]


def test_ranks_that_did_not_come_are_named_with_their_hosts():
    (found,) = judge_facts(cluster(missing=[3]), 4)
    assert found == Finding(
        ExitCode.PEER,
        "rank 3 (node2) of 4 did not come; look whether every rank was started, and reaches node1 "
        "from its host.",
    )
    (found,) = judge_facts(cluster(6, 2, missing=[1, 2, 3]), 6)
    assert found.text.startswith("ranks 1-3 (node1) of 6 did not come; ")


def test_hosts_of_missing_ranks_are_known_by_their_neighbours():
    facts = cluster(missing=[1, 2, 3])
    assert known_hosts(facts, 4) == ["node1", "node1", "", ""]
    by_srun = {0: Facts(rank=0, host="a", local_world_size=2, launcher="srun")}
    assert known_hosts(by_srun, 2) == ["a", ""]
    odd = {3: Facts(rank=3, host="a", local_rank=1, local_world_size=9, launcher="torchrun")}
    assert known_hosts(odd, 4) == ["", "", "", "a"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"versions": VERSIONS | {"torch": "2.13.0"}},
            "the version of torch is 2.14.1 on ranks 0-1 and 3 (node1, node2) and 2.13.0 on rank 2 "
            "(node2); install the same packages on every host.",
        ),
        (
            {"versions": VERSIONS | {"python": "3.11.2"}},
            "the version of python is 3.12 on ranks 0-1 and 3 (node1, node2) and 3.11 on rank 2 "
            "(node2); install the same packages on every host.",
        ),
        (
            {"versions": VERSIONS | {"ddp_sgd": "0.2.0"}},
            "the version of ddp_sgd is 0.1.0 on ranks 0-1 and 3 (node1, node2) and 0.2.0 on rank 2 "
            "(node2); install the same packages on every host.",
        ),
        (
            {"settings": {"optim.lr": "0.2", "seed": "0"}},
            "optim.lr is 0.1 on ranks 0-1 and 3 (node1, node2) and 0.2 on rank 2 (node2); start "
            "every rank with the same files, variables and options.",
        ),
        (
            {"settings": {"optim.lr": "0.1"}},
            "seed is 0 on ranks 0-1 and 3 (node1, node2) and missing on rank 2 (node2); start "
            "every rank with the same files, variables and options.",
        ),
        (
            {"world_size": 5},
            "WORLD_SIZE is 4 on ranks 0-1 and 3 (node1, node2) and 5 on rank 2 (node2); start all "
            "ranks with the same number of them.",
        ),
        (
            {"device": "cuda", "available": "cuda", "num_devices": 2},
            "the device is cpu on ranks 0-1 and 3 (node1, node2) and cuda on rank 2 (node2); set "
            "runtime.device to what every host has.",
        ),
        (
            {"backend": "nccl"},
            "the backend is gloo on ranks 0-1 and 3 (node1, node2) and nccl on rank 2 (node2); set "
            "runtime.backend to what every host has.",
        ),
    ],
)
def test_a_rank_that_is_different(change, text):
    assert judge_facts(cluster(r2=change), 4) == [Finding(ExitCode.CONFIG, text)]


def test_versions_that_may_differ_are_a_remark():
    numpy = VERSIONS | {"numpy": "2.0.0", "python": "3.12.9"}
    (found,) = judge_facts(cluster(r2={"versions": numpy}), 4)
    assert found == Finding(
        ExitCode.DONE,
        "the version of numpy is 2.4.6 on ranks 0-1 and 3 (node1, node2) and 2.0.0 on rank 2 "
        "(node2).",
    )


def test_many_settings_are_counted():
    settings = {f"key{number}": "1" for number in range(9)}
    found = judge_facts(cluster(2, 1, r1={"settings": settings}), 2)
    assert len(found) == 6
    assert texts(found)[-1] == "6 more keys of the configuration differ."


GPU = {"device": "cuda", "backend": "nccl", "available": "cuda", "num_devices": 2}


def test_a_device_that_is_not_there():
    changes = {f"r{rank}": GPU for rank in range(3)} | {"r3": GPU | {"available": "cpu"}}
    assert texts(judge_facts(cluster(**changes), 4)) == [
        "runtime.device is cuda on rank 3 (node2), which has cpu only; set runtime.device=auto."
    ]


def test_more_ranks_than_devices():
    changes = {f"r{rank}": GPU | {"num_devices": 1} for rank in range(4)}
    assert texts(judge_facts(cluster(**changes), 4)) == [
        "LOCAL_RANK is 1 on rank 1 (node1), which has 1 cuda devices; start at most 1 ranks a "
        "host, set runtime.device=cpu, or let ranks share devices with runtime.backend=gloo."
    ]
    sharing = {rank: each | {"backend": "gloo"} for rank, each in changes.items()}
    assert judge_facts(cluster(**sharing), 4) == []
    bound = {rank: each | {"launcher": "srun"} for rank, each in changes.items()}
    assert judge_facts(cluster(**bound), 4) == []  # the site gives each task a device of its own


DEBIAN = {"own_addresses": ["127.0.1.1"], "interface": "eth0"}


def test_a_name_by_which_gloo_leads_the_others_astray():
    (found,) = judge_facts(cluster(r2=DEBIAN, r3=DEBIAN), 4)
    assert found == Finding(
        ExitCode.CONFIG,
        "node2's own name resolves to 127.0.1.1 on node2, and gloo would tell the others to reach "
        "it there; set GLOO_SOCKET_IFNAME=eth0 on node2, or fix its /etc/hosts.",
    )
    (found,) = judge_facts(cluster(2, 1, r1={"own_addresses": []}), 2)
    assert found.text.startswith("node2's own name is unknown on node2, and gloo would tell")
    assert "; set GLOO_SOCKET_IFNAME on node2, or" in found.text


def test_that_name_does_no_harm_elsewhere():
    assert judge_facts(cluster(2, 2, r0=DEBIAN, r1=DEBIAN), 2) == []  # one host
    assert judge_facts(cluster(2, 1, r1=DEBIAN | {"is_chosen": True}), 2) == []
    nccl = {f"r{rank}": GPU | DEBIAN for rank in range(2)}
    assert judge_facts(cluster(2, 1, **nccl), 2) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"master_addresses": ["10.0.0.1"]}, None),
        ({"master_addresses": ["127.0.1.1"], "local_world_size": 4}, None),  # one host
        ({"host": "node1.site", "master_addresses": ["127.0.1.1"]}, None),  # Debian, rank 0's host
        (
            {"master_addresses": ["127.0.1.1"]},
            "MASTER_ADDR is node1, which resolves to 127.0.1.1 on node2: every host would look for "
            "rank 0 on itself; set MASTER_ADDR to a name or address of rank 0's host that every "
            "host reaches.",
        ),
        (
            {"master": "127.0.0.1", "master_addresses": ["127.0.0.1"]},
            "MASTER_ADDR is 127.0.0.1: every host would look for rank 0 on itself; set MASTER_ADDR "
            "to a name or address of rank 0's host that every host reaches.",
        ),
        (
            {"master": "::1", "master_addresses": ["::1"]},
            "MASTER_ADDR is ::1: every host would look for rank 0 on itself; set MASTER_ADDR "
            "to a name or address of rank 0's host that every host reaches.",
        ),
        (
            {"master_addresses": []},
            "MASTER_ADDR is node1, which node2 cannot resolve; set MASTER_ADDR to a name or "
            "address of rank 0's host that every host reaches.",
        ),
    ],
)
def test_an_endpoint_in_a_wrong_place(fields, text):
    facts = cluster(r2=fields)[2]
    found = judge_endpoint(facts)
    assert found == (text and Finding(ExitCode.CONFIG, text))


def test_surroundings_that_are_well():
    assert judge_surroundings(answers(cluster())) == []


def test_ranks_that_fell_silent():
    (found,) = judge_surroundings(answers(cluster(), silent=[2, 3]))
    assert found == Finding(
        ExitCode.PEER, "ranks 2-3 (node2) came and then fell silent; look at the log there."
    )


def test_clocks_are_a_remark_once_a_host():
    clocks = {2: Clock(-5.25, 0.01), 3: Clock(-5.25, 0.01), 1: Clock(1.0, 0.2)}
    (found,) = judge_surroundings(answers(cluster(), clocks))
    assert found == Finding(
        ExitCode.DONE,
        "the clock of node2 is 5.2 s behind that of node1; start a time service there, such as "
        "chrony.",
    )
    (found,) = judge_surroundings(answers(cluster(), {2: Clock(61.0, 0.01)}))
    assert "the clock of node2 is 61.0 s ahead of that of node1;" in found.text


def test_disks():
    (found,) = judge_surroundings(answers(cluster(r0={"free_bytes": 5 * 10**8})))
    assert found == Finding(
        ExitCode.DONE,
        "output_dir is /shared/runs, whose disk has 0.50 GB left on node1; make room, or set it to "
        "another disk.",
    )
    assert judge_surroundings(answers(cluster(r0={"free_bytes": None}))) == []
    (found,) = judge_surroundings(answers(cluster()), "Permission denied")
    assert found == Finding(
        ExitCode.OUTPUT,
        "output_dir is /shared/runs, which node1 cannot write: Permission denied; set it to "
        "another one.",
    )


def test_a_slow_host_is_named_with_its_factor():
    found = judge_links(links(ab=0.01, ac=0.06, bc=0.066))
    assert found == [
        Finding(
            ExitCode.DONE,
            "c is 6x slower than the others: its fastest link takes 60 ms for 1 MiB, theirs 10 ms; "
            "look at its cable, its switch and what else runs there, or leave it out.",
        )
    ]


@pytest.mark.parametrize(
    ("measured", "slow"),
    [
        (links(ab=0.01, ac=0.01, bc=0.01), []),
        (links(ab=0.01, ac=0.029, bc=0.029), []),
        (links(ab=0.01, ac=0.03, bc=0.03), ["c"]),
        (links(ab=0.5), []),  # of two, nobody knows which
        (links(), []),
        (links(ab=0.06, ac=0.06, bc=0.01), ["a"]),  # rank 0's own
        (links(ab=0.06, ac=0.01, ad=0.01, bc=0.06, bd=0.06, cd=0.01), ["b"]),
        (links(ab=0.1, ac=0.01, bc=0.01), []),  # one bad link is not a bad host
    ],
)
def test_who_is_slow(measured, slow):
    assert [text.split()[0] for text in texts(judge_links(measured))] == slow


def test_the_summary_tells_faults_from_notes():
    note, fault = Finding(ExitCode.DONE, "a."), Finding(ExitCode.CONFIG, "b.")
    assert summarize([note], 2, 2) == [
        "note: a.",
        "all 2 ranks on 2 hosts agree and reach each other",
    ]
    assert summarize([note, fault], 2, 2) == ["note: a.", "fault: b."]


def test_the_first_fault_gives_the_code():
    note = Finding(ExitCode.DONE, "")
    peer, config = Finding(ExitCode.PEER, ""), Finding(ExitCode.CONFIG, "")
    assert exit_code([]) == exit_code([note]) == 0
    assert exit_code([note, peer, config]) == 69
    assert exit_code([config, peer]) == 64
