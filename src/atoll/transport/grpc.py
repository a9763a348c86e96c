"""grpc: one outbound, bidirectional stream per site, mutual TLS, chunked with flow control.

Parties: the coordinator listens, sites connect; no site ever listens. Two ports: the
stream's, which demands a client certificate of the federation's CA, and the enrolment
port, which a site reaches before it has one and whose certificate it checks against the
CA in its join token. Who a site is comes from its certificate alone. Messages are bytes
of :mod:`atoll.contract.wire` in the frames of :mod:`atoll.transport.link`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from atoll.contract.errors import AtollError, IntegrityError, ProtocolError, TransportError
from atoll.contract.wire import HEADER_LIMIT_BYTES, Head, Json, Message, parse_json, to_json
from atoll.transport.base import Endpoint, HeadCheck, Patience, Progress, Traffic, broken
from atoll.transport.link import Link, frame_id
from atoll.transport.spool import Incoming

log = logging.getLogger("atoll.transport")
SERVICE = "atoll.Federation"
RENEWAL_PAUSE_S = 0.1
"""For TLS handshakes that began under the server's old certificate."""
OPTIONS = [
    ("grpc.max_receive_message_length", HEADER_LIMIT_BYTES + (2 << 20)),
    ("grpc.max_send_message_length", HEADER_LIMIT_BYTES + (2 << 20)),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 60_000),  # a ping waits behind all that a slow link holds
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
]
TELL_S = 1.0
"""How often at most a site tells that more of a task is here."""
Unary = Callable[[str, Mapping[str, Json]], Mapping[str, Json]]
"""Answers a unary call: (site, or "" before it has a certificate; request) → response; raises AtollError."""

Renew = Callable[[grpc.aio.Channel], Awaitable[bool]]
"""Renews a site's certificate over a channel if it is time; True if it was."""


