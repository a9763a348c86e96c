"""ray: sites in actors of a Ray cluster, several in each, for simulations that one machine is too small for (extra
``ray``).

Between the driver and the actors travel bytes: messages in Atoll's own codec, and JSON. An actor makes its sites from
JSON by a function that is installed there and that the driver names ("module:function"). An actor that dies is started
again by Ray; a request that was under way is asked once more, and is lost after that. Everybody who can reach the
cluster can run code on it: its sites are simulated ones, on machines of one owner.

Sources: Moritz et al. 2018, Ray: A Distributed Framework for Emerging AI Applications (OSDI).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import queue
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from atoll.contract.errors import PlanError, ProtocolError, TransportError
from atoll.contract.wire import Json, Message, decode, encode, encode_bytes, parse_json, read_head, to_json
from atoll.transport.base import HeadCheck, Patience, Progress, Traffic, broken
from atoll.transport.spool import Incoming

AT_ONCE_BYTES = 1 << 20
"""Bodies of replies up to this come with their header; larger ones wait at the actor until the header was checked."""
PIECE_BYTES = 4 << 20
RESTARTS = 100
NOTE, HEAD, BODY = b"n", b"h", b"b"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No usage statistics leave, whatever the machine's settings are."""


class Resident(Protocol):
    """A site in an actor. about: what the driver is told of it at its start."""

    about: Json

    def handle(self, message: Message, progress: Progress) -> Message:
        """See :data:`atoll.transport.base.Endpoint`."""

    def leave(self) -> bytes:
        """The end: what the driver is to keep, such as the exported ledger."""


def _ray() -> Any:
    """The package; raises PlanError without the extra."""
    os.environ.update(QUIET)
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError:
        raise PlanError(
            "transport.no-ray", "the transport needs Ray, which is not installed here", field="transport",
            remedy='pip install "atoll[ray]"',
        ) from None  # fmt: skip


class House:
    """What an actor is: several sites in one process."""

    def __init__(self, maker: str, settings: bytes) -> None:
        """maker: "module:function", given a site's name and its settings."""
        module, _, name = maker.partition(":")
        make = getattr(importlib.import_module(module), name)
        self._sites: dict[str, Resident] = {site: make(site, own) for site, own in parse_json(settings).items()}
        self._held: dict[str, list[bytes | memoryview]] = {}

    def about(self) -> bytes:
        """What the sites tell of themselves, as JSON by site."""
        return to_json({site: one.about for site, one in self._sites.items()})

    def ask(self, site: str, key: str, request: bytes) -> Iterator[bytes]:
        """Notes of progress, then the reply's header, and its body if it is small; a large one is kept as *key*."""
        told: queue.SimpleQueue[bytes | list[bytes | memoryview]] = queue.SimpleQueue()

        def work() -> None:
            message = decode(request)
            try:
                told.put(encode(self._sites[site].handle(message, lambda note: told.put(NOTE + to_json(dict(note))))))
            except Exception as error:
                told.put(encode(broken(message.meta["id"], error)))

        threading.Thread(target=work, daemon=True).start()
        while isinstance(found := told.get(), bytes):
            yield found
        head, *parts = found
        if sum(len(part) for part in parts) <= AT_ONCE_BYTES:
            yield HEAD + bytes(head)
            yield BODY + b"".join(parts)
        else:
            self._held[key] = parts
            yield HEAD + bytes(head)

    def body(self, key: str) -> Iterator[bytes]:
        """What :meth:`ask` kept, in pieces."""
        for part in self._held.pop(key):
            for start in range(0, len(part), PIECE_BYTES):
                yield bytes(part[start : start + PIECE_BYTES])

    def drop(self, key: str) -> None:
        """Nobody wants what :meth:`ask` kept."""
        self._held.pop(key, None)

    def leave(self) -> dict[str, bytes]:
        """The end of all sites."""
        return {site: one.leave() for site, one in self._sites.items()}


@dataclass(slots=True)
class _Known:
    """An actor as the driver knows it. number: how often it was started; coming: the wait for its next start."""

    actor: Any
    sites: tuple[str, ...]
    number: int = 1
    coming: asyncio.Future[None] | None = None


