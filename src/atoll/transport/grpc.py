"""grpc: one outbound, bidirectional stream per site, mutual TLS, chunked with flow control.

Parties: the coordinator listens, sites connect; no site ever listens. Two ports: the
stream's, which demands a client certificate of the federation's CA, and the enrolment
port, which a site reaches before it has one and whose certificate it checks against the
CA in its join token. Who a site is comes from its certificate alone. Messages are bytes
of :mod:`atoll.contract.wire` in the frames of :mod:`atoll.transport.link`.

Here is the coordinator's side; a site's is ``grpc_site.py``, and what both have in common ``grpc_channel.py``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from atoll.contract.errors import AtollError, IntegrityError, ProtocolError, TransportError
from atoll.contract.wire import Head, Json, Message, parse_json, to_json
from atoll.transport.base import HeadCheck, Patience, Progress, Traffic
from atoll.transport.grpc_channel import OPTIONS, SERVICE, join_address, pump, until_either
from atoll.transport.link import Link, frame_id
from atoll.transport.spool import Incoming

log = logging.getLogger("atoll.transport")
RENEWAL_PAUSE_S = 0.1
"""For TLS handshakes that began under the server's old certificate."""
Unary = Callable[[str, Mapping[str, Json]], Mapping[str, Json]]
"""Answers a unary call: (site, or "" before it has a certificate; request) → response; raises AtollError."""


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
            await until_either(self._talk(site, end.link, requests, context), connection.left())
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

        await until_either(read(), pump(link, context.write))

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
