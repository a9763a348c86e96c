"""What most tests need: a whole federation in this process, a program driven by hand, and the real data.

``federation`` runs plans over in-memory tables or files, with real journals, store, ledgers and
codec. ``drive`` runs only a program's two halves against each other, without any runtime, and
checks every reply against what its round declared.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from atoll.contract.disclosure import Rule, judged
from atoll.contract.fields import as_arrays
from atoll.contract.plan import Plan
from atoll.contract.program import build, handler_of
from atoll.contract.rounds import (
    Arrival,
    Checkpoint,
    Gather,
    Gathered,
    Metrics,
    Round,
    Sum,
    Summed,
    Task,
    TaskId,
    Together,
)
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import Message, encode_bytes
from atoll.crypto.identity import Identity, verify
from atoll.crypto.prg import Stream, derive
from atoll.crypto.session import Session
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.data.table import Table
from atoll.ledger.verify import Verified, verify_file, verify_together
from atoll.runtime.catalogue import load_installed
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.journal import Journal
from atoll.runtime.mail import Mailbox
from atoll.runtime.policy import Policy
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.runtime.study import settled
from atoll.transport.base import Endpoint, Progress
from atoll.transport.local import LocalTransport

load_installed()
UNCHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
"""The machine may be busy; and fixtures that tests share between examples are built anew by them, or only read."""
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=UNCHECKED)
settings.register_profile("search", derandomize=False, deadline=None, max_examples=500, suppress_health_check=UNCHECKED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except this one: ibis still calls DuckDB by a name that DuckDB 2 deprecates."""
    config.addinivalue_line("filterwarnings", r"ignore:fetch_arrow_table\(\) is deprecated:DeprecationWarning")


Wrap = Callable[[str, Endpoint], Endpoint]


