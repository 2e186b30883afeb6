import subprocess
import sys

import pytest

from ddp_sgd.config.sources import gather
from ddp_sgd.errors import ConfigError
from ddp_sgd.host import FACTOR, scaled, timeout_factor


@pytest.mark.parametrize(("factor", "seconds"), [(None, 2.0), ("", 2.0), ("1", 2.0), ("4.5", 9.0)])
def test_a_timeout_is_multiplied_by_the_factor_of_the_environment(monkeypatch, factor, seconds):
    monkeypatch.delenv(FACTOR, raising=False)
    if factor is not None:
        monkeypatch.setenv(FACTOR, factor)
    assert scaled(2.0) == seconds


def test_the_factor_reaches_the_timeouts_of_the_package():
    code = "from ddp_sgd.report.folder_lock import _PATIENCE_S as value; print(value)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), FACTOR: "3"},
    )
    assert float(done.stdout) == 30.0


@pytest.mark.parametrize("text", ["0", "0.5", "-2", "1001", "inf", "nan", "fast"])
def test_another_factor_is_refused_by_name(text):
    assert timeout_factor({FACTOR: text}) is None
    with pytest.raises(ConfigError, match=rf"{FACTOR} is '{text}'; choose a number in \[1, 1000\]"):
        gather([], {FACTOR: text}, [])


def test_the_factor_is_no_key_of_the_configuration():
    assert gather([], {FACTOR: "2"}, []).origins == {}
