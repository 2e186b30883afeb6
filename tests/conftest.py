"""What holds for all tests: their order, their time limits, and how signals are handled."""

import os
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
LONGEST = "slurm/test_jobs.py"
"""The file that takes longest comes first, so that no worker is left with it at the end."""

settings.register_profile(
    "any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any_machine")

# `nohup` and `&` in a script start a program with these signals ignored, and every process that it
# starts inherits that; tests send them.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        _default = signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, _default)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Measure no coverage in some files, nor in the processes that their tests start."""
    name = item.path.as_posix().rpartition("/tests/")[2]
    if not name.startswith(UNMEASURED):
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
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit_s = marker.args[0] if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(scaled(limit_s)), append=False)
