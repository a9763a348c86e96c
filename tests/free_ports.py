"""Ports for servers that are killed and started again at the same place."""

from __future__ import annotations

import random
import socket

PORTS = range(10_000, 30_000)
"""Below those that Linux gives to connections: one of these could take a server's port before it starts, or while it is
away, if only the one by which a client tries to reach it."""
_drawn = random.SystemRandom().sample(PORTS, len(PORTS))


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now; each is given once, and another process hardly draws the same."""
    found: list[int] = []
    while len(found) < number:
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port := _drawn.pop()))
            except OSError:
                continue
            found.append(port)
    return found
