"""Round trips: Atoll's gRPC transport beside plain grpcio, memory of a large Sum, and ledgered rounds.

Every site is a process of its own on loopback, over mutual TLS. The peers are measured in
the same run, with the same certificates: a plain grpcio unary call to one site, and plain
grpcio streams that carry the same 100 MB to and from the same sites and copy every chunk
into place.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing as mp
import os
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

import benchmarks.programs  # noqa: F401 (registers)
from atoll.contract.plan import Plan
from atoll.contract.wire import Message
from atoll.crypto import pki
from atoll.crypto.identity import Identity
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.runtime.catalogue import load_installed
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.receipts import Grouping
from atoll.runtime.serve import settle
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.transport.grpc import GrpcTransport
from atoll.transport.grpc_channel import OPTIONS
from atoll.transport.grpc_site import GrpcSite
from atoll.transport.local import LocalTransport
from benchmarks.table import Row, main

SITES = ("a", "b", "c")
PLAN: dict[str, Any] = {
    "name": "benchmark",
    "schema": {"name": "numbers", "columns": {"x": {"range": [0, 1]}}},
    "protection": "plain",
}
spawn = mp.get_context("spawn")


def plan(program: str, **params: Any) -> Plan:
    """A plan of a benchmark program."""
    return Plan.from_json({**PLAN, "program": program, "params": params})


def table(of: Plan) -> SiteData:
    """A site's table; no benchmark reads it."""
    return SiteData.of(Table(of.table, {"x": np.zeros(8)}), of, "site")


def pair_for(ca: pki.CertificateAuthority, site: str) -> tuple[bytes, bytes]:
    """A site's TLS key and certificate."""
    key = pki.new_key()
    return pki.key_pem(key), ca.issue_site(pki.make_csr(key, site), site)


# ---------------------------------------------------------------- processes


def _echo(message: Message, _: object) -> Message:
    return Message("release", {"re": message.meta["id"]}, dict(message.arrays))


def _site_process(address: str, ca: bytes, pair: tuple[bytes, bytes], folder: str, name: str, keys: Any) -> None:
    """One site: echoes kind "echo", and answers runs as a real site does."""
    load_installed()
    settle()
    identity = Identity.load(name, Path(folder) / f"{name}.key")
    journal = Journal(Path(folder) / f"{name}.db", name, identity.public, identity.sign)
    site = Site(identity, journal, Policy.sandbox(), table, keys)

    def endpoint(message: Message, progress: Callable[[Any], None]) -> Message:
        return _echo(message, progress) if message.kind == "echo" else site.handle(message, progress)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(GrpcSite(address, ca, lambda: pair, endpoint, max_message_bytes=2 << 30).run())


def _plain_process(ca: bytes, pair: tuple[bytes, bytes], told: Connection) -> None:
    """The peer: a plain grpcio server with a unary echo and a stream that copies chunks into place."""

    async def unary(request: bytes, _: Any) -> bytes:
        return request

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        size = int.from_bytes(await anext(requests), "little")
        memory, done = bytearray(size), 0
        async for chunk in requests:
            memory[done : done + len(chunk)] = chunk
            done += len(chunk)
        view = memoryview(memory)
        for start in range(0, size, 1 << 20):
            await context.write(bytes(view[start : start + (1 << 20)]))

    async def serve() -> None:
        server = grpc.aio.server(options=OPTIONS)
        methods = {
            "U": grpc.unary_unary_rpc_method_handler(unary),
            "S": grpc.stream_stream_rpc_method_handler(stream),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("plain", methods),))
        credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=True)
        told.send(server.add_secure_port("127.0.0.1:0", credentials))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


@contextlib.contextmanager
def started(*processes: Any) -> Iterator[None]:
    """Processes that run while the block does."""
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(10)


