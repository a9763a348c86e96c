"""Connections that break in the middle of a transfer: it goes on where it was, and is not sent all over again."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from atoll.contract.wire import Message
from atoll.transport.link import CHUNK_BYTES

LARGE = np.random.default_rng(3).standard_normal(50_000_000 // 8)
UNDER_WAY_BYTES = 16_000_000
"""What sockets, TLS, HTTP/2 windows and the proxy itself may hold when it is cut."""
FRAMING_BYTES = 1_000_000
"""Handshakes, and the heads of records and frames: 120 KB on an idle machine, and more where these are smaller."""


def answers(message: Message, progress: Any) -> Message:
    """A large reply to "give"; the sum of what came to "take"."""
    if message.meta["id"].startswith("give"):
        return Message("echo", {"re": message.meta["id"]}, {"x": LARGE})
    return Message("echo", {"re": message.meta["id"], "same": bool(np.array_equal(message.arrays["x"], LARGE))})


@pytest.mark.parametrize("at", [0, 3_000_000, 25_000_000, 49_500_000])
@pytest.mark.parametrize("spool", [True, False], ids=["spooled", "in memory"])
async def test_a_reply_that_is_cut_is_resumed(net: Any, proxies: Any, at: int, spool: bool) -> None:
    await net.start(spool=spool)
    proxy = await proxies(net.address)
    net.join("a", answers, address=proxy.address)
    await net.up("a")
    proxy.cut_after = ("sent", proxy.sent + at)
    got = await net.ask("a", "give")
    assert got.arrays["x"].tobytes() == LARGE.tobytes()
    assert proxy.connections == 2 and net.connected == ["a", "a"]
    assert LARGE.nbytes < proxy.sent < LARGE.nbytes + min(at, UNDER_WAY_BYTES) + FRAMING_BYTES
    assert (await net.ask("a", "give again")).arrays["x"].tobytes() == LARGE.tobytes()


@pytest.mark.parametrize("at", [0, 3_000_000, 25_000_000, 49_500_000])
async def test_a_request_that_is_cut_is_resumed(net: Any, proxies: Any, at: int) -> None:
    await net.start()
    proxy = await proxies(net.address)
    net.join("a", answers, address=proxy.address)
    await net.up("a")
    proxy.cut_after = ("received", proxy.received + at)
    assert (await net.ask("a", "take", {"x": LARGE})).meta["same"] is True
    assert proxy.connections == 2
    assert LARGE.nbytes < proxy.received < LARGE.nbytes + min(at, UNDER_WAY_BYTES) + FRAMING_BYTES


async def test_transfers_both_ways_survive_many_cuts(net: Any, proxies: Any) -> None:
    await net.start()
    proxy = await proxies(net.address)
    net.join("a", answers, address=proxy.address, retry_s=0.05)
    await net.up("a")
    asking = asyncio.gather(
        net.ask("a", "give"),
        net.ask("a", "take", {"x": LARGE}),
        *(net.ask("a", f"take {n}", {"x": LARGE[:9]}) for n in range(9)),
    )
    for times in range(1, 8):
        proxy.cut_after = ("sent" if times % 2 else "received", times * 5_000_000)
        await net.until(lambda times=times: len(net.connected) > times or asking.done(), "a cut")
    gave, took, *small = await asking
    assert gave.arrays["x"].tobytes() == LARGE.tobytes() and took.meta["same"] is True
    assert [reply.meta["same"] for reply in small] == [False] * 9
    assert len(net.connected) >= 6
    assert proxy.sent + proxy.received < 2 * LARGE.nbytes + 8 * UNDER_WAY_BYTES


async def test_anything_may_be_cut_at_any_time(net: Any, proxies: Any) -> None:
    """Small and large requests, some repeated under their names, and a cut every few hundred kilobytes."""
    sizes = [0, 10, 50_000, CHUNK_BYTES // 8 - 100, CHUNK_BYTES // 8 + 100, 400_000]

    def double(message: Message, progress: Any) -> Message:
        progress({"done": 1})
        return Message("echo", {"re": message.meta["id"]}, {"x": message.arrays["x"] * 2})

    await net.start()
    proxy = await proxies(net.address)
    net.join("a", double, address=proxy.address, retry_s=0.02)
    await net.up("a")
    bytes_between = iter(np.random.default_rng(4).integers(1, 900_000, 30).tolist())

    def cut_again() -> None:
        if proxy.cut_after is None and (after := next(bytes_between, None)) is not None:
            counter = "sent" if after % 2 else "received"
            proxy.cut_after = (counter, getattr(proxy, counter) + after)

    async def worker(number: int) -> None:
        for turn in range(20):
            name = f"{number}/{turn % 6}"
            x = np.random.default_rng([number, turn % 6]).standard_normal(sizes[(number + turn) % 6])
            cut_again()
            assert (await net.ask("a", name, {"x": x})).arrays["x"].tobytes() == (x * 2).tobytes()

    async with asyncio.timeout(300):
        await asyncio.gather(*(worker(number) for number in range(8)))
    assert len(net.connected) > 10


async def test_a_message_that_is_computed_while_the_connection_is_away_arrives(net: Any, proxies: Any) -> None:
    import threading

    begun, go_on, times = threading.Event(), threading.Event(), []

    def slow(message: Message, progress: Any) -> Message:
        times.append(message.meta["id"])
        begun.set()
        go_on.wait(120)
        return Message("echo", {"re": message.meta["id"]})

    await net.start()
    proxy = await proxies(net.address)
    net.join("a", slow, address=proxy.address)
    await net.up("a")
    asking = asyncio.create_task(net.ask("a", "1"))
    await net.until(begun.is_set)
    proxy.cut()
    await net.until(lambda: "a" not in net.transport.sites())
    go_on.set()
    assert (await asking).meta["re"] == "1"
    assert times == ["1"]  # it was not asked a second time


async def test_what_is_cancelled_half_way_is_given_up_at_both_ends(net: Any, proxies: Any) -> None:
    await net.start(spool=False)
    proxy = await proxies(net.address)
    net.join("a", answers, address=proxy.address)
    await net.up("a")
    for name, arrays, counter in (("give", None, "sent"), ("take", {"x": LARGE}, "received")):
        before = getattr(proxy, counter)
        asking = asyncio.create_task(net.ask("a", name, arrays))
        await net.until(lambda counter=counter, before=before: getattr(proxy, counter) > before + 5_000_000)
        asking.cancel()
        await asyncio.wait([asking])
        assert (await net.ask("a", f"take {name}", {"x": LARGE[:5]})).meta["same"] is False
        assert (await net.ask("a", name, arrays)).kind == "echo"
    assert net.connected == ["a"]
