"""Real transports to test: a coordinator that listens on loopback with its own CA, sites that connect
to it in the same event loop, and a TCP proxy between them that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import importlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from atoll.contract.errors import AtollError, IntegrityError
from atoll.contract.wire import Head, Json, Message
from atoll.crypto import pki
from atoll.runtime.home import CoordinatorConfig, CoordinatorHome, SiteHome
from atoll.runtime.policy import Policy
from atoll.transport.base import Endpoint, Progress
from atoll.transport.grpc import GrpcTransport
from atoll.transport.grpc_channel import on_channel
from atoll.transport.grpc_site import GrpcSite
from atoll.transport.local import LocalTransport
from atoll.transport.ray import QUIET, RayTransport

PATIENCE_S = 120.0
Pair = tuple[bytes, bytes]


async def until(ready: Callable[[], Any], what: str = "") -> None:
    """Wait until *ready*; fails when it does not happen."""
    end = asyncio.get_running_loop().time() + PATIENCE_S
    while not ready():
        assert asyncio.get_running_loop().time() < end, f"never happened: {what or ready}"
        await asyncio.sleep(0.005)


def echo(message: Message, progress: Progress) -> Message:
    """An endpoint that answers with what it was sent."""
    return Message("echo", {"re": message.meta["id"], "sent": message.meta}, message.arrays)


def anything(head: Head) -> None:
    """A check that lets every reply pass but failures."""
    if head.kind == "failure":
        raise AtollError.from_public(head.meta)


class Net:
    """A coordinator on loopback, and the sites that the tests let join."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, "127.0.0.1"
        self.ca = pki.CertificateAuthority.create("test")
        self.refused: set[str] = set()
        self.connected: list[str] = []
        self.sites: list[tuple[str, asyncio.Task[None]]] = []
        self.states: dict[str, list[str]] = {}
        self.transport: GrpcTransport = None  # type: ignore[assignment]

    def authorise(self, pem: bytes) -> str:
        """The site of a certificate, unless the tests refuse it."""
        site, _ = pki.read_site_certificate(pem, self.ca)
        if site in self.refused:
            raise IntegrityError("certificate.revoked", "revoked", field=site, remedy="ask for an invitation")
        return site

    async def start(
        self, server_pair: Callable[[], Pair] | None = None, *, spool: bool = True, renew: Any = None, enrol: Any = None
    ) -> Net:
        """Listen on free ports."""
        own = self.ca.issue_server(["127.0.0.1", "localhost"])

        def refuse(site: str, request: Mapping[str, Json]) -> Mapping[str, Json]:
            raise IntegrityError("test.refused", "not in this test")

        self.transport = GrpcTransport(
            self.authorise, enrol=enrol or refuse, renew=renew or refuse, on_connect=self.connected.append,
            spool_dir=self.folder if spool else None,
        )  # fmt: skip
        self.port, self.enrol_port = await self.transport.start(
            self.host, 0, 0, self.ca.pem, server_pair or (lambda: own)
        )
        self.address = f"127.0.0.1:{self.port}"
        return self

    def pair(self, site: str, lifetime: dt.timedelta = pki.SITE_LIFETIME, ca: Any = None) -> Pair:
        """A TLS key and certificate for *site*."""
        key = pki.new_key()
        return pki.key_pem(key), (ca or self.ca).issue_site(pki.make_csr(key, site), site, lifetime)

    def join(
        self,
        site: str,
        endpoint: Endpoint = echo,
        *,
        pair: Pair | Callable[[], Pair] | None = None,
        address: str = "",
        ca_pem: bytes = b"",
        renew: Any = None,
        **settings: Any,
    ) -> asyncio.Task[None]:
        """Start a site; its states are told in ``states[site]``."""
        found = pair or self.pair(site)
        states = self.states.setdefault(site, [])
        link = GrpcSite(
            address or self.address, ca_pem or self.ca.pem, found if callable(found) else lambda: found, endpoint,
            on_state=states.append, **{"max_message_bytes": 1 << 30, "retry_s": 0.2, **settings},
        )  # fmt: skip
        task = asyncio.create_task(link.run(renew))
        self.sites.append((site, task))
        return task

    async def up(self, *sites: str) -> None:
        """Wait until the sites are connected, and fail if one of them has ended instead."""

        def ready() -> bool:
            for _, task in self.sites:
                if task.done() and not task.cancelled():
                    task.result()
            return self.transport.sites().keys() >= set(sites) and set(sites) <= set(self.connected)

        await until(ready, f"{sites} connect")

    async def ask(
        self, site: str, name: str, arrays: Mapping[str, Any] | None = None, deadline_s: float = PATIENCE_S
    ) -> Any:
        """One request; its reply as a message."""
        message = Message("task", {"id": name, "run": "r"}, dict(arrays or {}))
        incoming = await self.transport.request(site, message, deadline_s, anything)
        try:
            return incoming.message()
        finally:
            incoming.close()

    async def close(self) -> None:
        """End all sites, then the coordinator."""
        for _, task in self.sites:
            task.cancel()
        await asyncio.gather(*(task for _, task in self.sites), return_exceptions=True)
        if self.transport is not None:
            await self.transport.stop()

    until = staticmethod(until)
    echo = staticmethod(echo)
    anything = staticmethod(anything)


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    """A coordinator that is not listening yet: ``await net.start()``."""
    made = Net(tmp_path)
    yield made
    await made.close()


