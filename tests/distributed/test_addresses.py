import socket

import pytest

from ddp_sgd.host import free_port, whereabouts


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("localhost", "loopback"),
        ("127.0.1.1", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "here"),
        ("192.0.2.1", "elsewhere"),  # set aside for documentation, so nobody has it
        ("2001:db8::1", "elsewhere"),
        ("nosuch.invalid", "unknown"),
    ],
)
def test_address_is_placed(address, place):
    assert whereabouts(address) == place


def test_free_port_is_free():
    port = free_port()
    assert 1024 < port < 65536
    with socket.create_server(("127.0.0.1", port)):
        pass
