"""Long-running parties: `atoll coordinator up` and `atoll site up`."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import datetime as dt
import gc
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from threadpoolctl import threadpool_limits

from atoll.contract.errors import AtollError
from atoll.contract.wire import Json
from atoll.models.allowed import allow
from atoll.runtime.catalogue import load_installed, load_modules
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.home import CoordinatorHome, SiteHome
from atoll.runtime.region import Region, RegionHome
from atoll.runtime.site import Site
from atoll.transport.base import Endpoint
from atoll.transport.grpc import GrpcTransport
from atoll.transport.grpc_channel import on_channel
from atoll.transport.grpc_site import GrpcSite

log = logging.getLogger("atoll.serve")
CHECK_S, AGAIN_S = 10.0, 1.0
"""How often a site, and a region, looks whether it has to connect anew."""
POLL_S = 0.1
"""How often a coordinator looks for requests its operator's commands left in the store."""


class CoordinatorServer:
    """Listens for sites and drives every submitted run, several at once."""

    def __init__(self, home: CoordinatorHome, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        load_installed()
        allow(home.config.models)
        self._home, self._store = home, home.store()
        self._tell = on_event or (lambda _: None)
        store = self._store
        self._transport = GrpcTransport(
            lambda pem: home.authorise(store, pem),
            enrol=lambda _, request: home.enrol(store, request),
            renew=lambda site, request: home.renew(store, site, request),
            on_connect=self._connected,
            spool_dir=home.folder,
        )
        ledger = store.ledger(home.identity.public, home.identity.sign)
        self.coordinator = Coordinator(self._transport, store, ledger, on_event=on_event)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._cancelled: set[str] = set()

    def _connected(self, site: str) -> None:
        self._store.seen(site)
        telling = asyncio.ensure_future(self.coordinator.tell_ended(site))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def serve(self) -> None:
        """Until cancelled; runs that were open when an earlier process ended are resumed."""
        config, home = self._home.config, self._home
        port, enrol_port = await self._transport.start(
            config.host, config.port, config.enrol_port, home.ca.pem, home.server_pair
        )
        home.listen_on(port, enrol_port)
        self._tell({"listening": f"{config.host}:{port}", "enrolment": f"{config.host}:{enrol_port}"})
        try:
            while True:
                self._take_requests()
                await asyncio.sleep(POLL_S)
        finally:
            for task in self._running.values():
                task.cancel("stopping")
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            await self._transport.stop()
            (home.folder / "listening.json").unlink(missing_ok=True)
            self._store.close()

    def _take_requests(self) -> None:
        for row in self._store.runs("submitted", "running"):
            if row["run"] not in self._running:
                self._running[row["run"]] = asyncio.create_task(self._drive(row["run"]))
            elif row["cancel"] and row["run"] not in self._cancelled:
                self._cancelled.add(row["run"])  # once: a second one would stop it from telling the sites
                self._running[row["run"]].cancel()
        known = self._store.sites()
        for site in self._transport.sites():
            if site not in known or known[site]["revoked"]:
                self._transport.disconnect(site)

    async def _drive(self, run: str) -> None:
        if self._store.run(run)["plan"].cohort.above:  # its rounds are asked from above: see runtime.region
            return
        try:
            await self.coordinator.run(run)
        except AtollError as error:
            log.error("run %s failed: %s", run, error)
        except Exception as error:
            log.exception("run %s failed", run)
            with contextlib.suppress(Exception):  # the store itself may be what failed: a restart resumes the run
                self._store.set_status(run, "failed", f"{type(error).__name__} in the coordinator; see its log")
        finally:
            with contextlib.suppress(Exception):
                self._tell({"run": run, "ended": self._store.run(run)["status"]})


async def serve_site(home: SiteHome, on_state: Callable[[str], None]) -> None:
    """Stay connected to the coordinator and answer it, by policy, until cancelled.

    Raises IntegrityError when the coordinator refuses this site (revoked, foreign, expired).
    """
    _load(home)
    journal = home.journal()
    key = bytes.fromhex(home.config.coordinator_key)
    site = Site(home.identity, journal, home.policy, home.data, key, home.config.at_once)
    try:
        await _stay_connected(home, site.handle, on_state)
    finally:
        journal.close()


async def serve_region(
    home: RegionHome, on_state: Callable[[str], None], on_event: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Stay connected to the level above, listen for the region's own sites, and answer with their sums.

    Raises as :func:`serve_site`.
    """
    _load(home.site)
    server, journal = CoordinatorServer(home.coordinator, on_event), home.site.journal()
    region = Region(
        home.site.identity, journal, home.site.policy, bytes.fromhex(home.site.config.coordinator_key), home.level,
        server.coordinator, asyncio.get_running_loop(),
    )  # fmt: skip
    below = asyncio.create_task(server.serve())
    above = asyncio.create_task(_stay_connected(home.site, region.handle, on_state, AGAIN_S, again=region.back))
    try:
        region.tidy()
        await asyncio.wait([below, above], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, stop in ((above, region.stop), (below, journal.close)):  # nobody above hears of work that is stopped
            task.cancel()
            await asyncio.wait([task])
            stop()
    for task in (above, below):
        if not task.cancelled():
            task.result()


def _load(home: SiteHome) -> None:
    """Make known what the site's policy lets run."""
    load_installed()
    load_modules(home.policy.modules)
    allow(home.policy.models)


async def _stay_connected(
    home: SiteHome, endpoint: Endpoint, on_state: Callable[[str], None], check_s: float = CHECK_S, **more: Any
) -> None:
    """Answer the coordinator with *endpoint* until cancelled. more: see :class:`GrpcSite`."""
    link = GrpcSite(
        home.config.address, home.ca_pem, home.pair, endpoint,
        max_message_bytes=home.policy.max_message_bytes, on_state=on_state, check_s=check_s, **more,
    )  # fmt: skip

    async def renew(channel: Any) -> bool:
        async def call(request: Mapping[str, Json]) -> dict[str, Any]:
            return await on_channel(channel, "Renew", request)

        at = dt.datetime.fromtimestamp(link.coordinator_time(), dt.UTC)
        return await home.renew(call, at=at)

    await link.run(renew)


def settle() -> None:
    """Make this process fit to run a party, once everything is imported.

    One BLAS thread: sums have the same bits in every process, and sites do not fight for cores.
    What was imported is put out of the garbage collector's sight, which it would search again and again.
    """
    threadpool_limits(1)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # at the end extension modules look for what was never freed


async def until_ended(work: Coroutine[Any, Any, None], parent: int = 0) -> None:
    """Run *work* until it ends, the process is told to terminate, or the process *parent* is gone."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    while not task.done():
        await asyncio.wait([task], timeout=1.0)
        if parent and os.getppid() != parent:
            task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        task.result()
