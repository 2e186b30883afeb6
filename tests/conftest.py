"""What holds for all tests: their order, their time limits, and how signals are handled."""

import os
import shutil
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings
from limits import scaled

UNMEASURED = (
    "data/test_permutation.py",
    "data/test_sampler.py",
    "data/test_forms.py",
    "distributed/test_buckets.py",
    "distributed/test_compressed_runs.py",
    "distributed/test_exact_step.py",
    "distributed/test_layouts.py",
    "distributed/test_resume.py",
    "launch/test_main.py",
    "models/",
    "network/",
    "ports/",
    "slurm/",
    "test_docs.py",
    "test_early_stops.py",
    "test_examples.py",
    "test_peers.py",
    "test_restarts.py",
    "test_soak.py",
)
"""Files that run through lines that others run through as well: measuring coverage doubles their
time."""
SLOW = (
    *UNMEASURED,
    "checkpointing/test_atomic_write.py",
    "checkpointing/test_convert.py",
    "distributed/test_comm_hooks.py",
    "distributed/test_data_parallel.py",
    "distributed/test_error_propagation.py",
    "distributed/test_hang",
    "distributed/test_launcher_files.py",
    "distributed/test_local_sgd.py",
    "distributed/test_recursive_doubling.py",
    "distributed/test_wrap_model.py",
    "doctor/test_links.py",
    "doctor/test_main.py",
    "doctor/test_protocol.py",
    "engine/test_evaluation.py",
    "engine/test_host_waits.py",
    "engine/test_rank_consistency.py",
    "launch/test_run.py",
    "launch/test_wheel.py",
    "report/test_wandb",
    "test_allocation.py",
    "test_benchmarks.py",
    "test_console.py",
    "test_launch.py",
    "test_platforms.py",
    "test_secrets.py",
)
"""Files that ``--fast`` leaves out: what is left are the unit tests, and runs of ``test_train.py``,
``distributed/test_runs.py`` and others."""
LONGEST = (
    "slurm/test_jobs.py",
    "network/test_two_hosts.py",
    "report/test_wandb_follower.py",
    "test_peers.py",
    "slurm/test_scripts.py",
    "network/test_shared_folder.py",
    "report/test_wandb_logger.py",
    "test_restarts.py",
    "test_soak.py",
    "test_docs.py",
    "distributed/test_resume.py",
    "test_launch.py",
)
"""Files that take long come first, so that no worker is left with one at the end."""

# Threads of torch and numpy in every process would wait for each other by spinning on busy CPUs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "any_machine",
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fast", settings.get_profile("any_machine"), max_examples=10)
settings.load_profile("any_machine")

# `nohup` and `&` in a script start a program with these signals ignored, and every process that it
# starts inherits that; tests send them.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        _default = signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, _default)


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave out what takes long")


def pytest_configure(config):
    if config.getoption("fast"):
        settings.load_profile("fast")


def name_of(item):
    """Name of the file of a test, below this folder."""
    return item.path.as_posix().rpartition("/tests/")[2]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Measure no coverage in some files, nor in the processes that their tests start."""
    if not name_of(item).startswith(UNMEASURED):
        return (yield)
    trace, before = sys.gettrace(), dict(os.environ)
    sys.settrace(None)
    for variable in [variable for variable in before if variable.startswith("COV")]:
        del os.environ[variable]
    os.environ["UNMEASURED"] = "1"
    try:
        return (yield)
    finally:
        os.environ.pop("UNMEASURED")
        os.environ.update(before)
        sys.settrace(trace)


def pytest_collection_modifyitems(config, items):
    if config.getoption("fast"):
        slow = [item for item in items if name_of(item).startswith(SLOW)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(name_of(item), len(LONGEST)))
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit_s = marker.args[0] if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(scaled(limit_s)), append=False)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A short run whose checkpoints are all kept; not to be changed."""
    from ranks import run_ranks  # torch, which some environments of these tests lack
    from saved_run import train

    folder = tmp_path_factory.mktemp("runs")
    run_ranks(1, train, folder)
    return folder / "tiny"


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that run."""
    return shutil.copytree(saved, tmp_path / "tiny", symlinks=True)
