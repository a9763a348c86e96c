"""The sandbox: a whole federation on one machine, for trying a plan on one's own data.

``local``: coordinator and sites in this process. ``grpc``: one coordinator process and
one process per site on loopback, set up with the very commands a real federation uses:
own CA, join tokens, identities, mutual TLS. ``ray``: the sites in actors of a Ray cluster, for
more of them than one machine holds. A plan that runs here is submitted
unchanged to real sites. Afterwards the same plan is run on each site alone and on the
pooled table, so that the result can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from atoll.contract.errors import AtollError, ProtocolError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.protection import Choice
from atoll.contract.schedule import Schedule
from atoll.contract.settings import read_yaml, validate
from atoll.contract.wire import Json
from atoll.crypto.identity import Identity
from atoll.crypto.pki import check_name
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.data.table import concatenate
from atoll.models.allowed import allow, asked_in
from atoll.runtime.catalogue import load_installed
from atoll.runtime.cluster import run_cluster
from atoll.runtime.coordinator import Coordinator, Event
from atoll.runtime.home import CoordinatorConfig, CoordinatorHome, SiteHome
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.results import details, write_json, write_model
from atoll.runtime.roster import among
from atoll.runtime.serve import settle
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.runtime.study import check_plan, settled
from atoll.runtime.value import value_of
from atoll.transport.local import LocalTransport

OF_MANY = ("aggregate", "sites_per_round", "buffer", "compress", "alone", "topology")
"""Parameters that say something of several sites: a party alone has no use for them."""
START_S = 300.0
"""Patience for the start of a process on a busy machine."""
TOLD_S = 60.0
"""Patience for sites to hear that a run has ended."""


def read_sites(path: Path) -> dict[str, SourceSpec]:
    """SITES.yaml: site name → source. Raises PlanError for unknown keys and malformed names."""

    content = read_yaml(path, "sites")
    return {check_name(str(n)): validate(SourceSpec, value, f"sites: {n}") for n, value in content.items()}


def run_sandbox(
    plan: Plan, sources: Mapping[str, SourceSpec], base: Path, out: Path,
    transport: Literal["local", "grpc", "ray"] = "local", on_event: Event | None = None, address: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Run *plan* on *sources* (paths relative to *base*); returns (result, details for the report).

    address: of the Ray cluster; None: one is started on this machine. Writes result.json, model/ and
    ledger/PARTY.jsonl into *out*. Raises the AtollError that ended it.
    """
    load_installed()
    allow(asked_in(plan.params))  # it is one's own
    settle()
    check_plan(plan)
    plan = among(settled(plan), sources)
    tell = on_event or (lambda _: None)
    tables = {site: _read(site, spec, plan, base) for site, spec in sources.items()}
    ledgers = out / "ledger"
    ledgers.mkdir(parents=True, exist_ok=True)
    for old in ledgers.glob("*.jsonl"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        if transport == "local":
            store, run = _run_local(plan, tables, Path(scratch), ledgers, tell)
        elif transport == "ray":
            store, run = run_cluster(plan, sources, base, Path(scratch), ledgers, tell, address)
        else:
            store, run = _run_grpc(plan, sources, base, Path(scratch), ledgers, tell)
        result, arrays = store.result(run)
        exported = {path.stem: path for path in sorted(ledgers.glob("*.jsonl"))}
        shown = details(plan, store.metrics(run), store.rounds(run), exported)
        store.close()
    shown["curves"] = result.pop("curves", {})
    if result["metrics"]["federated"] or result["metrics"].get("personal"):
        _compare(plan, tables, result, tell)
        if value := value_of(result):
            result["value"] = value
    write_json(out / "result.json", result)
    write_model(out / "model", plan, result, arrays)
    return result, shown


def _read(site: str, spec: SourceSpec, plan: Plan, base: Path) -> SiteData:
    try:
        return SiteData.read(spec, plan, base, site)
    except AtollError as error:
        raise error.at(site=site) from None


# ---------------------------------------------------------------- in one process


def _run_local(
    plan: Plan, tables: Mapping[str, SiteData], scratch: Path, ledgers: Path | None, tell: Event
) -> tuple[RunStore, str]:
    """Drive one run over the local transport; the caller closes the store."""
    store = RunStore(f"sqlite:///{scratch / 'store.db'}", durable=False)
    identity = Identity.generate("coordinator")
    ledger = store.ledger(identity.public, identity.sign)
    journals: dict[str, Journal] = {}
    endpoints = {}
    for name, table in tables.items():
        own = Identity.generate(name)
        store.invite(name, f"{len(journals):064x}", 2**31 - 1)
        store.enrol(name, f"{len(journals):064x}", own.public.hex(), "")
        journals[name] = Journal(scratch / f"{name}.db", name, own.public, own.sign, temporary=True)
        site = Site(own, journals[name], Policy.sandbox(), partial(_same, table), identity.public)
        endpoints[name] = site.handle
    run = store.create_run(plan, tuple(tables))
    transport = LocalTransport(endpoints)
    try:
        coordinator = Coordinator(transport, store, ledger, on_event=tell)
        asyncio.run(coordinator.run(run))
    finally:
        transport.close()
        if ledgers is not None:
            store.export_ledger(ledgers / "coordinator.jsonl")
        for name, journal in journals.items():
            if ledgers is not None:
                journal.export(ledgers / f"{name}.jsonl")
            journal.close()
    return store, run


def _same(table: SiteData, _: Plan) -> SiteData:
    return table


def _compare(plan: Plan, tables: Mapping[str, SiteData], result: dict[str, Any], tell: Event) -> None:
    """The same plan on each site alone and on the pooled table (rows and hold-out unchanged)."""
    alone = {"cohort": plan.cohort.model_copy(update={"sites": (), "min_sites": 1, "on_dropout": "fail"})}
    params = {name: value for name, value in plan.params.items() if name not in OF_MANY}
    one = {"protection": Choice(sum="plain"), "privacy": None, "schedule": Schedule(), "params": params}
    solo = plan.model_copy(update={**alone, **one})
    room = {"max_rows": plan.table.max_rows * len(tables)}  # or more rows than one site's would be clipped
    whole = solo.model_copy(update={"table": plan.table.model_copy(update=room)})
    rows = concatenate([data.base() for data in tables.values()])
    rows = replace(rows, schema=rows.schema.model_copy(update=room))
    pooled = SiteData(rows, whole, Prepared(plan.recipe), "pooled")
    for name, table in {"pooled": pooled, **tables}.items():
        tell({"comparing": name})
        with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
            try:
                asked = whole if table is pooled else solo
                store, run = _run_local(asked, {name: table}, Path(scratch), None, lambda _: None)
                found: Json = store.result(run)[0]["metrics"]
                store.close()
            except AtollError as error:
                found = {"federated": {}, "per_site": {name: {"federated": {}}}, "note": error.message or error.code}
        which = "personal" if "personal" in found else "federated"  # one's own model is all that one party makes
        if name == "pooled":
            result["metrics"]["pooled"] = found[which]
        else:
            place = result["metrics"]["per_site"][name]
            place["local"] = found["per_site"][name][which] or place.get("local", {})
        if "note" in found:
            result["metrics"].setdefault("notes", {})[name] = found["note"]


# ---------------------------------------------------------------- in processes of their own


class Processes:
    """Child processes of a sandbox; all are ended, by their own process id, on the way out."""

    def __init__(self, logs: Path, keep: Sequence[int] = ()) -> None:
        """keep: file descriptors that stay open as long as any of them lives."""
        self._logs, self._keep, self._children = logs, tuple(keep), dict[str, subprocess.Popen[bytes]]()

    def start(self, name: str, *arguments: str) -> None:
        """``atoll`` with *arguments*, logging to NAME.log."""
        command = [sys.executable, "-m", "atoll", *arguments, "--parent", str(os.getpid())]
        with (self._logs / f"{name}.log").open("ab") as log:
            self._children[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=self._keep
            )

    def check(self) -> None:
        """Raise TransportError if one has ended, with the end of its log."""
        for name, child in self._children.items():
            if child.poll() is not None:
                tail = (self._logs / f"{name}.log").read_text(errors="replace").strip().splitlines()[-3:]
                raise TransportError("sandbox.process", f"{name} ended: {' '.join(tail)}", field=name)

    def stop(self) -> None:
        """Terminate all, kill what does not end."""
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextlib.contextmanager
def processes(logs: Path) -> Iterator[Processes]:
    """Processes that end with the block."""
    started = Processes(logs)
    try:
        yield started
    finally:
        started.stop()


def until(ready: Callable[[], bool], children: Processes, what: str, patience_s: float = START_S) -> None:
    """Wait until *ready*; raises TransportError when a child ends or patience does."""
    end = time.monotonic() + patience_s
    while not ready():
        children.check()
        if time.monotonic() > end:
            raise TransportError("sandbox.start", f"{what} did not happen within {patience_s:g} s", field=what)
        time.sleep(0.02)


def _run_grpc(
    plan: Plan, sources: Mapping[str, SourceSpec], base: Path, scratch: Path, ledgers: Path, tell: Event
) -> tuple[RunStore, str]:
    """Drive one run with a process per party on loopback; the caller closes the store."""
    models = tuple(asked_in(plan.params))
    policy = Policy.sandbox().model_copy(update={"models": models})
    home = CoordinatorHome.create(scratch / "coordinator", CoordinatorConfig(port=0, enrol_port=0, models=models))
    store = home.store()
    sites: dict[str, SiteHome] = {}
    with processes(scratch) as children:
        children.start("coordinator", "coordinator", "up", "--home", str(home.folder))
        until(lambda: (home.folder / "listening.json").exists(), children, "the coordinator's start")
        for name, spec in sources.items():
            tell({"starting": name})
            token = home.invite(store, name, dt.timedelta(minutes=10))
            where = spec.model_copy(update={"path": str((base / spec.path).absolute())})
            joining = SiteHome.create(scratch / name, token.encode(), {plan.dataset: where}, policy)
            sites[name] = asyncio.run(joining)
            children.start(name, "site", "up", "--home", str(sites[name].folder))
        until(lambda: all(row["seen"] for row in store.sites().values()), children, "the sites' connection")
        run = store.create_run(plan, tuple(sources))
        try:
            _watch(store, run, children, tell)
            with contextlib.suppress(TransportError):
                closed = lambda: store.entry_of("closed", run) is not None  # noqa: E731
                until(closed, children, "the sites' hearing of the end", TOLD_S)
        finally:
            children.stop()
            store.export_ledger(ledgers / "coordinator.jsonl")
            for name, site in sites.items():
                journal = site.journal()
                journal.export(ledgers / f"{name}.jsonl")
                journal.close()
    record = store.run(run)
    if record["status"] != "finished":
        raise ProtocolError("run.failed", record["note"] or f"the run is {record['status']}")
    return store, run


def _watch(store: RunStore, run: str, children: Processes, tell: Event) -> None:
    """Tell progress until the run has ended."""
    seen = 0
    while True:
        rounds = store.rounds(run)
        for row in rounds[seen:]:
            tell({"run": run, "round": row["number"], "name": row["name"]})
        seen = len(rounds)
        if store.run(run)["status"] not in ("submitted", "running"):
            return
        children.check()
        time.sleep(0.05)
