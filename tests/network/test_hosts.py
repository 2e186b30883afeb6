import pytest
from _pytest.outcomes import Failed, Skipped
from network.hosts import missing_parts, two_hosts


@pytest.mark.parametrize(("required", "outcome"), [("", Skipped), ("1", Failed)])
def test_what_is_missing_is_said_loudly(monkeypatch, tmp_path, required, outcome):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("REQUIRE_CLUSTER_TESTS", required)
    with pytest.raises(outcome, match="the tests of two hosts need"), two_hosts(tmp_path):
        pass


def test_tools_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_parts().endswith("apt-get install iproute2 nftables util-linux")
    monkeypatch.setattr("os.geteuid", lambda: 1)
    assert "need root" in missing_parts()
