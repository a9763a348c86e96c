"""The gRPC transport's own behaviour: who may connect twice, what a site refuses."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from atoll.contract.errors import IntegrityError, ProtocolError, TransportError
from atoll.contract.wire import Head, Message, encode_bytes
from atoll.transport.grpc_channel import SERVICE, call_unary
from atoll.transport.link import ID_BYTES, Link, frame_id

PATIENCE_S = 120.0
HELLO = b"H" + bytes(ID_BYTES) + b'{"me":"by hand","have":{},"of":"","holds":[]}'


class ByHand:
    """A site whose frames a test writes by hand, over a real mutual-TLS stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def frame(self, kind: bytes) -> bytes:
        """The next frame of a kind."""
        while True:
            frame = await asyncio.wait_for(self.call.read(), PATIENCE_S)
            if frame is grpc.aio.EOF or frame[:1] == kind:
                return frame  # type: ignore[no-any-return]

    async def status(self) -> Any:
        """How the coordinator ended the stream."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await asyncio.wait_for(self.call.read(), PATIENCE_S) is not grpc.aio.EOF:
                pass
        return await asyncio.wait_for(self.call.code(), PATIENCE_S)

    async def reply(self, name: str, message: Message) -> None:
        await self.call.write(b"M" + frame_id(name) + encode_bytes(message))


@asynccontextmanager
async def by_hand(net: Any, site: str) -> AsyncIterator[ByHand]:
    credentials = grpc.ssl_channel_credentials(net.ca.pem, *net.pair(site))
    async with grpc.aio.secure_channel(net.address, credentials) as channel:
        yield ByHand(channel.stream_stream(f"/{SERVICE}/Connect")())


# ---------------------------------------------------------------- one site, one connection


async def test_the_newest_connection_of_a_site_wins(net: Any) -> None:
    """The older process is told and ends; what was asked of it is asked of the newer one."""
    go_on, begun = threading.Event(), threading.Event()

    def slow(message: Message, progress: Any) -> Message:
        begun.set()
        go_on.wait(PATIENCE_S)
        return Message("echo", {"re": message.meta["id"], "by": "older"})

    def quick(message: Message, progress: Any) -> Message:
        return Message("echo", {"re": message.meta["id"], "by": "newer"})

    await net.start()
    older = net.join("a", slow)
    await net.up("a")
    open_request = asyncio.create_task(net.ask("a", "1"))
    await net.until(begun.is_set)
    before = net.transport.sites()["a"]
    newer = net.join("a", quick)
    assert (await open_request).meta["by"] == "newer"
    with pytest.raises(IntegrityError) as error:
        await older
    assert error.value.code == "site.elsewhere" and error.value.remedy
    assert net.transport.sites()["a"] > before and not newer.done()
    go_on.set()
    net.sites = [pair for pair in net.sites if pair[1] is not older]
    assert (await net.ask("a", "2")).meta["by"] == "newer"


async def test_a_site_that_is_disconnected_comes_back_by_itself(net: Any) -> None:
    await net.start()
    net.join("a")
    net.join("b")
    await net.up("a", "b")
    for times in range(2, 5):
        net.transport.disconnect("a")
        await net.until(lambda times=times: net.connected.count("a") == times, "a comes back")
        assert (await net.ask("a", str(times))).meta["re"] == str(times)
    assert net.connected.count("b") == 1
    net.transport.disconnect("nobody")


async def test_a_request_waits_for_a_site_that_is_away(net: Any) -> None:
    await net.start()
    asking = asyncio.create_task(net.ask("a", "early", {"x": np.arange(300_000)}))
    await asyncio.sleep(0)
    net.join("a")
    assert (await asking).arrays["x"].sum() == np.arange(300_000).sum()


async def test_a_stopped_coordinator_leaves_no_stream_open(net: Any) -> None:
    await net.start()
    site = net.join("a")
    await net.up("a")
    await net.transport.stop()
    await net.until(lambda: net.states["a"][-1] == "disconnected")
    assert not site.done()
    net.transport = None


# ---------------------------------------------------------------- replies that nobody asked for


async def test_replies_that_nobody_asked_for_are_ignored(net: Any) -> None:
    await net.start()
    async with by_hand(net, "a") as hand:
        await hand.call.write(HELLO)
        asking = asyncio.create_task(net.ask("a", "1"))
        await hand.frame(b"M")
        await hand.reply("other", Message("echo", {"re": "other"}, {"x": np.zeros(9)}))
        await hand.reply("none", Message("echo", {}))
        await hand.reply("1", Message("echo", {"re": "2"}))  # one name on the frame, another inside
        await hand.call.write(b"P" + frame_id("other") + b'{"done":1}')
        await hand.reply("1", Message("echo", {"re": "1", "answer": "right"}))
        await hand.reply("1", Message("echo", {"re": "1", "answer": "late"}))
        assert (await asking).meta["answer"] == "right"
        acknowledged = (await hand.frame(b"A"))[1 + ID_BYTES :]
        assert frame_id("1") in [acknowledged[i : i + ID_BYTES] for i in range(0, len(acknowledged), ID_BYTES)]
        again = asyncio.create_task(net.ask("a", "2"))
        await hand.frame(b"M")
        await hand.reply("2", Message("echo", {"re": "2"}))
        assert (await again).meta["re"] == "2"
        assert net.transport.traffic["r"].from_sites_bytes == sum(
            len(encode_bytes(Message("echo", meta))) for meta in ({"re": "1", "answer": "right"}, {"re": "2"})
        )


@pytest.mark.parametrize(
    "frames",
    [
        [b""], [b"nonsense"], [b"M" + bytes(30)], [HELLO[:20]],
        [HELLO, b"Z" + bytes(16)], [HELLO, b"short"], [HELLO, HELLO], [HELLO, b"M" + bytes(16) + b"ATOL"],
        [HELLO, b"D" + frame_id("x") + bytes(100)], [HELLO, b"P" + bytes(16) + b"{"],
        [HELLO, b"A" + bytes(16) + frame_id("x")],
    ],
    ids=range(11),
)  # fmt: skip
async def test_malformed_frames_end_the_connection_and_nothing_else(net: Any, frames: list[bytes]) -> None:
    await net.start()
    net.join("good")
    await net.up("good")
    async with by_hand(net, "bad") as hand:
        for frame in frames:
            await hand.call.write(frame)
        assert await hand.status() is grpc.StatusCode.INVALID_ARGUMENT
        assert "bad" not in net.transport.sites()
    async with by_hand(net, "bad") as hand:  # it may try again
        await hand.call.write(HELLO)
        await net.until(lambda: "bad" in net.transport.sites())
    await net.ask("good", "1")


@pytest.mark.parametrize("breaks", [True, False], ids=["broke the protocol", "is merely stuck"])
async def test_a_site_whose_old_stream_is_stuck_comes_back(net: Any, breaks: bool) -> None:
    """It does not read any more, so that the coordinator's last word does not get through."""
    await net.start()
    async with by_hand(net, "a") as stuck:
        await stuck.call.write(HELLO)
        asking = asyncio.create_task(net.ask("a", "1", {"x": np.zeros(5_000_000)}))
        await net.until(lambda: "a" in net.connected)
        if breaks:
            await stuck.call.write(b"nonsense")
        net.join("a")
        assert len((await asking).arrays["x"]) == 5_000_000
        assert net.connected == ["a", "a"]


