"""By which address other machines reach this one."""

from __future__ import annotations

import socket


def source_address(host: str, port: int) -> str:
    """The address of the interface through which the route to another machine leaves; nothing is sent there.

    Args:
        host: name or address of the other machine.
        port: any of its ports.

    Raises:
        OSError: the name leads nowhere, or no route leads there.
    """
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])
