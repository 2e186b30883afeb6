import os
import socket
import subprocess
import sys

import pytest
from limits import WAIT_S

from ddp_sgd.doctor.facts import address_toward, interface_of, is_loopback, resolve
from ddp_sgd.host import whereabouts


def test_names_are_resolved():
    assert resolve("127.0.0.1") == ["127.0.0.1"]
    assert set(resolve("localhost")) <= {"127.0.0.1", "::1"}
    assert resolve("nowhere.invalid") == []
    assert resolve("x" * 100) == []


@pytest.mark.parametrize(
    ("address", "leads_back"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("::1", True),
        ("::1%lo", True),
        ("10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("node1", False),
        ("", False),
    ],
)
def test_loopback_addresses(address, leads_back):
    assert is_loopback(address) is leads_back


def test_the_address_toward_another_host_is_our_own():
    address = address_toward("localhost")
    assert address is not None
    assert whereabouts(address) in ("here", "loopback")
    assert address_toward("nowhere.invalid") in (address, None)


def test_interfaces_are_named_by_their_address():
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("192.0.2.255") is None
    assert interface_of(None) is None


NO_WAY = """
from ddp_sgd.doctor.facts import address_toward
print(address_toward("203.0.113.7"), address_toward("localhost"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a network of its own")
def test_a_host_without_a_network():
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", NO_WAY],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    assert done.stdout in ("None None\n", "None 127.0.0.1\n")
