"""A link of 64 kbit/s: what takes minutes is waited for, as long as something gets through."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from atoll.contract.wire import Message

RATE = 8000
"""Bytes a second: 64 kbit/s."""
PIECE = 400
SMALL_BUFFER = 4096
SEGMENT = 1400
"""Bytes of a TCP segment, as on a real link: on loopback one is 64 KiB, which no small buffer ever has room for."""


def small() -> socket.socket:
    """A socket that takes little at a time: else the kernel takes a megabyte."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
    return made


class Throttle:
    """A TCP proxy on loopback that lets RATE bytes a second through, in each direction."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self.target, self.connections = (host, int(port)), 0
        self.passed = {"up": 0, "down": 0}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Listen; returns the address."""
        listening = small()
        listening.bind(("127.0.0.1", 0))
        self.server = await asyncio.start_server(self._serve, sock=listening, limit=SMALL_BUFFER)
        return f"127.0.0.1:{listening.getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        onward = small()
        onward.setblocking(False)
        await asyncio.get_running_loop().sock_connect(onward, self.target)
        there_reader, there_writer = await asyncio.open_connection(sock=onward, limit=SMALL_BUFFER)
        ways = (self._pass(reader, there_writer, "up"), self._pass(there_reader, writer, "down"))
        tasks = [asyncio.create_task(way) for way in ways]
        self._tasks |= set(tasks)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for one in (writer, there_writer):
            one.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        """At RATE, however unevenly the machine wakes this up."""
        free = time.monotonic()
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                free = max(free, time.monotonic()) + len(data) / RATE
                await asyncio.sleep(free - time.monotonic())
                writer.write(data)
                await writer.drain()
                self.passed[way] += len(data)

    async def stop(self) -> None:
        """End it, and what goes through it."""
        self.server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def throttle(net: Any) -> AsyncIterator[Throttle]:
    """A proxy before a coordinator that listens."""
    await net.start()
    made = Throttle(net.address)
    yield made
    await made.stop()


@pytest.mark.slow
async def test_a_transfer_that_takes_longer_than_the_deadline_is_waited_for(net: Any, throttle: Throttle) -> None:
    """There and back, each of it longer than the deadline, over one connection that nobody takes for dead, though a
    ping waits behind more than a minute of what is under way."""

    def some(message: Message, progress: Any) -> Message:
        return Message("echo", {"re": message.meta["id"]}, {"x": message.arrays["x"][::5] * 2})

    sent = np.random.default_rng(0).standard_normal(100_000)
    net.join("a", some, address=await throttle.start())
    await net.up("a")
    began = time.monotonic()
    got = await net.ask("a", "double", {"x": sent}, deadline_s=15.0)
    assert got.arrays["x"].tobytes() == (2 * sent[::5]).tobytes()
    assert time.monotonic() - began > 1.2 * sent.nbytes / RATE * 0.9
    assert throttle.connections == 1, net.states