class Federation:
    """A coordinator in this process and three sites in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ca = folder, pki.CertificateAuthority.create("benchmark")
        self.store = RunStore(f"sqlite:///{folder / 'store.db'}")
        self.identity = Identity.generate("coordinator")
        for number, site in enumerate(SITES):
            own = Identity.generate(site)
            own.save(folder / f"{site}.key")
            self.store.invite(site, f"{number:064x}", 2**31 - 1)
            self.store.enrol(site, f"{number:064x}", own.public.hex(), "")
        self.transport = GrpcTransport(
            lambda pem: pki.read_site_certificate(pem, self.ca)[0],
            enrol=lambda _, __: {}, renew=lambda _, __: {}, spool_dir=folder,
        )  # fmt: skip
        ledger = self.store.ledger(self.identity.public, self.identity.sign)
        self.coordinator = Coordinator(self.transport, self.store, ledger)

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """Sites are connected while the block runs."""
        server = self.ca.issue_server(["127.0.0.1"])
        port, _ = await self.transport.start("127.0.0.1", 0, 0, self.ca.pem, lambda: server)
        processes = [
            spawn.Process(
                target=_site_process,
                args=(f"127.0.0.1:{port}", self.ca.pem, pair_for(self.ca, site), str(self.folder), site,
                      self.identity.public),
            )
            for site in SITES
        ]  # fmt: skip
        with started(*processes):
            while len(self.transport.sites()) < len(SITES):
                await asyncio.sleep(0.01)
            yield
            await self.transport.stop()

    async def echo(self, array: np.ndarray[Any, Any], name: str) -> float:
        """Seconds for one round trip of *array* to all sites at once."""
        began = time.perf_counter()
        replies = await asyncio.gather(
            *(
                self.transport.request(
                    site, Message("echo", {"id": f"{name}/{site}", "run": ""}, {"x": array}), 120, lambda _: None
                )
                for site in SITES
            )
        )
        took = time.perf_counter() - began
        for reply in replies:
            reply.close()
        return took

    async def rounds(self, of: Plan) -> list[float]:
        """Seconds of every round of a run, ledger, journal and store included."""
        run = self.store.create_run(of, SITES)
        await self.coordinator.run(run)
        return [row["seconds"] for row in self.store.rounds(run)]


async def plain_round_trips(federation: Federation, size: int, small: int, large: int) -> tuple[float, float]:
    """(median seconds of a 1 KB unary call to one peer, of *size* bytes to and from three at once)."""
    ca = federation.ca
    pipes = [spawn.Pipe() for _ in SITES]
    server = ca.issue_server(["127.0.0.1"])
    processes = [spawn.Process(target=_plain_process, args=(ca.pem, server, pipe[1])) for pipe in pipes]
    with started(*processes):
        ports = [await asyncio.to_thread(pipe[0].recv) for pipe in pipes]
        channels = []
        for site, port in zip(SITES, ports, strict=True):
            credentials = grpc.ssl_channel_credentials(ca.pem, *pair_for(ca, site))
            channels.append(grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=OPTIONS))
        unary, one = channels[0].unary_unary("/plain/U"), os.urandom(1024)
        times = []
        for _ in range(small):
            began = time.perf_counter()
            await unary(one)
            times.append(time.perf_counter() - began)
        payload = memoryview(np.ones(size // 8).tobytes())

        async def stream(channel: grpc.aio.Channel) -> None:
            call = channel.stream_stream("/plain/S")()
            await call.write(size.to_bytes(8, "little"))
            for start in range(0, size, 1 << 20):
                await call.write(bytes(payload[start : start + (1 << 20)]))
            await call.done_writing()
            memory, done = bytearray(size), 0
            while (chunk := await call.read()) is not grpc.aio.EOF:
                memory[done : done + len(chunk)] = chunk
                done += len(chunk)

        bulk = []
        for _ in range(large):
            began = time.perf_counter()
            await asyncio.gather(*(stream(channel) for channel in channels))
            bulk.append(time.perf_counter() - began)
        for channel in channels:
            await channel.close()
    return statistics.median(times[small // 5 :]), statistics.median(bulk)


class PeakMemory:
    """The most memory this process holds while the block runs, sampled every 2 ms; MB above its start."""

    def __enter__(self) -> PeakMemory:
        self._page, self.above_mb, self._stop = os.sysconf("SC_PAGE_SIZE"), 0.0, threading.Event()
        self._start = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * self._page

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.above_mb = max(self.above_mb, (self._now() - self._start) / 1e6)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


async def over_grpc(quick: bool) -> list[Row]:
    """Everything that needs site processes."""
    size, repeats = 100_000_000, 3 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder))
        unary, bulk = await plain_round_trips(federation, size, 300, repeats)
        async with federation.up():
            small = [await federation.echo(np.zeros(128), f"small {i}") for i in range(300)]
            large = [await federation.echo(np.ones(size // 8), f"large {i}") for i in range(repeats)]
            rounds = await federation.rounds(plan("bench.noop", rounds=100))
            with PeakMemory() as memory:
                vector = await federation.rounds(plan("bench.vector", size=size // 8))
    one, many = statistics.median(small[60:]), statistics.median(large)
    return [
        Row("1 KB to 3 sites and back", one * 1e3, "ms", unary * 1e3, None, "peer: plain grpcio unary call"),
        Row("1 KB, ratio", one / unary, "×", None, 4.0, "NVIDIA FLARE: 50 ms, Flower: 6.1 s"),
        Row("100 MB to 3 sites and back", many, "s", bulk, None, "peer: plain grpcio streams to the same sites"),
        Row("100 MB, ratio", many / bulk, "×", None, 3.0, "NVIDIA FLARE: 2.2 s, Flower: 9.3 s"),
        Row("ledgered round, 3 sites", statistics.median(rounds) * 1e3, "ms", None, 10.0, "journals and store on disk"),
        Row("Sum of 100 MB from 3 sites", vector[0], "s", None, None, "verified, spooled, added, stored"),
        Row("its peak memory above idle", memory.above_mb, "MB", None, 250.0, "the coordinator's process"),
    ]


def in_process(grouping: Grouping, num_sites: int, num_rounds: int) -> float:
    """Milliseconds a site-task of a no-op round over the local transport, ledgers included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = RunStore(f"sqlite:///{folder / 'store.db'}", durable=False)
        identity = Identity.generate("coordinator")
        journals, endpoints = [], {}
        for number in range(num_sites):
            own = Identity.generate(f"site-{number}")
            store.invite(own.name, f"{number:064x}", 2**31 - 1)
            store.enrol(own.name, f"{number:064x}", own.public.hex(), "")
            journals.append(Journal(folder / f"{number}.db", own.name, own.public, own.sign, temporary=True))
            endpoints[own.name] = Site(own, journals[-1], Policy.sandbox(), table, identity.public).handle
        transport = LocalTransport(endpoints)
        ledger = store.ledger(identity.public, identity.sign)
        coordinator = Coordinator(transport, store, ledger, receipts=grouping)
        run = store.create_run(plan("bench.noop", rounds=num_rounds), tuple(endpoints))
        asyncio.run(coordinator.run(run))
        seconds = [row["seconds"] for row in store.rounds(run)]
        transport.close()
        store.close()
        for journal in journals:
            journal.close()
    return float(statistics.median(seconds)) / num_sites * 1e3


def measure(quick: bool) -> list[Row]:
    """All rows."""
    load_installed()
    settle()
    rounds = 20 if quick else 60
    rows = [
        Row("no-op round of 50 local sites, a site-task", in_process("round", 50, rounds), "ms", 4.1, 0.4,
            "one coordinator's signature a round; peer: Flower's simulation, published"),
        Row("the same, one signature each", in_process("each", 50, rounds), "ms", 4.1, 1.0),
    ]  # fmt: skip
    return rows + asyncio.run(over_grpc(quick))


if __name__ == "__main__":
    main("round_trip", ["atoll", "grpcio", "cryptography", "numpy", "SQLAlchemy"], measure)