@pytest.mark.parametrize("words", ["go away", '{"error": "forbidden"}', "{", "7"])
async def test_a_refusal_that_is_not_the_coordinators(net: Any, words: str) -> None:
    """Something between, such as a proxy, refuses: that is no verdict on the site, which tries again."""
    server = grpc.aio.server()

    async def refuse(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, words)

    methods = {
        "Connect": grpc.stream_stream_rpc_method_handler(refuse),
        "Enrol": grpc.unary_unary_rpc_method_handler(refuse),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    credentials = grpc.ssl_server_credentials([net.ca.issue_server(["127.0.0.1"])])
    net.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    await server.start()
    with pytest.raises(TransportError) as error:
        await call_unary(net.address, net.ca.pem, None, "Enrol", {})
    assert error.value.code == "transport.unreachable"
    site = net.join("a")
    await net.until(lambda: len(net.states["a"]) >= 2 or site.done())
    assert not site.done()
    await server.stop(0)


async def test_a_stream_that_ends_before_its_hello(net: Any) -> None:
    await net.start()
    async with by_hand(net, "a") as hand:
        await hand.call.done_writing()
        assert await hand.status() is grpc.StatusCode.OK
    assert not net.transport.sites()


# ---------------------------------------------------------------- sizes


async def test_a_task_beyond_the_sites_limit_is_refused_by_the_site(net: Any) -> None:
    await net.start()
    net.join("a", max_message_bytes=100_000)
    await net.up("a")
    for size in (200_000, 10_000_000, 20_000):
        with pytest.raises(ProtocolError) as error:
            await net.ask("a", f"large {size}", {"x": np.zeros(size)})
        assert error.value.code == "site.too-large" and error.value.field == "max_message_bytes" and error.value.remedy
        assert (await net.ask("a", f"small {size}", {"x": np.ones(100)})).arrays["x"].sum() == 100
    assert net.connected == ["a"]


async def test_a_disk_that_fills_fails_the_request_and_nothing_else(net: Any) -> None:
    """The spool's file may not grow beyond 8 MB here: the system refuses like a full disk."""
    await net.start()
    net.join("a")
    await net.up("a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_100, hard))
    try:
        with pytest.raises(TransportError) as error:
            await net.ask("a", "1", {"x": np.zeros(2_000_000)})
        assert error.value.code == "spool.disk" and error.value.remedy
        assert (await net.ask("a", "2", {"x": np.ones(900_000)})).arrays["x"].sum() == 900_000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (await net.ask("a", "1", {"x": np.ones(2_000_000)})).arrays["x"].sum() == 2_000_000
    assert net.connected == ["a"] and not list(net.folder.iterdir())


async def test_a_spool_folder_that_is_gone(net: Any) -> None:
    net.folder = net.folder / "nowhere"
    await net.start()
    net.join("a")
    await net.up("a")
    with pytest.raises(TransportError) as error:
        await net.ask("a", "1", {"x": np.zeros(1_000_000)})
    assert error.value.code == "spool.disk"
    await net.ask("a", "2")


def test_a_hello_by_hand_is_a_hello() -> None:
    class Owner:
        def accept(self, head: Head) -> None: ...

    assert Link(Owner()).attach(HELLO) == 1  # type: ignore[arg-type]
