"""Host names, addresses and free ports. No torch."""

import socket
from contextlib import suppress
from ipaddress import ip_address


def whereabouts(address: str) -> str:
    """Say where a name or address leads from here.

    Args:
        address: Name, IPv4 or IPv6 address of a host.

    Returns:
        ``loopback`` if back to the machine that asks, whichever it is; ``here`` if to this machine;
        ``elsewhere``; or ``unknown`` if this machine does not know the name.
    """
    try:
        places = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return "unknown"
    if all(ip_address(str(place[4][0]).partition("%")[0]).is_loopback for place in places):
        return "loopback"
    for family, kind, protocol, _, place in places:
        with suppress(OSError), socket.socket(family, kind, protocol) as listener:
            listener.bind(place)  # to an own address only
            return "here"
    return "elsewhere"


def free_port() -> int:
    """Find a TCP port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
