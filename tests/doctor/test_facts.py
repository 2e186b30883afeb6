import json
import os
import shutil
import socket
from dataclasses import asdict

import pytest
import torch

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.environment import Ranks
from ddp_sgd.doctor.facts import Facts, gather_facts
from ddp_sgd.host import usable_cpus

RANKS = Ranks(rank=3, world_size=8, local_rank=1, local_world_size=2, launcher="torchrun")


def look(environ=None, ranks=RANKS, **config):
    config = {"runtime": {"device": "cpu"}} | config
    return gather_facts(RunConfig(**config), ranks, environ or {})


def test_facts_are_those_of_this_process(tmp_path):
    facts = look(output_dir=str(tmp_path / "not" / "there"))
    assert (facts.rank, facts.world_size) == (3, 8)
    assert (facts.local_rank, facts.local_world_size) == (1, 2)
    assert (facts.host, facts.pid) == (socket.gethostname(), os.getpid())
    assert (facts.device, facts.backend) == ("cpu", "gloo")
    assert facts.versions["torch"] == torch.__version__
    assert facts.cpus == usable_cpus()
    assert facts.master == "localhost"
    assert facts.master_addresses[0] in ("127.0.0.1", "::1")
    assert facts.folder == str(tmp_path / "not" / "there")
    assert facts.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert json.loads(facts.settings["optim.lr"]) == RunConfig().optim.lr
    assert list(tmp_path.iterdir()) == []


def test_threads_are_those_that_the_run_would_use():
    assert look({"OMP_NUM_THREADS": "3"}).threads == 3
    assert look({"OMP_NUM_THREADS": "4,2"}).threads == 4
    assert 1 <= look().threads <= usable_cpus()


def test_an_interface_that_the_user_chose():
    assert not look().is_chosen
    chosen = look({"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "eth7"})
    assert (chosen.interface, chosen.is_chosen) == ("ib0", True)
    nccl = look({"NCCL_SOCKET_IFNAME": "eth7"}, runtime={"backend": "nccl", "device": "cuda"})
    assert (nccl.interface, nccl.is_chosen, nccl.device) == ("eth7", True, "cuda")


def test_facts_travel_as_json():
    facts = look()
    assert Facts.from_text(facts.to_text()) == facts
    assert "settings" not in facts.as_row()
    assert facts.as_row().keys() < asdict(facts).keys()


def test_facts_of_another_version_can_be_read():
    assert Facts.from_text(b'{"rank": 1, "novelty": [1]}') == Facts(rank=1)
