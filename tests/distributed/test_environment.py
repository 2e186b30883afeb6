import pytest

from ddp_sgd.distributed.environment import (
    first_host,
    is_orphaned,
    may_be_rank_0,
    only_on_rank,
    read_ranks,
)
from ddp_sgd.errors import ConfigError, DataError, RemoteError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
}


def test_alone_without_a_launcher():
    ranks = read_ranks({"PATH": "/bin", "MASTER_ADDR": "left over from a profile"})
    assert (ranks.rank, ranks.world_size, ranks.launcher, ranks.alone) == (0, 1, "none", True)


def test_torchrun():
    ranks = read_ranks(TORCHRUN | SRUN)  # torchrun inside a batch job comes first
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (3, 4, 1, 2)
    assert (ranks.launcher, ranks.address, ranks.port) == ("torchrun", "head", 29500)
    assert (
        read_ranks({k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}).local_world_size
        == 4
    )


def test_srun():
    ranks = read_ranks(SRUN)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (5, 8, 1, 4)
    assert (ranks.launcher, ranks.address) == ("srun", "gpu03")
    assert ranks.port == 10_000 + 123456 % 20_000


def test_srun_follows_the_user_s_own_endpoint():
    ranks = read_ranks(SRUN | {"MASTER_ADDR": "ib0", "MASTER_PORT": "4000"})
    assert (ranks.address, ranks.port) == ("ib0", 4000)


def test_srun_prefers_the_nodes_of_the_step():
    assert read_ranks(SRUN | {"SLURM_STEP_NODELIST": "gpu04"}).address == "gpu04"


def test_one_task_needs_no_endpoint():
    assert read_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}).alone


def test_a_batch_shell_is_alone():
    assert (
        read_ranks({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}).launcher
        == "none"
    )


def test_a_shell_for_several_tasks_is_refused():
    shell = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "1"}
    match = "^SLURM_NTASKS is 8, but this process was started alone, from the batch script; start"
    with pytest.raises(ConfigError, match=match):
        read_ranks(shell)
    assert read_ranks(shell | {"SLURM_NTASKS": "1"}).alone
    assert read_ranks(shell | {"SLURM_STEP_ID": "0"}).world_size == 8


@pytest.mark.parametrize(
    ("counts", "node", "expected"),
    [("4(x2)", "1", 4), ("2,3(x2)", "2", 3), ("1,7", "0", 1), ("", "0", 8), ("4", "9", 8)],
)
def test_tasks_of_this_node(counts, node, expected):
    ranks = read_ranks(SRUN | {"SLURM_TASKS_PER_NODE": counts, "SLURM_NODEID": node})
    assert ranks.local_world_size == expected


@pytest.mark.parametrize(
    "missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
)
def test_a_half_set_torchrun_names_what_is_missing(missing):
    environ = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(
        ConfigError,
        match=f"^{missing} is not set, though .* is; start with torchrun, or unset RANK",
    ):
        read_ranks(environ)


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"])
def test_a_half_set_srun_names_what_is_missing(missing):
    environ = {key: value for key, value in SRUN.items() if key != missing}
    with pytest.raises(ConfigError, match=f"^{missing} is not set, though"):
        read_ranks(environ)


def test_a_lonely_task_number_is_half_set():
    with pytest.raises(
        ConfigError, match="SLURM_NTASKS SLURM_LOCALID are not set, though SLURM_PROCID is"
    ):
        read_ranks({"SLURM_PROCID": "0"})


@pytest.mark.parametrize(
    ("name", "value", "base"),
    [
        ("RANK", "4", TORCHRUN),
        ("RANK", "-1", TORCHRUN),
        ("RANK", "one", TORCHRUN),
        ("WORLD_SIZE", "0", TORCHRUN),
        ("LOCAL_RANK", "4", TORCHRUN),
        ("MASTER_PORT", "70000", TORCHRUN),
        ("SLURM_PROCID", "8", SRUN),
        ("SLURM_NTASKS", "x", SRUN),
        ("SLURM_JOB_ID", "?", SRUN),
    ],
)
def test_numbers_are_checked(name, value, base):
    with pytest.raises(ConfigError, match=f"^{name} is '.*'; it must be a whole number"):
        read_ranks(base | {name: value})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("a,b", "a"),
        ("node[03-07,12],other", "node03"),
        ("n[7]", "n7"),
        ("rack1-node[001-004]-ib", "rack1-node001-ib"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_an_empty_node_list_is_refused():
    with pytest.raises(ConfigError, match="must name hosts"):
        first_host("[1-2]")


def test_a_wrong_configuration_is_reported_by_rank_0_only():
    def told(environ, error):
        with (
            pytest.raises(Exception, match=str(error)) as caught,
            only_on_rank(this_one=may_be_rank_0(environ)),
        ):
            with only_on_rank(this_one=may_be_rank_0(environ)):
                raise error
        assert caught.value.exit_code == error.exit_code
        return not isinstance(caught.value, RemoteError)

    wrong = ConfigError("x is 1; choose 2.")
    assert told({}, wrong)
    assert told({"RANK": "0", "WORLD_SIZE": "2"}, wrong)
    assert not told({"RANK": "1", "WORLD_SIZE": "2"}, wrong)
    assert not told({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, wrong)
    assert told({"RANK": "1"}, wrong)  # nobody else is there to tell
    assert told({"RANK": "1", "WORLD_SIZE": "2"}, DataError("only here"))


def test_a_process_knows_that_its_launcher_is_gone(monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "x"}
    assert not is_orphaned(torchrun)
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert is_orphaned(torchrun)
    assert not is_orphaned({})
