import pytest
from _pytest.outcomes import Failed, Skipped
from machines import what_is_missing
from network.hosts import TOOLS, two_hosts


@pytest.mark.parametrize(("required", "outcome"), [("", Skipped), ("1", Failed)])
def test_what_is_missing_is_said_loudly(monkeypatch, tmp_path, required, outcome):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("REQUIRE_CLUSTER_TESTS", required)
    with (
        pytest.raises(outcome, match="machines in namespaces need|tools are missing"),
        two_hosts(tmp_path),
    ):
        pass


def test_tools_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert what_is_missing(TOOLS).endswith("iproute2 nftables util-linux")
    monkeypatch.setattr("os.geteuid", lambda: 1)
    assert "need root" in what_is_missing(TOOLS)
