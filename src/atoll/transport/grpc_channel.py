"""What both ends of grpc are made of: the service's name and options, TLS channels, unary calls and refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from atoll.contract.errors import AtollError, IntegrityError, ProtocolError, TransportError
from atoll.contract.wire import HEADER_LIMIT_BYTES, Json, parse_json, to_json
from atoll.transport.link import Link

SERVICE = "atoll.Federation"
OPTIONS = [
    ("grpc.max_receive_message_length", HEADER_LIMIT_BYTES + (2 << 20)),
    ("grpc.max_send_message_length", HEADER_LIMIT_BYTES + (2 << 20)),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 60_000),  # without a byte from the other end
    ("grpc.http2.ping_timeout_ms", 600_000),  # a ping and its answer wait behind all that a slow link holds
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
]


def join_address(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def until_either(*work: Awaitable[None]) -> None:
    """Run all until the first ends, cancel the others, and raise what the first raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def pump(link: Link, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Write what the link has to send, frame by frame, for ever."""
    while True:
        await write(await link.next_frame())


def open_channel(address: str, ca_pem: bytes, pair: tuple[bytes, bytes] | None) -> grpc.aio.Channel:
    """To a coordinator of this CA, with the TLS (key, certificate) of a site that has one."""
    key, certificate = pair or (None, None)
    credentials = grpc.ssl_channel_credentials(ca_pem, key, certificate)
    return grpc.aio.secure_channel(address, credentials, options=OPTIONS)


def raise_refusal(error: grpc.aio.AioRpcError) -> None:
    """Raise the AtollError the coordinator refused us with, if that is what it is."""
    details = error.details() or ""
    if error.code() == grpc.StatusCode.PERMISSION_DENIED:
        try:
            record = parse_json(details.encode())
        except ProtocolError:  # of something between us, such as a proxy
            record = None
        if isinstance(record, dict) and "code" in record:
            raise AtollError.from_public(record)
    late = "certificate has expired" in details
    if late or "certificate is not yet valid" in details:
        clock = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time()))
        raise IntegrityError(
            "tls.clock", f"by this site's clock, {clock}, the coordinator's certificate is not valid "
            + ("any more" if late else "yet"), field="clock",
            remedy="set this site's clock right and start it again; if it is right, the coordinator's is not",
        )  # fmt: skip
    if "CERTIFICATE_VERIFY_FAILED" in details:
        raise IntegrityError(
            "tls.wrong-authority", "the coordinator's certificate is not of this federation's CA",
            remedy="check the address; if the coordinator was set up anew, enrol again",
        )  # fmt: skip
    if "Hostname Verification Check failed" in details:
        raise IntegrityError(
            "tls.wrong-name", "the coordinator's certificate is for another address", field="address",
            remedy="reach it by the address it was set up with, or set 'address' in its coordinator.yaml",
        )  # fmt: skip


async def call_unary(
    address: str, ca_pem: bytes, pair: tuple[bytes, bytes] | None, method: str, request: Mapping[str, Json],
    deadline_s: float = 20.0,
) -> dict[str, Any]:  # fmt: skip
    """One unary call ("Enrol" or "Renew") as a site; raises the AtollError it was refused with, or TransportError."""
    async with open_channel(address, ca_pem, pair) as channel:
        return await on_channel(channel, method, request, deadline_s)


async def on_channel(
    channel: grpc.aio.Channel, method: str, request: Mapping[str, Json], deadline_s: float = 20.0
) -> dict[str, Any]:
    """As :func:`call_unary`, on an open channel."""
    call, ends = channel.unary_unary(f"/{SERVICE}/{method}"), time.monotonic() + deadline_s
    why = ""
    while True:
        left = max(ends - time.monotonic(), 0)
        try:  # at first without waiting, which tells why there is no connection
            reply = await call(to_json(dict(request)), timeout=left, wait_for_ready=bool(why))
            break
        except grpc.aio.AioRpcError as error:
            raise_refusal(error)
            details = error.details() or error.code().name.lower()
            if not why and details.startswith(("failed to connect", "DNS resolution failed")):  # nothing was sent
                why = details
                continue
            raise TransportError(
                "transport.unreachable", f"the coordinator cannot be reached ({why or details})",
                remedy="check address, firewall and clock, and that `atoll coordinator up` is running",
            ) from None  # fmt: skip
    content = parse_json(reply)
    if not isinstance(content, dict):
        raise ProtocolError("enrol.malformed", "the coordinator's answer is not a JSON object")
    return content
