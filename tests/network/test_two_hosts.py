"""The launch script between two hosts, on a network that is good, bad, cut, or set up wrong."""

import sys
import time

import commands
import pytest
from launching import environment
from limits import WAIT_S
from network.hosts import Run, result_in, two_hosts

from ddp_sgd.errors import ExitCode

pytestmark = pytest.mark.timeout(900)
TIMEOUT_S = 10
START_S = 60  # that scripts, torchrun and ranks may take to start and to end, on a busy machine
LENGTH = ("--epochs=1", "--log.every_steps=1")


@pytest.fixture
def network(tmp_path):
    with two_hosts(tmp_path) as network:
        yield network


@pytest.fixture
def launch():
    """Start a run on a host; what is left of it is ended after the test."""
    runs = []

    def start(*arguments, **variables):
        runs.append(Run(*arguments, **variables))
        return runs[-1]

    yield start
    for run in runs:
        run.clean_up()


@pytest.fixture(scope="module")
def digest_of_one_host(tmp_path_factory):
    """Weights after the run on one host, by the number of its ranks."""
    known = {}

    def find(ranks):
        if ranks not in known:
            folder = tmp_path_factory.mktemp(f"one-host-{ranks}")
            commands.run(
                [
                    sys.executable,
                    "-m",
                    "ddp_sgd.launch",
                    f"--nproc={ranks}",
                    *LENGTH,
                    model(0, folder),
                ],
                cwd=folder,
                env=environment(),
                check=True,
                timeout=WAIT_S,
                capture_output=True,
            )
            known[ranks] = result_in(folder / "runs" / "digits")["weights_digest"]
        return known[ranks]

    return find


def launch_both(launch, network, folder, *, pause_s=0, timeout_s=60, folders=None, **variables):
    """Start a run on both hosts; with a pause in each step, until ``folder / 'hurry'`` is there."""
    options = (*LENGTH, model(pause_s, folder), f"--runtime.timeout_s={timeout_s}")
    places = zip(network.hosts, folders or (folder, folder), strict=True)
    return [launch(host, where, *options, **variables) for host, where in places]


def model(pause_s, folder):
    patience = f"{{pause_s: {pause_s}, until: {folder / 'hurry'}}}"
    return f"--model={{class_path: user_code.Slow, init_args: {patience}}}"


def assert_done(runs, digest):
    for run in runs:
        assert run.end() == ExitCode.DONE, "".join(each.said for each in runs)
    assert runs[0].result["weights_digest"] == digest


def assert_one_error(run, *words):
    """One line says what is the matter, and nothing of Python is in sight."""
    assert len(run.errors) == 1, run.said
    for word in words:
        assert word in run.errors[0], run.said


def test_run_over_two_hosts_is_that_of_one(network, launch, digest_of_one_host, tmp_path):
    runs = launch_both(launch, network, tmp_path, NPROC="2")
    assert_done(runs, digest_of_one_host(4))
    assert runs[0].result["world_size"] == 4


def test_five_seconds_without_a_link_change_nothing(network, launch, digest_of_one_host, tmp_path):
    runs = launch_both(launch, network, tmp_path, pause_s=0.3)
    runs[0].wait_until(lambda: runs[0].steps > 2)
    network.cut()
    time.sleep(5)  # the disturbance itself
    network.fix()
    steps = runs[0].steps
    runs[0].wait_until(lambda: runs[0].steps > steps)
    (tmp_path / "hurry").touch()
    assert_done(runs, digest_of_one_host(2))


def test_link_that_is_cut_for_good_is_told_on_both_sides_by_name(network, launch, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]  # as without a shared disk
    runs = launch_both(launch, network, tmp_path, pause_s=0.5, timeout_s=TIMEOUT_S, folders=folders)
    runs[0].wait_until(lambda: runs[0].steps > 2)
    network.cut()
    start = time.monotonic()
    codes = [run.end(deadline_s=TIMEOUT_S + 50) for run in runs]
    took_s = time.monotonic() - start
    sys.stdout.write(f"both sides ended {took_s:.1f} s after the cut\n")
    assert codes == [ExitCode.PEER, ExitCode.PEER], "".join(run.said for run in runs)
    assert_one_error(runs[0], "node2 (rank 1) has not been heard of for")
    assert_one_error(runs[1], "node1 (rank 0) has not been heard of for")
    assert took_s < TIMEOUT_S + 30
    assert runs[0].result["exit_code"] == ExitCode.PEER


def test_bad_network_changes_nothing(network, launch, digest_of_one_host, tmp_path):
    network.lose(percent=5)
    network.throttle("100mbit")
    runs = launch_both(launch, network, tmp_path)
    assert_done(runs, digest_of_one_host(2))


def assert_ends_in_time(runs):
    for run in runs:
        code = run.end(deadline_s=TIMEOUT_S + START_S)
        assert code == ExitCode.PEER, "".join(run.said for run in runs)


def test_localhost_is_another_machine_on_each_host(network, launch, tmp_path):
    runs = launch_both(launch, network, tmp_path, timeout_s=TIMEOUT_S, MASTER_ADDR="localhost")
    assert_ends_in_time(runs)
    for run in runs:
        assert_one_error(run, "localhost is another machine on every host; set MASTER_ADDR")


def test_second_run_on_one_port_is_told_so_and_the_first_goes_on(
    network, launch, digest_of_one_host, tmp_path
):
    first = launch_both(launch, network, tmp_path, pause_s=5, RUN_ID="first")
    first[0].wait_until(lambda: first[0].steps > 0)
    others = [
        launch_both(launch, network, tmp_path / f"as-{run_id}", timeout_s=TIMEOUT_S, RUN_ID=run_id)
        for run_id in ("first", "second")
    ]
    for runs in others:
        assert_ends_in_time(runs)
        assert_one_error(runs[0], "port 29400 on node1 is held by another program; set MASTER_PORT")
        assert_one_error(runs[1], "2 machines at node1:29400 did not come together within 10 s")
    (tmp_path / "hurry").touch()
    assert_done(first, digest_of_one_host(2))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("GLOO_SOCKET_IFNAME", "nosuch0", "GLOO_SOCKET_IFNAME is nosuch0: set GLOO_SOCKET_IFNAME"),
        ("GLOO_SOCKET_IFNAME", "lost0", "GLOO_SOCKET_IFNAME is lost0: set GLOO_SOCKET_IFNAME"),
        ("PET_LOCAL_ADDR", "", "PET_LOCAL_ADDR there sets another address"),
    ],
)
def test_wrong_interface_is_one_line(network, launch, tmp_path, name, value, words):
    runs = [
        launch(
            host,
            tmp_path,
            *LENGTH,
            f"--runtime.timeout_s={TIMEOUT_S}",
            **{name: value or host.lost_address},
        )
        for host in network.hosts
    ]
    assert_ends_in_time(runs)
    told = [run for run in runs if run.errors]
    assert told
    for run in told:
        assert_one_error(run, words)
