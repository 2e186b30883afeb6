"""Routes: what host names resolve to, and by which interface others are reached. No torch."""

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress

_ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737): the way to it is the way out of this host."""
_SIOCGIFADDR = 0x8915


def resolve(name: str) -> list[str]:
    """Return the addresses of a name on this host, in the order of preference; empty if none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_loopback(address: str) -> bool:
    """Whether an address leads back to the host that uses it: 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def address_toward(name: str) -> str | None:
    """Find the address from which this host reaches a name; where that is itself, the way out.

    Nothing is sent.

    Args:
        name: Host name or address of the rendezvous endpoint.

    Returns:
        An address of this host; None if there is no way.
    """
    toward = _source_of(name)
    if toward is None or is_loopback(toward):
        return _source_of(_ELSEWHERE) or toward
    return toward


def interface_of(address: str | None) -> str | None:
    """Name the interface that has an IPv4 address, such as ``eth0``; None if it is not known."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _source_of(name: str) -> str | None:
    with suppress(OSError, UnicodeError):
        for family, kind, _, _, target in socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
    return None
