"""Facts and timings of ranks that nobody started, for tests of what is made of them."""

from ddp_sgd.doctor.facts import Answers, Clock, Facts
from ddp_sgd.doctor.links import Link

VERSIONS = {"python": "3.12.4", "torch": "2.14.1", "ddp_sgd": "0.1.0", "numpy": "2.4.6"}


def cluster(world_size=4, per_host=2, missing=(), **changes):
    """Facts of ranks on node1, node2, ...; ``r2={...}`` changes fields of rank 2."""
    ranks = {}
    for rank in range(world_size):
        host = rank // per_host + 1
        fields = {
            "world_size": world_size,
            "local_rank": rank % per_host,
            "local_world_size": per_host,
            "launcher": "torchrun",
            "host": f"node{host}",
            "master": "node1",
            "master_addresses": ["10.0.0.1"],
            "own_addresses": [f"10.0.0.{host}"],
            "versions": VERSIONS,
            "folder": "/shared/runs",
            "free_bytes": 10**12,
            "settings": {"optim.lr": "0.1", "seed": "0"},
        }
        ranks[rank] = Facts(rank=rank, **fields | changes.get(f"r{rank}", {}))
    return {rank: facts for rank, facts in ranks.items() if rank not in missing}


def answers(facts, clocks=None, silent=()):
    others = [rank for rank in facts if rank]
    return Answers(
        facts,
        {rank: Clock(0.0, 0.001) for rank in others if rank not in silent} | (clocks or {}),
        {rank: True for rank in others if rank not in silent},
    )


def links(**seconds):
    """Links by the letters of their hosts, such as ``ab=0.01``."""
    return [Link((name[0], name[1]), 1e-4, value) for name, value in seconds.items()]