class RayTransport:
    """Sites in actors of a Ray cluster."""

    name = "ray"

    def __init__(
        self, maker: str, settings: Mapping[str, Json], *, address: str | None = None, actors: int | None = None,
        threads: int = 4, restarts: int = RESTARTS,
    ) -> None:  # fmt: skip
        """settings: by site, what *maker* makes it from. address: of a running cluster; None: one on this machine, for
        as long as this object lives. actors: how many the sites are dealt to (default: one a CPU). threads: requests
        that an actor answers at the same time. Raises PlanError without the extra, TransportError without a cluster."""
        self._ray, self._own = _ray(), False
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)
        self._asked, self._tasks = 0, set[asyncio.Future[Any]]()
        self._join(address)
        names, cpus = list(settings), max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        number = max(1, min(actors or cpus, len(names)))
        make = self._ray.remote(House).options(
            max_restarts=restarts, max_concurrency=threads, num_cpus=1 if number <= cpus else 0
        )
        self._known = []
        for start in range(number):
            some = tuple(names[start::number])
            self._known.append(_Known(make.remote(maker, to_json({name: settings[name] for name in some})), some))
        self._home = {site: known for known in self._known for site in known.sites}
        self.about: dict[str, Json] = {}
        """What the sites told of themselves when they were made, by name."""
        try:
            for told in self._ray.get([known.actor.about.remote() for known in self._known]):
                self.about |= parse_json(told)
        except self._ray.exceptions.RayError as error:
            self.close()
            raise _lost(type(error).__name__) from error

    def _join(self, address: str | None) -> None:
        if self._ray.is_initialized():
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": logging.WARNING}
        try:
            if address is None:
                self._ray.init(address="local", include_dashboard=False, **quiet)
            else:
                self._ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise TransportError(
                "transport.no-cluster", "there is no Ray cluster to be reached", field="address",
                remedy="check the address (ray status), and that Ray has one version everywhere",
            ) from error  # fmt: skip
        self._own = True

    def sites(self) -> Mapping[str, int]:
        """Those whose actor is there, with how often it was started."""
        return {site: known.number for site, known in self._home.items() if known.coming is None}

    async def request(
        self, site: str, message: Message, deadline_s: float, check: HeadCheck, progress: Progress | None = None
    ) -> Incoming:
        """See :class:`atoll.transport.base.Transport`. Raises TransportError "transport.actor-lost" if the site's actor
        dies twice over it, or does not start again."""
        if site not in self._home:
            raise TransportError("transport.unknown-site", f"there is no site {site!r}", field=site)
        patience, data = Patience(site, deadline_s), encode_bytes(message)
        traffic = self.traffic[str(message.meta.get("run", ""))]
        found: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        work = self._start(self._exchange(site, data, patience, check, progress, traffic))

        def done(_: asyncio.Future[Any]) -> None:
            if found.done() or work.cancelled():
                found.cancel()
            elif (error := work.exception()) is not None:
                found.set_exception(error)
            else:
                found.set_result(work.result())

        work.add_done_callback(done)
        try:
            return await patience.wait(found)
        finally:
            work.cancel()

    def _start(self, work: Any) -> asyncio.Future[Any]:
        task: asyncio.Future[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _exchange(
        self, site: str, data: bytes, patience: Patience, check: HeadCheck, progress: Progress | None, traffic: Traffic
    ) -> Incoming:
        """Ask; once more, if the actor dies over it: sites answer a repeated request as they did before."""
        known = self._home[site]
        traffic.to_sites_bytes += len(data)
        for again in (True, False):
            if known.coming is not None:
                await asyncio.shield(known.coming)
            try:
                return await self._asked_once(known, site, data, patience, check, progress, traffic)
            except self._ray.exceptions.RayActorError as error:
                why = type(error).__name__
                self._await_start(known)
                if not again:
                    raise _lost(why, site) from error
            except self._ray.exceptions.RayError as error:
                raise _lost(type(error).__name__, site) from error
        raise _lost("", site)

    async def _asked_once(
        self, known: _Known, site: str, data: bytes, patience: Patience, check: HeadCheck, progress: Progress | None,
        traffic: Traffic,
    ) -> Incoming:  # fmt: skip
        self._asked += 1
        key, incoming, kept = str(self._asked), None, True
        try:
            async for place in known.actor.ask.options(num_returns="streaming").remote(site, key, data):
                item = await place
                patience.heard()
                kind, content = item[:1], memoryview(item)[1:]
                if kind == NOTE and progress is not None:
                    progress(parse_json(bytes(content)))
                elif kind == HEAD:
                    head = read_head(content)
                    traffic.from_sites_bytes += head.total_bytes
                    check(head)
                    incoming = Incoming(head)
                elif kind == BODY and incoming is not None:
                    kept = False
                    incoming.write(content)
            if incoming is None:
                raise ProtocolError("wire.truncated", "a reply has no header")
            if incoming.missing_bytes:
                async for place in known.actor.body.options(num_returns="streaming").remote(key):
                    incoming.write(await place)
                    patience.heard()
                kept = False
            return incoming
        finally:
            if kept:
                known.actor.drop.remote(key)

    def _await_start(self, known: _Known) -> None:
        """Until its actor answers again, the sites of *known* are not there."""
        if known.coming is None:
            known.coming = self._start(self._started(known))

    async def _started(self, known: _Known) -> None:
        """Ray starts the actor again; until then, whatever it is asked fails."""
        while True:
            try:
                await known.actor.about.remote()
            except self._ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(0.05)
            except self._ray.exceptions.RayError as error:
                raise _lost(type(error).__name__, *known.sites[:1]) from error  # it stays away
            else:
                known.number += 1
                known.coming = None
                return

    def leave(self) -> dict[str, bytes]:
        """What the sites leave to the driver, by name; those of an actor that is lost leave nothing."""
        found: dict[str, bytes] = {}
        for known in self._known:
            with contextlib.suppress(self._ray.exceptions.RayError):
                found |= self._ray.get(known.actor.leave.remote())
        return found

    def close(self) -> None:
        """End the actors, and the cluster if it is this object's own."""
        for known in self._known:
            self._ray.kill(known.actor)
        if self._own:
            self._ray.shutdown()


def _lost(why: str, *sites: str) -> TransportError:
    return TransportError(
        "transport.actor-lost", f"the site's Ray actor is lost: {why}", field=sites[0] if sites else "",
        remedy="see the logs of Ray on that node; an actor that is out of memory needs fewer sites, or a larger node",
    )  # fmt: skip