class Headquarters(Net):
    """A coordinator with its home and its store: sites enrol, renew and are revoked for real.

    skew: how far the coordinator's clock is ahead while it issues certificates.
    """

    def __init__(self, folder: Path, skew: dt.timedelta = dt.timedelta(0), **config: Any) -> None:
        super().__init__(folder)
        self.skew = skew
        with self.clock():
            self.home = CoordinatorHome.create(
                folder / "coordinator", CoordinatorConfig(port=0, enrol_port=0, **config)
            )  # fmt: skip
            self.home.server_pair()
        self.ca, self.store = self.home.ca, self.home.store()

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """What the coordinator's clock shows, in this block."""
        real = pki.now
        pki.now = lambda: real() + self.skew  # type: ignore[assignment]
        try:
            yield
        finally:
            pki.now = real  # type: ignore[assignment]

    def authorise(self, pem: bytes) -> str:
        return self.home.authorise(self.store, pem)

    async def listen(self) -> Headquarters:
        """Listen, and write the ports down as ``atoll coordinator up`` does."""

        def enrol(_: str, request: Mapping[str, Json]) -> Mapping[str, Json]:
            with self.clock():
                return self.home.enrol(self.store, request)

        def renew(site: str, request: Mapping[str, Json]) -> Mapping[str, Json]:
            with self.clock():
                return self.home.renew(self.store, site, request)

        await self.start(self.home.server_pair, enrol=enrol, renew=renew)
        self.home.listen_on(self.port, self.enrol_port)
        return self

    def invite(self, site: str, lifetime: dt.timedelta = dt.timedelta(hours=3)) -> str:
        """A join token, as one line."""
        with self.clock():
            return self.home.invite(self.store, site, lifetime).encode()

    async def enrol(self, site: str, folder: str = "") -> SiteHome:
        """A site's home, set up with a token."""
        return await SiteHome.create(self.folder / (folder or site), self.invite(site), {}, Policy.sandbox())

    def up_site(self, home: SiteHome, endpoint: Endpoint = echo, *, renew: Any = None) -> asyncio.Task[None]:
        """Start a site from its folder, as ``atoll site up`` does."""

        async def usual(channel: Any) -> bool:
            return await home.renew(lambda request: on_channel(channel, "Renew", request))

        return self.join(
            home.config.name, endpoint, pair=home.pair, address=home.config.address, ca_pem=home.ca_pem,
            renew=renew or usual, check_s=0.02,
        )  # fmt: skip

    async def close(self) -> None:
        await super().close()
        self.store.close()


