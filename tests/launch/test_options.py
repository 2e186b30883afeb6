import os

import pytest

from ddp_sgd.errors import ConfigError
from ddp_sgd.host import usable_cpus
from ddp_sgd.launch import read_options
from ddp_sgd.torchrun import Rendezvous

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
NODES = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NPROC": "1"}


def read(*argv, **variables):
    return read_options(argv, NO_GPU | variables)


@pytest.mark.parametrize(
    ("argv", "train"),
    [
        (["--nproc", "3", "--", "--epochs=2"], ("--epochs=2",)),
        (["--nproc=3", "--epochs=2", "--nproc=4"], ("--epochs=2", "--nproc=4")),
        (["--max-restarts=1", "--nproc=3", "--", "--help"], ("--help",)),
        (["--nproc=3", "--", "--", "x"], ("--", "x")),
        (["--standalone", "--nproc=3", "--config", "run.yaml"], ("--config", "run.yaml")),
    ],
)
def test_own_options_come_first_and_the_rest_is_the_runs(argv, train):
    options = read(*argv)
    assert (options.nproc, options.train, options.rendezvous) == (3, train, Rendezvous())


@pytest.mark.parametrize("argv", [["-h"], ["--nproc", "2", "--help"], ["--help", "--nproc=x"]])
def test_help_is_no_set_of_options(argv):
    assert read(*argv) is None


def test_one_process_for_each_gpu_and_two_without_any():
    assert read(CUDA_VISIBLE_DEVICES="0,1,2").nproc == 3
    assert read().nproc == min(2, usable_cpus())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_one_process_on_one_cpu():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert read().nproc == 1
    finally:
        os.sched_setaffinity(0, before)


def test_options_count_more_than_variables():
    options = read("--nproc=3", "--max-restarts=4", NPROC="5", MAX_RESTARTS="6")
    assert (options.nproc, options.max_restarts) == (3, 4)
    options = read(NPROC="5", MAX_RESTARTS="6")
    assert (options.nproc, options.max_restarts) == (5, 6)


@pytest.mark.parametrize(
    ("argv", "variables", "count", "restarts"),
    [
        (["--nnodes=4"], {}, "4", 0),
        ([], {}, "2", 0),
        (["--nnodes", "1:2"], {}, "1:2", 10),
        (["--nnodes=2:4", "--max-restarts", "3"], {}, "2:4", 3),
        ([], {"NNODES": "1:2", "MAX_RESTARTS": "0"}, "1:2", 0),
    ],
)
def test_several_machines(argv, variables, count, restarts):
    options = read(*argv, **NODES | variables)
    assert (options.rendezvous.nodes, options.max_restarts) == (count, restarts)
    assert options.rendezvous.is_elastic == (":" in count)
    assert not options.rendezvous.is_standalone
    assert (options.rendezvous.address, options.rendezvous.port) == ("127.0.0.1", "29400")


def test_standalone_is_this_machine_whatever_nnodes_is():
    assert read("--standalone", **NODES).rendezvous.is_standalone


@pytest.mark.parametrize(
    ("address", "node_rank", "is_host", "remedy"),
    [
        ("127.0.0.1", "", None, "127.0.0.1 is another machine on every host"),
        ("127.0.0.1", "0", True, "is another machine on every host"),
        ("127.0.0.1", "2", False, "is another machine on every host"),
        ("nosuch.invalid", "", None, "this host does not know nosuch.invalid; set MASTER_ADDR"),
        ("192.0.2.1", "", False, "start this on every machine, with the same MASTER_ADDR"),
    ],
)
def test_which_machine_hosts_the_rendezvous(address, node_rank, is_host, remedy):
    found = read(**NODES | {"MASTER_ADDR": address, "NODE_RANK": node_rank}).rendezvous
    assert found.is_host is is_host
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("argv", "variables", "words"),
    [
        (["--nproc"], {}, "the number of processes is 'none'; set NPROC=2"),
        (["--nproc=0"], {}, "the number of processes is '0'; set NPROC=2"),
        (["--nproc=²"], {}, "the number of processes is '²'; set NPROC=2"),
        (["--max-restarts=-1"], {}, "--max-restarts is '-1'; give a number"),
        (["--nnodes="], {}, "NNODES is not set; set it to the number of machines"),
        (["--nnodes=2:"], {}, "NNODES is '2:'; set a number of machines"),
        (["--nnodes=2"], {"MASTER_ADDR": ""}, "MASTER_ADDR is not set; set it, on every machine"),
        (["--nnodes=2"], {"MASTER_PORT": "0"}, "MASTER_PORT is '0'; set a port that is free on"),
        (["--nnodes=2"], {"NODE_RANK": "-1"}, "NODE_RANK is '-1'; set 0 on 127.0.0.1 and 1"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(argv, variables, words):
    with pytest.raises(ConfigError) as caught:
        read(*argv, **{"MASTER_ADDR": "127.0.0.1"} | variables)
    assert str(caught.value).startswith(words)
