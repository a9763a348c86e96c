"""Whoever reaches the coordinator's ports without being a site, and ports where nobody is."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import grpc
import grpc.aio
import pytest

from atoll.contract.errors import TransportError
from atoll.transport.grpc import GrpcTransport
from atoll.transport.grpc_channel import SERVICE, call_unary

PATIENCE_S = 120.0


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(3000), b"\x16\x03\x01\x02\x00", b""]
)
async def test_garbage_on_either_port_does_no_harm(net: Any, noise: bytes) -> None:
    await net.start()
    net.join("a")
    await net.up("a")
    for port in (net.port, net.enrol_port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(noise)
        if not noise:
            writer.close()
        else:
            await writer.drain()
            await net.ask("a", f"while {port}")
            writer.close()
        await asyncio.wait([asyncio.ensure_future(reader.read())], timeout=PATIENCE_S)
    await net.ask("a", "after")
    assert net.connected == ["a"]


@pytest.mark.parametrize(
    "request_bytes", [b"", b"[]", b"{", b"\xff", b"null", b'{"site":1}', b'{"a":NaN}', b"[" * 100_000]
)
async def test_malformed_unary_requests_are_refused(net: Any, request_bytes: bytes) -> None:
    await net.start()
    for port, method, pair in ((net.enrol_port, "Enrol", None), (net.port, "Renew", net.pair("a"))):
        credentials = grpc.ssl_channel_credentials(net.ca.pem, *(pair or ()))
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(f"/{SERVICE}/{method}")(request_bytes, timeout=PATIENCE_S)
            assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_the_enrolment_port_does_not_serve_streams(net: Any) -> None:
    await net.start()
    credentials = grpc.ssl_channel_credentials(net.ca.pem)
    async with grpc.aio.secure_channel(f"127.0.0.1:{net.enrol_port}", credentials) as channel:
        for method in ("Connect", "Renew"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(f"/{SERVICE}/{method}")(b"{}", timeout=PATIENCE_S)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_nobody_listens(net: Any) -> None:
    with pytest.raises(TransportError) as error:
        await call_unary("127.0.0.1:1", net.ca.pem, None, "Enrol", {}, deadline_s=3)
    assert error.value.code == "transport.unreachable" and "refused" in str(error.value) and error.value.remedy
    net.address = "127.0.0.1:1"
    site = net.join("a")
    await net.until(lambda: len(net.states["a"]) >= 3)  # it keeps trying
    assert not site.done() and set(net.states["a"]) == {"disconnected"}


async def test_a_port_that_is_taken(net: Any) -> None:
    await net.start()
    second = GrpcTransport(net.authorise, enrol=lambda *_: {}, renew=lambda *_: {})
    pair = net.ca.issue_server(["127.0.0.1"])
    with pytest.raises(TransportError) as error:
        await second.start("127.0.0.1", 0, net.port, net.ca.pem, lambda: pair)
    assert error.value.code == "transport.port" and error.value.remedy
    await second.stop()
