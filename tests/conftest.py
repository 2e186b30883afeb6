"""What holds for all tests: their order, their time limits, and how signals are handled."""

import signal

import pytest
from hypothesis import HealthCheck, settings
from limits import scaled

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


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit_s = marker.args[0] if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(scaled(limit_s)), append=False)