def join_address(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _until_either(*work: Awaitable[None]) -> None:
    """Run all until the first ends, cancel the others, and raise what the first raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(link: Link, write: Callable[[bytes], Awaitable[None]]) -> None:
    while True:
        await write(await link.next_frame())


# ---------------------------------------------------------------- coordinator


class _Pending:
    """A request that waits for its reply."""

    def __init__(self, check: HeadCheck, progress: Progress | None, patience: Patience, run: str) -> None:
        self.check, self.progress, self.patience, self.run = check, progress, patience, run
        self.future: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()


class _Connection:
    """One stream of a site, while it lasts."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self._leave: asyncio.Future[AtollError | None] = asyncio.get_running_loop().create_future()

    def leave(self, why: AtollError | None = None) -> None:
        """End it; the site is told why, and ends too if there is a reason."""
        if not self._leave.done():
            self._leave.set_result(why)

    async def left(self) -> None:
        """Return, or raise the reason, once it was told to end."""
        if why := await asyncio.shield(self._leave):
            raise why


class _SiteLink:
    """The coordinator's end of one site's link."""

    def __init__(self, spool_dir: Path | None, traffic: dict[str, Traffic]) -> None:
        self.pending: dict[bytes, _Pending] = {}
        self.link = Link(self, spool_dir)
        self.connection: _Connection | None = None
        self._traffic = traffic

    def ended(self, connection: _Connection) -> None:
        """A connection is over; if it was the newest, the site is away."""
        connection.gone.set()
        if self.connection is connection:
            self.connection = None

    def accept(self, head: Head) -> None:
        waiting = self.pending.get(frame_id(str(head.meta.get("re"))))
        if waiting is None or waiting.future.done():
            raise ProtocolError("link.unasked", "a reply to no open request")
        waiting.check(head)

    def arrived(self, incoming: Incoming) -> None:
        frame = frame_id(str(incoming.meta["re"]))
        self.link.acknowledge(frame)
        waiting = self.pending.get(frame)
        if waiting is None or waiting.future.done():
            incoming.close()
            return
        self._traffic[waiting.run].from_sites_bytes += incoming.head.total_bytes
        waiting.future.set_result(incoming)

    def refused(self, head: Head, error: AtollError) -> None:
        frame = frame_id(str(head.meta.get("re")))
        self.link.acknowledge(frame)
        waiting = self.pending.get(frame)
        if waiting is not None and not waiting.future.done():
            self._traffic[waiting.run].from_sites_bytes += head.total_bytes
            waiting.future.set_exception(error)

    def heard(self, frame: bytes, note: dict[str, Json] | None) -> None:
        waiting = self.pending.get(frame)
        if waiting is not None:
            waiting.patience.heard()
            if note is not None and waiting.progress is not None:
                waiting.progress(note)

    def acknowledged(self, frame: bytes) -> None:
        raise ProtocolError("link.frame", "sites do not acknowledge requests")


class GrpcTransport:
    """The coordinator's side: a server that sites connect to."""

    name = "grpc"

    def __init__(
        self,
        authorise: Callable[[bytes], str],
        *,
        enrol: Unary,
        renew: Unary,
        on_connect: Callable[[str], None] = lambda _: None,
        spool_dir: Path | None = None,
    ) -> None:
        """authorise: site name of a client certificate (PEM) that the TLS layer already verified;
        raises IntegrityError for revoked or foreign ones. enrol, renew: answer the unary calls."""
        self._authorise, self._enrol, self._renew, self._on_connect = authorise, enrol, renew, on_connect
        self._spool_dir = spool_dir
        self._links: dict[str, _SiteLink] = {}
        self._servers: list[grpc.aio.Server] = []
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)

    async def start(
        self, host: str, port: int, enrol_port: int, ca_pem: bytes, server_pair: Callable[[], tuple[bytes, bytes]]
    ) -> tuple[int, int]:
        """Listen; returns the two ports (0 chooses free ones). server_pair: the current TLS (key,
        certificate), asked for at every handshake, so that it can be renewed while running."""
        handlers = {
            "Connect": grpc.stream_stream_rpc_method_handler(self._connect),
            "Renew": grpc.unary_unary_rpc_method_handler(self._unary(self._renew, known=True)),
        }
        enrolment = {"Enrol": grpc.unary_unary_rpc_method_handler(self._unary(self._enrol, known=False))}
        ports = []
        for methods, wanted, mutual in ((handlers, port, True), (enrolment, enrol_port, False)):
            server = grpc.aio.server(options=OPTIONS)
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
            first, renewed = _configuration(server_pair, ca_pem if mutual else None)
            credentials = grpc.dynamic_ssl_server_credentials(first, renewed, require_client_authentication=mutual)
            try:
                bound = server.add_secure_port(join_address(host, wanted), credentials)
            except RuntimeError:
                bound = 0
            if not bound:
                raise TransportError(
                    "transport.port", f"cannot listen on {host}:{wanted}", field="listen", remedy="choose a free port"
                )
            await server.start()
            self._servers.append(server)
            ports.append(bound)
        return ports[0], ports[1]

    async def stop(self) -> None:
        """Close all connections and stop listening."""
        for site in list(self._links):
            self.disconnect(site)
        await asyncio.gather(*(server.stop(0.2) for server in self._servers))

    def disconnect(self, site: str) -> None:
        """Close a site's connection now (it may try to come back)."""
        link = self._links.get(site)
        if link is not None and link.connection is not None:
            link.connection.leave()

    def sites(self) -> Mapping[str, int]:
        """Connected sites, with the number of their connection."""
        return {name: end.link.generation for name, end in self._links.items() if end.connection is not None}

    def _end(self, site: str) -> _SiteLink:
        return self._links.setdefault(site, _SiteLink(self._spool_dir, self.traffic))

    async def request(
        self, site: str, message: Message, deadline_s: float, check: HeadCheck, progress: Progress | None = None
    ) -> Incoming:
        """See :class:`atoll.transport.base.Transport`."""
        end, name = self._end(site), str(message.meta["id"])
        run = str(message.meta.get("run", ""))
        waiting = _Pending(check, progress, Patience(site, deadline_s), run)
        end.pending[frame_id(name)] = waiting
        try:
            self.traffic[run].to_sites_bytes += end.link.send(name, message)
            return await waiting.patience.wait(waiting.future)
        finally:
            end.link.forget(name)
            end.pending.pop(frame_id(name), None)

    async def _connect(self, requests: AsyncIterator[bytes], context: Any) -> None:
        try:
            site = self._authorise(context.auth_context()["x509_pem_cert"][0])
        except AtollError as error:
            log.warning("a connection was refused: %s", error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, to_json(error.public()).decode())
            return
        end, connection = self._end(site), _Connection()
        previous, end.connection = end.connection, connection
        try:
            if previous is not None:  # the newest connection wins: the older one is a ghost
                why = IntegrityError(
                    "site.elsewhere", "another process connected as this site", field=site,
                    remedy="run each site once; if the other is not yours, have this site revoked and enrol anew",
                )  # fmt: skip
                previous.leave(why)
                await previous.gone.wait()
            await _until_either(self._talk(site, end.link, requests, context), connection.left())
        except (ProtocolError, IntegrityError) as error:
            log.warning("site %s: %s", site, error)
            ours = isinstance(error, IntegrityError)
            status = grpc.StatusCode.PERMISSION_DENIED if ours else grpc.StatusCode.INVALID_ARGUMENT
            end.ended(connection)  # at once: a site that does not read would never be told
            await context.abort(status, to_json(error.public()).decode())
        except (StopAsyncIteration, grpc.aio.AbortError, grpc.aio.UsageError, grpc.aio.InternalError):
            pass
        finally:
            end.ended(connection)

    async def _talk(self, site: str, link: Link, requests: AsyncIterator[bytes], context: Any) -> None:
        await context.write(link.hello([]))
        link.attach(await anext(requests))
        self._on_connect(site)

        async def read() -> None:
            async for frame in requests:
                link.feed(frame)

        await _until_either(read(), _pump(link, context.write))

    def _unary(self, answer: Unary, *, known: bool) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def call(request: bytes, context: Any) -> bytes:
            try:
                site = self._authorise(context.auth_context()["x509_pem_cert"][0]) if known else ""
                content = parse_json(request)
                if not isinstance(content, dict):
                    raise ProtocolError("enrol.malformed", "the request is not a JSON object")
                return to_json(dict(answer(site, content)))
            except AtollError as error:
                log.warning("a request was refused: %s", error)
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, to_json(error.public()).decode())
                raise

        return call


