"""A sandbox whose parties last: identities, journals and run store stay in a folder, so that the ledgers go on from run
to run, and a run that was broken off is resumed.

Every party has the home that it would have in a real federation, ``FOLDER/coordinator`` and ``FOLDER/SITE``, and its
policy is read from there. Sites join anew at every start, keeping identity and journal. Parties run in this process, or
in one process each; a site's that ends is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from atoll.contract.errors import ProtocolError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.wire import Json
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.models.allowed import asked_in
from atoll.runtime.coordinator import Coordinator, Event
from atoll.runtime.home import CoordinatorConfig, CoordinatorHome, SiteHome
from atoll.runtime.policy import Policy
from atoll.runtime.sandbox import TOLD_S, Processes, _watch, until
from atoll.runtime.site import Site
from atoll.transport.local import LocalTransport

AGAIN = 3
"""How often a site's process is started again before the site counts as absent."""
HELD = "held"
"""Status of a run that waits until the sites are connected, which may take long on a busy machine."""
CERTIFICATE_DAYS = 30.0


class LastingSandbox:
    """Coordinator and sites in one folder, which is for nobody else's eyes."""

    def __init__(
        self, folder: Path, plan: Plan, sources: Mapping[str, SourceSpec], base: Path, keep: Sequence[int] = ()
    ) -> None:
        """Make what is not there yet. base: what the sources' paths are relative to. keep: file descriptors that all
        processes of parties hold open."""
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder, self._keep = folder, keep
        models = tuple(asked_in(plan.params))
        self._policy = Policy.sandbox().model_copy(update={"models": models})
        self._datasets = {name: {plan.dataset: _absolute(spec, base)} for name, spec in sources.items()}
        place = folder / "coordinator"
        if not place.is_dir():
            config = CoordinatorConfig(port=0, enrol_port=0, certificate_days=CERTIFICATE_DAYS, models=models)
            with _whole(place) as made:
                CoordinatorHome.create(made, config)
        self.home = CoordinatorHome(place)
        self.store = self.home.store()
        self.sites: dict[str, SiteHome] = {}

    def close(self) -> None:
        """Give back what is open."""
        self.store.close()

    def _enrol(self) -> None:
        """Every site joins, or joins anew: the coordinator's address and the site's source may be others now."""

        async def signed(*asked: Any) -> Mapping[str, Json]:
            return self.home.enrol(self.store, asked[-1])

        for name, datasets in self._datasets.items():
            token = self.home.invite(self.store, name, dt.timedelta(minutes=10)).encode()
            folder = self.folder / name
            if folder.is_dir():
                asyncio.run(SiteHome.create(folder, token, datasets, call=signed))
            else:
                with _whole(folder) as made:
                    asyncio.run(SiteHome.create(made, token, datasets, self._policy, signed))
            self.sites[name] = SiteHome(folder)

    # ---------------------------------------------------------------- runs

    def drive(
        self, run: str, present: Collection[str], transport: Literal["local", "grpc"], tell: Event,
        table: Callable[[str], SiteData] | None = None,
    ) -> None:  # fmt: skip
        """Drive, or resume, a stored run with the sites *present*; the others count as absent. table: a site's, where
        it was read already; only in this process. Raises the AtollError that ended it."""
        if transport == "local":
            self._enrol()
            asyncio.run(self._here(run, present, tell, table))
        else:
            self._apart(run, present, tell)

    async def _here(
        self, run: str, present: Collection[str], tell: Event, table: Callable[[str], SiteData] | None
    ) -> None:
        with contextlib.ExitStack() as open_:
            endpoints = {}
            for name in present:
                own, journal = self.sites[name], self.sites[name].journal()
                open_.callback(journal.close)
                key = bytes.fromhex(own.config.coordinator_key)
                data = own.data if table is None else partial(_known, table(name))
                endpoints[name] = Site(own.identity, journal, own.policy, data, key).handle
            transport = LocalTransport(endpoints)
            open_.callback(transport.close)
            ledger = self.store.ledger(self.home.identity.public, self.home.identity.sign)
            coordinator = Coordinator(transport, self.store, ledger, on_event=tell)
            for name in present:
                await coordinator.tell_ended(name)
            await coordinator.run(run)

    def _apart(self, run: str, present: Collection[str], tell: Event) -> None:
        listening, before = self.home.folder / "listening.json", self.store.sites()
        listening.unlink(missing_ok=True)  # of a coordinator that was killed
        self.store.set_status(run, HELD)
        children = _Parties(self.folder, self._keep)
        try:
            children.start("coordinator", "coordinator", "up", "--home", str(self.home.folder))
            until(listening.exists, children, "the coordinator's start")
            self._enrol()
            for name in present:
                tell({"starting": name})
                children.start(name, "site", "up", "--home", str(self.sites[name].folder))

            def connected() -> bool:
                now = self.store.sites()
                seen = (before.get(name, {}).get("seen", "") != now[name]["seen"] for name in children.sites())
                return all(seen)

            until(connected, children, "the sites' connection")
            self.store.set_status(run, "submitted")
            _watch(self.store, run, children, tell)
            with contextlib.suppress(TransportError):  # who is not told now hears it at the next start
                until(lambda: self._told(run, children), children, "the sites' hearing of the end", TOLD_S)
        finally:
            children.stop()
        record = self.store.run(run)
        if record["status"] != "finished":
            raise ProtocolError("run.failed", record["note"] or f"the run is {record['status']}")

    def _told(self, run: str, children: _Parties) -> bool:
        owed = any(row == run for name in children.sites() for row, _, _ in self.store.owed_closes(name))
        return not owed and self.store.entry_of("closed", run) is not None

    def drop(self, run: str) -> None:
        """Give up a run; its sites are told at their next start."""
        self.store.end_run(run, "cancelled", "given up", tuple(self.store.roster()), None)

    def export_ledgers(self, folder: Path) -> None:
        """Write every party's whole ledger as JSON lines."""
        folder.mkdir(parents=True, exist_ok=True)
        self.store.export_ledger(folder / "coordinator.jsonl")
        for name, site in self.sites.items():
            journal = site.journal()
            journal.export(folder / f"{name}.jsonl")
            journal.close()


class _Parties(Processes):
    """Processes of which a site's is started again when it ends, so many times."""

    def __init__(self, logs: Path, keep: Sequence[int]) -> None:
        super().__init__(logs, keep)
        self._how: dict[str, tuple[str, ...]] = {}
        self._tries: Counter[str] = Counter()

    def start(self, name: str, *arguments: str) -> None:
        self._how[name] = arguments
        super().start(name, *arguments)

    def sites(self) -> list[str]:
        """Those that have not been given up."""
        return [name for name in self._children if name != "coordinator"]

    def check(self) -> None:
        """Start ended sites again, or give them up; raise TransportError if the coordinator has ended."""
        for name in self.sites():
            if self._children[name].poll() is None:
                continue
            if self._tries[name] < AGAIN:
                self._tries[name] += 1
                self.start(name, *self._how[name])
            else:
                del self._children[name]
        super().check()


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A new folder that is there only once it is whole."""
    made = folder.with_name(f".{folder.name}.new")  # no site can have such a name
    shutil.rmtree(made, ignore_errors=True)
    yield made
    made.rename(folder)


def _absolute(spec: SourceSpec, base: Path) -> SourceSpec:
    return spec.model_copy(update={"path": str((base / spec.path).absolute())})


def _known(table: SiteData, _: Plan) -> SiteData:
    return table