@pytest.fixture(scope="session")
def atoll_data() -> Path:
    """The folder of real data sets: $ATOLL_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("ATOLL_DATA", "")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there; set ATOLL_DATA to the folder that holds the data sets")
    return folder


# ---------------------------------------------------------------- a whole federation


@dataclass
class Federation:
    """Coordinator and sites in this process. ``build`` makes them; ``run`` builds and runs a plan.

    Everything of the last build can be looked at: ``store``, ``ledger``, ``transport``,
    ``journals``, ``sites``, ``run_id``; ``wire`` holds every message as (site, "to" or "from", bytes).
    """

    folder: Path
    wire: list[tuple[str, str, bytes]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    builds: int = 0
    run_id: str = ""
    store: RunStore | None = None
    transport: LocalTransport | None = None
    journals: dict[str, Journal] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)

    @staticmethod
    def table(data: Mapping[str, Any], columns: Mapping[str, Any], **schema: Any) -> Table:
        """A table from arrays (or lists; None is missing) and column declarations as in a schema file."""
        declared = TableSchema(name="test", columns={n: Column(**c) for n, c in columns.items()}, **schema)
        made = {}
        for name, column in declared.columns.items():
            if column.role != "ignore":
                kind = np.float64 if column.numeric else "datetime64[D]" if column.dtype == "date" else object
                made[name] = np.array(data[name], dtype=kind)
        return Table(declared, made)

    @staticmethod
    def plan(program: str, params: Mapping[str, Any], tables: Mapping[str, Table], **more: Any) -> Plan:
        """A plan over the schema of *tables* (or schema=…); *more* are the plan's other keys."""
        first = next(iter(tables.values()), None)
        schema = more.pop("schema", None) or first.schema.model_dump(mode="json")  # type: ignore[union-attr]
        content = {"atoll": 1, "name": "test", "protection": "plain", "cohort": {"min_sites": 1}, **more}
        return Plan.from_json({**content, "schema": schema, "program": program, "params": dict(params)})

    def build(
        self,
        tables: Mapping[str, Table | SourceSpec],
        policies: Mapping[str, Policy] | None = None,
        *,
        base: Path | None = None,
        wrap: Wrap | None = None,
        threads: int = 4,
    ) -> Federation:
        """A fresh federation of *tables*' sites, in cohort order; *wrap* may change a site's endpoint.

        base: the folder that paths of SourceSpecs are relative to. Policies default to the sandbox's.
        """
        self.close()
        self.builds += 1
        self.home = self.folder / str(self.builds)
        self.home.mkdir(parents=True)
        self.coordinator = Identity.generate("coordinator")
        self.wrap, self.threads, self.wire = wrap, threads, []
        self.journals, self.sites = {}, {}
        self.start_coordinator()
        for name, source in tables.items():
            identity = Identity.generate(name)
            journal = Journal(self.home / f"{name}.db", name, identity.public, identity.sign, durable=False)
            self.store.invite(name, "a" * 64, 2**31 - 1)
            self.store.enrol(name, "a" * 64, identity.public.hex(), "")
            policy = (policies or {}).get(name) or Policy.sandbox()
            data = self._reader(name, source, base or self.home)
            self.sites[name] = Site(identity, journal, policy, data, self.coordinator.public)
            self.journals[name] = journal
        self.start_transport()
        return self

    @staticmethod
    def _reader(name: str, source: Table | SourceSpec, base: Path) -> Callable[[Plan], SiteData]:
        if isinstance(source, Table):
            return lambda plan: SiteData.of(source, plan, name)
        return lambda plan: SiteData.read(source, plan, base, name)

    def start_coordinator(self) -> None:
        """Open store and ledger: also what a coordinator does that starts again after a crash."""
        if self.store is not None:
            self.store.close()
        self.store = RunStore(f"sqlite:///{self.home / 'store.db'}", durable=False)
        self.ledger = self.store.ledger(self.coordinator.public, self.coordinator.sign)

    def start_transport(self) -> None:
        """Connect all sites to the coordinator."""
        if self.transport is not None:
            self.transport.close()
        endpoints = {n: self._recorded(n, site.handle) for n, site in self.sites.items()}
        wrapped = {n: self.wrap(n, e) if self.wrap else e for n, e in endpoints.items()}
        self.transport = LocalTransport(wrapped, threads=self.threads)

    def _recorded(self, name: str, endpoint: Endpoint) -> Endpoint:
        def record(message: Message, progress: Progress) -> Message:
            self.wire.append((name, "to", encode_bytes(message)))
            reply = endpoint(message, progress)
            self.wire.append((name, "from", encode_bytes(reply)))
            return reply

        return record

    def submit(self, plan: Plan) -> str:
        """Store a run over all sites (those of the build, in their order); returns its id."""
        self.run_id = self.store.create_run(settled(plan), plan.cohort.sites or list(self.sites))
        return self.run_id

    def drive(
        self, run: str = "", *, on_event: Callable[[dict[str, Any]], None] | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Run (or resume) a submitted run with a new Coordinator; returns the study's outcome."""
        self.events = []

        def listen(event: dict[str, Any]) -> None:
            self.events.append(event)
            if on_event is not None:
                on_event(event)

        coordinator = Coordinator(self.transport, self.store, self.ledger, on_event=listen, **settings)
        return asyncio.run(coordinator.run(run or self.run_id))

    def run(
        self,
        plan: Plan,
        tables: Mapping[str, Table | SourceSpec],
        policies: Mapping[str, Policy] | None = None,
        **build_options: Any,
    ) -> dict[str, Any]:
        """Build a federation of *tables*, run *plan* on it, and return the outcome."""
        self.build(tables, policies, **build_options)
        self.submit(plan)
        return self.drive()

    def ledgers(self) -> dict[str, Verified]:
        """Every party's ledger, exported and verified alone and together."""
        paths = {"coordinator": self.home / "coordinator.jsonl"}
        self.store.export_ledger(paths["coordinator"])
        for name, journal in self.journals.items():
            paths[name] = self.home / f"{name}.jsonl"
            journal.export(paths[name])
        verified = {name: verify_file(path, verify) for name, path in paths.items()}
        verify_together(list(verified.values()), verify)
        return verified

    def releases(self) -> list[dict[str, Any]]:
        """The bodies of all sites' release entries."""
        return [
            entry["body"]
            for name, ledger in self.ledgers().items()
            if name != "coordinator"
            for entry in ledger.entries
            if entry["kind"] == "release"
        ]

    def close(self) -> None:
        """Give back threads and files of the last build."""
        if self.transport is not None:
            self.transport.close()
        if self.store is not None:
            self.store.close()
        for journal in self.journals.values():
            journal.close()
        self.transport = self.store = None


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """A federation to build and run plans on, any number of times."""
    made = Federation(tmp_path / "federation")
    yield made
    made.close()


@pytest.fixture(scope="session")
def federations() -> type[Federation]:
    """Makes federations that serve several tests: ``federations(folder)``, to be closed."""
    return Federation


# ---------------------------------------------------------------- programs without a runtime


@dataclass
class Desk:
    """One site as a handler sees it, in plain memory (see ``atoll.contract.program.SiteView``)."""

    name: str
    table: Table
    holdout: Table
    share: tuple[str, ...] = ("rows", "metrics", "risk")
    state: dict[str, Any] = field(default_factory=dict)
    personal: dict[str, Any] = field(default_factory=dict)
    min_group_size: int = 1
    mail: Any = None

    def progress(self, done: float, total: float) -> None:
        """Nobody watches."""

    def shares(self, what: str) -> bool:
        return what in self.share


@dataclass
class Driven:
    """What a program did: its result, the rounds it asked, the replies it got, and what else it yielded."""

    result: Any = None
    rounds: list[Round] = field(default_factory=list)
    replies: list[dict[str, dict[str, np.ndarray]]] = field(default_factory=list)
    reduced: list[Any] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    checkpoints: list[tuple[int, Checkpoint]] = field(default_factory=list)
    """(number of the round it comes before, state)."""
    kept: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """What every site's state was at each checkpoint."""
    flying: list[list[Arrival]] = field(default_factory=list)
    """What was in flight at each checkpoint."""
    desks: dict[str, Desk] = field(default_factory=dict)


def _drive(
    steps: Any,
    tables: Mapping[str, Table],
    holdouts: Mapping[str, Table] | None = None,
    *,
    absent: Callable[[int], Sequence[str]] = lambda _: (),
    first_round: int = 0,
    kept: Mapping[str, Mapping[str, Any]] | None = None,
    check_bounds: bool = True,
    rule: Rule = Rule(),  # noqa: B008
    flying: Sequence[Arrival] = (),
    arrives: Callable[[Sequence[Arrival]], int] = lambda _: 0,
) -> Driven:
    empty = {n: t.rows(np.zeros(len(t), bool)) for n, t in tables.items()}
    small = rule.min_group_size
    desks = {n: Desk(n, t, (holdouts or empty)[n], min_group_size=small) for n, t in tables.items()}
    identities = {name: _identity(name) for name in desks}
    roster = {name: identity.public for name, identity in sorted(identities.items())}
    for name, desk in desks.items():
        session = Session(derive(b"\0" * 32, "session", name))
        desk.mail = Mailbox(name, "0" * 32, "test", session, identities[name].sign, roster, "")
    for name, state in (kept or {}).items():
        desks[name].state = dict(state)
    driven, value, in_flight = Driven(desks=desks), None, list(flying)

    def answered(item: Round) -> Any:
        number = first_round + len(driven.rounds)
        made = build(item.program, item.params)
        asked = [n for n in (desks if item.sites is None else item.sites) if n not in absent(number)]
        if item.draw is not None:
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((0, number, 1))))  # as the scheduler
            asked = [asked[place] for place in sorted(random.choice(len(asked), item.draw, replace=False))]
            item = replace(item, sites=tuple(asked))
        replies = {}
        for name in asked:
            sent = {k: np.asarray(v) for k, v in {**item.send, **item.send_to.get(name, {})}.items()}
            secret = partial(_secret, number, name)
            task = Task(TaskId("0" * 32, number, 0, "reply", name), sent, (number, *name.encode()), secret)
            handler = handler_of(made, item.name)
            assert handler.reduce == item.reduce.tag
            reply = judged(handler.answer(made, desks[name], task), handler.cells, rule)
            replies[name] = as_arrays(reply, item.reply)
            if check_bounds:
                _within_bounds(item, replies[name])
        driven.rounds.append(item)
        driven.replies.append(replies)
        if isinstance(item.reduce, Sum):
            value = Summed({f: sum(r[f] for r in replies.values()) for f in item.reply}, tuple(replies))
        elif isinstance(item.reduce, Gather):
            value = Gathered(replies)
        else:
            in_flight.extend(Arrival(name, number, reply) for name, reply in replies.items())
            value = in_flight.pop(arrives(in_flight))
        driven.reduced.append(value)
        return value

    while True:
        try:
            item = steps.send(value)
        except StopIteration as stop:
            driven.result = stop.value
            return driven
        value = None
        if isinstance(item, Metrics):
            driven.metrics.append(item)
            value = False
        elif isinstance(item, Checkpoint):
            driven.checkpoints.append((first_round + len(driven.rounds), item))
            driven.kept.append({name: dict(desk.state) for name, desk in desks.items()})
            driven.flying.append(list(in_flight))
        elif isinstance(item, Together):
            value = tuple(answered(one) for one in item.rounds)
        else:
            value = answered(item)


@cache
def _identity(name: str) -> Identity:
    """The same when a program goes on from a checkpoint."""
    return Identity.generate(name)


def _secret(number: int, site: str, label: str) -> Stream:
    return Stream(derive(b"\0" * 32, "test", number, site, label))


def _within_bounds(asked: Round, reply: Mapping[str, np.ndarray]) -> None:
    for name, array in reply.items():
        bound = asked.reply[name].bound
        if bound is not None and array.size:
            assert np.abs(array).max() <= bound, f"{asked.program}/{asked.name}: {name} is beyond its declared bound"


@pytest.fixture(scope="session")
def drive() -> Callable[..., Driven]:
    """``drive(steps, tables, holdouts=None, absent=…)``: a program's two halves run against each other.

    Every reply must have exactly the declared fields, dtypes and shapes and keep its declared
    bounds. absent(round number) names the sites that drop out of a round. kept, flying: sites' states, and replies that
    are in flight, to begin with. arrives(replies in flight) is the place of the one that arrives next.
    """
    return _drive