def _configuration(
    server_pair: Callable[[], tuple[bytes, bytes]], client_ca: bytes | None
) -> tuple[Any, Callable[[], Any]]:
    """The TLS configuration to begin with, and the callable asked at every handshake: None while it is the same.

    gRPC frees the old configuration when it gets another one, even if a handshake in another thread has just
    begun with it, and then crashes (grpc/grpc#36693). So it gets another one only for a renewed certificate,
    after a pause that lets handshakes that asked before take hold of the old one.
    """

    def make(pair: tuple[bytes, bytes]) -> Any:
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=client_ca)

    used = server_pair()

    def renewed() -> Any:
        nonlocal used
        if (pair := server_pair()) == used:
            return None
        time.sleep(RENEWAL_PAUSE_S)
        used = pair
        return make(pair)

    return make(used), renewed


# ---------------------------------------------------------------- site


class GrpcSite:
    """A site's side: keeps one connection to the coordinator and answers what comes over it."""

    def __init__(
        self,
        address: str,
        ca_pem: bytes,
        pair: Callable[[], tuple[bytes, bytes]],
        endpoint: Endpoint,
        *,
        max_message_bytes: int,
        on_state: Callable[[str], None] = lambda _: None,
        retry_s: float = 5.0,
        check_s: float = 10.0,
    ) -> None:
        """pair: the current TLS (key, certificate), asked for at every connection. retry_s: longest
        pause between two attempts to connect. check_s: how often the certificate's age is looked at."""
        self._address, self._ca, self._pair, self._endpoint = address, ca_pem, pair, endpoint
        self._limit, self._on_state, self._retry_s, self._check_s = max_message_bytes, on_state, retry_s, check_s
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="request")
        self._busy: set[bytes] = set()
        self._answered: dict[bytes, str] = {}
        self._link: Link | None = None
        self._told: dict[bytes, float] = {}

    async def run(self, renew: Renew | None = None) -> None:
        """Stay connected until cancelled. *renew* may, now and then, renew the certificate over the
        channel and return True to reconnect. Raises IntegrityError when the coordinator refuses this site."""
        self._loop = asyncio.get_running_loop()
        self._link = Link(self)
        wait_s = 0.05
        while True:
            async with _channel(self._address, self._ca, self._pair()) as channel:
                try:
                    await self._stay(channel, self._link, renew)
                    wait_s = 0.05
                except grpc.aio.AioRpcError as error:
                    _raise_refusal(error)
                    log.info("not connected: %s", error.details())
                except ProtocolError as error:
                    log.warning("%s", error)
            self._on_state("disconnected")
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, self._retry_s)

    async def _renewed(self, channel: grpc.aio.Channel, renew: Renew) -> None:
        """Return once the certificate was renewed: the next connection uses the new one."""
        while True:
            try:
                if await renew(channel):
                    return
            except TransportError as error:
                log.warning("the certificate was not renewed: %s", error)
            await asyncio.sleep(self._check_s)

    async def _stay(self, channel: grpc.aio.Channel, link: Link, renew: Renew | None) -> None:
        call = channel.stream_stream(f"/{SERVICE}/Connect")()
        try:
            await call.write(link.hello([*self._busy, *self._answered]))
            first = await call.read()
            if first is grpc.aio.EOF:
                raise ProtocolError("link.no-hello", "the coordinator closed the connection")
            link.attach(first)
            self._on_state("connected")

            async def read() -> None:
                while (frame := await call.read()) is not grpc.aio.EOF:
                    link.feed(frame)

            work = [read(), _pump(link, call.write), *([self._renewed(channel, renew)] if renew else [])]
            await _until_either(*work)
        except asyncio.InvalidStateError:  # writing to a call that just ended: its status says why
            pass
        finally:
            call.cancel()
        if await call.code() not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            raise grpc.aio.AioRpcError(await call.code(), None, None, details=await call.details())

    # -- the link's owner

    def accept(self, head: Head) -> None:
        if head.total_bytes > self._limit:
            raise ProtocolError(
                "site.too-large", "the task is larger than the site's policy allows", field="max_message_bytes",
                remedy="the site's operator decides: policy.yaml, 'max_message_bytes'",
            )  # fmt: skip

    def arrived(self, incoming: Incoming) -> None:
        name = str(incoming.meta.get("id"))
        self._told.pop(frame_id(name), None)
        if frame_id(name) in self._busy or frame_id(name) in self._answered:
            return
        self._busy.add(frame_id(name))
        if incoming.kind == "open":  # it may wait for an operator for days: not in the way of others
            threading.Thread(target=self._work, args=(incoming.message(), name), daemon=True).start()
        else:
            self._loop.run_in_executor(self._pool, self._work, incoming.message(), name)

    def refused(self, head: Head, error: AtollError) -> None:
        self._answer(str(head.meta.get("id")), Message("failure", {"re": head.meta.get("id"), **error.public()}))

    def heard(self, frame: bytes, note: dict[str, Json] | None) -> None:
        """Part of a task is here: tell so now and then, as buffers on the way hide it from the coordinator."""
        now = self._loop.time()
        if frame not in self._answered and now > self._told.get(frame, 0.0) + TELL_S:
            self._told[frame] = now
            self._progress(frame, b"{}")

    def acknowledged(self, frame: bytes) -> None:
        name = self._answered.pop(frame, None)
        if name is not None and self._link is not None:
            self._link.forget(name)

    def _work(self, message: Message, name: str) -> None:
        frame = frame_id(name)

        def tell(note: Mapping[str, Json]) -> None:
            self._loop.call_soon_threadsafe(self._progress, frame, to_json(dict(note)))

        try:
            reply = self._endpoint(message, tell)
        except Exception as error:
            reply = broken(name, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended: the process is going down
            self._loop.call_soon_threadsafe(self._answer, name, reply)

    def _progress(self, frame: bytes, note: bytes) -> None:
        if self._link is not None:
            self._link.control(b"P", frame, note)

    def _answer(self, name: str, reply: Message) -> None:
        frame = frame_id(name)
        self._busy.discard(frame)
        if self._link is not None:
            self._answered[frame] = name
            try:
                self._link.send(name, reply)
            except (AtollError, ValueError, TypeError) as error:  # it cannot be encoded
                self._link.send(name, broken(name, error))


def _channel(address: str, ca_pem: bytes, pair: tuple[bytes, bytes] | None) -> grpc.aio.Channel:
    key, certificate = pair or (None, None)
    credentials = grpc.ssl_channel_credentials(ca_pem, key, certificate)
    return grpc.aio.secure_channel(address, credentials, options=OPTIONS)


def _raise_refusal(error: grpc.aio.AioRpcError) -> None:
    """Raise the AtollError the coordinator refused us with, if that is what it is."""
    details = error.details() or ""
    if error.code() == grpc.StatusCode.PERMISSION_DENIED:
        try:
            record = parse_json(details.encode())
        except ProtocolError:  # of something between us, such as a proxy
            record = None
        if isinstance(record, dict) and "code" in record:
            raise AtollError.from_public(record)
    if "certificate has expired" in details or "certificate is not yet valid" in details:
        raise IntegrityError(
            "tls.clock", "the coordinator's certificate is not valid at this time", remedy="check the clocks of both"
        )
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
    async with _channel(address, ca_pem, pair) as channel:
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
            _raise_refusal(error)
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