@pytest.fixture
async def headquarters(tmp_path: Path) -> AsyncIterator[Callable[..., Headquarters]]:
    """Makes coordinators with homes: ``await headquarters(certificate_days=…).listen()``."""
    made: list[Headquarters] = []

    def make(**settings: Any) -> Headquarters:
        made.append(Headquarters(tmp_path / f"federation {len(made)}", **settings))
        return made[-1]

    yield make
    for one in made:
        await one.close()


class Proxy:
    """A TCP proxy on loopback. ``sent`` and ``received`` count bytes from and to whoever connects to it."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.sent = self.received = self.connections = 0
        self.cut_after: tuple[str, int] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        self.connections += 1
        host, port = self.target.rsplit(":", 1)
        try:
            onward, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        ends = {writer, back}
        self._writers |= ends
        try:
            await asyncio.gather(self._copy(reader, back, "sent"), self._copy(onward, writer, "received"))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for end in ends:
                end.transport.abort()
            self._writers -= ends

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counter: str) -> None:
        while data := await reader.read(1 << 16):
            setattr(self, counter, getattr(self, counter) + len(data))
            if (
                self.cut_after is not None
                and self.cut_after[0] == counter
                and getattr(self, counter) > self.cut_after[1]
            ):
                self.cut_after = None
                self.cut()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # one side has ended: so does the other

    def cut(self) -> None:
        """Break all connections, without goodbye."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def proxies() -> AsyncIterator[Callable[[str], Awaitable[Proxy]]]:
    """Makes proxies to an address."""
    made: list[Proxy] = []

    async def make(target: str) -> Proxy:
        made.append(await Proxy(target).start())
        return made[-1]

    yield make
    for proxy in made:
        await proxy.close()


# ---------------------------------------------------------------- the contract suite's transports


class Federated:
    """One transport under test with connected sites."""

    def __init__(self, kind: str, net: Net) -> None:
        self.kind, self.net = kind, net
        self.local: LocalTransport | None = None
        self.ray: RayTransport | None = None
        self.relay: Any = None

    async def connect(self, endpoints: Mapping[str, Endpoint]) -> Any:
        """A transport on which *endpoints* can be reached."""
        if self.kind == "local":
            self.local = LocalTransport(endpoints, threads=16)
            return self.local
        if self.kind == "ray":
            self.relay = importlib.import_module("ray_relay").Relay(endpoints)
            settings = dict.fromkeys(endpoints, self.relay.settings)
            self.ray = RayTransport("ray_relay:make", settings, threads=16)
            return self.ray
        await self.net.start()
        for name, endpoint in endpoints.items():
            self.net.join(name, endpoint)
        await self.net.up(*endpoints)
        return self.net.transport

    until = staticmethod(until)
    echo = staticmethod(echo)
    anything = staticmethod(anything)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of this machine, whose workers find this folder's modules, as this process does."""
    ray, here = pytest.importorskip("ray"), str(Path(__file__).parent)
    os.environ.update(QUIET)
    sys.path.append(here)
    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, num_cpus=2,
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )  # fmt: skip
    yield
    ray.shutdown()
    sys.path.remove(here)


@pytest.fixture(params=["local", "grpc", pytest.param("ray", marks=pytest.mark.slow)])
async def federated(request: pytest.FixtureRequest, net: Net) -> AsyncIterator[Federated]:
    """Each transport in turn: ``await federated.connect({site: endpoint})``."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    made = Federated(request.param, net)
    yield made
    with contextlib.ExitStack() as stack:
        if made.local is not None:
            stack.callback(made.local.close)
        if made.ray is not None:
            stack.callback(made.ray.close)
        if made.relay is not None:
            stack.callback(made.relay.close)
