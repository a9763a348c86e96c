"""The job that an operator schedules: one run of a plan for each day, made once.

The plan's program determines the day from the data (or from its param ``day``), so that one approved plan serves every
day. Everything lies in one folder: DAY/ with result and report; ``ledger/``, the parties' ledgers, which go on from day
to day; ``history.json``, a line for each day; and ``open.json`` while a run is under way. A day that stands in the
history is told again, and nobody is asked. A run that was broken off is resumed as the same run, so that sites release
nothing twice. The history is written last: whatever was killed, the next call goes on from there.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from atoll.contract.errors import AtollError, PlanError, ProtocolError, SchemaError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY, build
from atoll.data.last_day import last_day
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.models.allowed import allow, asked_in
from atoll.runtime.coordinator import Event
from atoll.runtime.home import CoordinatorHome
from atoll.runtime.lasting import HELD, LastingSandbox
from atoll.runtime.results import details, releases, write_json
from atoll.runtime.roster import among
from atoll.runtime.store import RunStore
from atoll.runtime.study import check_plan, settled

Page = Callable[[Path, Mapping[str, Any], Mapping[str, Any]], None]
"""Writes a report: its path, the result, and what is shown beside it."""
LOCK_S = 60.0
"""So long a call waits for the processes of one that was killed to end."""
PICKED_UP_S = 60.0
"""So soon a running coordinator has begun with what was submitted."""
OPEN = (HELD, "submitted", "running")


@dataclass(frozen=True, slots=True)
class Made:
    """A day: its line in the history, its result, and whether it had been made before this call."""

    entry: Mapping[str, Any]
    result: Mapping[str, Any]
    before: bool


class Parties(Protocol):
    """Who makes a day."""

    @property
    def store(self) -> RunStore:
        """Where runs are."""

    @property
    def missing(self) -> Mapping[str, str]:
        """Sites that are known to be absent, and why."""

    def newest(self, *, exactly: bool) -> str | None:
        """The day that a run would be about, where that is known without asking anybody; else a quick guess."""

    def begin(self, run: str, plan: Plan) -> None:
        """Submit a run of that id."""

    def drive(self, run: str, tell: Event) -> None:
        """Return when the run has finished; raises the AtollError that ended it, or that let it stay open."""

    def drop(self, run: str) -> None:
        """Give up an open run."""

    def export_ledgers(self, folder: Path) -> None:
        """Write the ledgers that are at hand."""


# ---------------------------------------------------------------- the folder


class Days:
    """What was made, day by day, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[dict[str, Any]]:
        """A line for each day, oldest first."""
        return list(_read(self.folder / "history.json").get("days", []))

    def of(self, day: str) -> dict[str, Any] | None:
        """The line of one day, or None."""
        return next((entry for entry in self.all() if entry["day"] == day), None)

    def result(self, day: str) -> dict[str, Any]:
        """The result of a day in the history; raises PlanError where it was removed."""
        found = _read(self.folder / day / "result.json")
        if not found:
            raise PlanError(
                "daily.result-gone", f"the result of {day} is not in its folder", field="out",
                remedy="put the folder back, or make the day again: --again",
            )  # fmt: skip
        return found

    def under_way(self) -> dict[str, Any]:
        """The run that is under way, {} if none is."""
        return _read(self.folder / "open.json")

    def begin(self, entry: Mapping[str, Any]) -> None:
        """A run is about to be submitted."""
        _replace(self.folder / "open.json", entry)

    def end(self) -> None:
        """No run is under way any longer."""
        (self.folder / "open.json").unlink(missing_ok=True)

    def keep(self, study: str, entry: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Add a day, or replace it: its folder as *write* fills it, then its line."""
        place = self.folder / str(entry["day"])
        made, old = place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")
        for left in (made, old):
            shutil.rmtree(left, ignore_errors=True)
        made.mkdir()
        write(made)
        if place.exists():
            place.rename(old)
        made.rename(place)
        shutil.rmtree(old, ignore_errors=True)
        lines = [one for one in self.all() if one["day"] != entry["day"]]
        days = sorted([*lines, dict(entry)], key=lambda one: str(one["day"]))
        _replace(self.folder / "history.json", {"study": study, "days": days})


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PlanError(
            "daily.unreadable", f"{path.name} was altered and cannot be read", field="out",
            remedy="put back its last copy, or name another --out",
        )  # fmt: skip
    return found


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    """All or nothing."""
    fresh = path.with_name(f"{path.name}.new")
    write_json(fresh, dict(content))
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The folder is one call's alone, and its processes' that hold the yielded descriptor open. Raises PlanError when
    another call has it, at once; processes of a call that is gone are waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, ".lock", 0.0), _lock(folder, ".parties.lock", LOCK_S) as held:
        yield held


@contextlib.contextmanager
def _lock(folder: Path, name: str, patience_s: float) -> Iterator[int]:
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise PlanError(
                        "daily.busy", f"another call of atoll daily is at work in {folder}", field="out",
                        remedy="wait until it has ended; two jobs need an --out each",
                    ) from None  # fmt: skip
                time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- a day


def make_day(
    plan: Plan, parties: Parties, out: Path, *, day: str | None, again: bool, page: Page, tell: Event,
    today: dt.date | None = None,
) -> Made:  # fmt: skip
    """The newest day (or *day*): made now, finished after it was broken off, or told again.

    again: make it even if it stands in the history. today: where the parties do not know the newest day without
    asking, a plan is run once on each of these. Raises the AtollError that prevented it.
    """
    days, asked = Days(out), str(today or dt.datetime.now().astimezone().date())
    plan = for_day(plan, day)
    begun = _under_way(plan, parties, days)
    finished = None if begun is None else _finish(begun, plan, parties, days, page, tell)
    for exactly in (False, True):
        newest = day or parties.newest(exactly=exactly)
        known = days.of(newest) if newest else _asked_on(days, plan, asked)
        if known is not None and finished is not None and known["run"] == finished.entry["run"]:
            return finished
        if known is not None and not again:
            return Made(known, days.result(known["day"]), before=True)
    begun = {"run": secrets.token_hex(16), "plan_hash": plan.hash, "asked": asked}
    days.begin(begun)
    return _finish(begun, plan, parties, days, page, tell)


def for_day(plan: Plan, day: str | None) -> Plan:
    """*plan* as it is run, for one *day* where that is given; raises PlanError for one whose program knows no days."""
    program = REGISTRY.get(plan.program)
    if program is not None and "day" not in program.Params.model_fields:
        raise PlanError(
            "daily.no-days", f"{plan.program} makes no days", field="program",
            remedy="name a program with a param 'day', such as epidemic.daily",
        )  # fmt: skip
    if day is not None:
        try:
            if day != dt.date.fromisoformat(day).isoformat():  # a day has one name in the history
                raise ValueError(day)
        except ValueError:
            raise PlanError("daily.bad-day", "that is no day", field="day", remedy="--day 2020-02-01") from None
        plan = plan.model_copy(update={"params": {**plan.params, "day": day}})
    check_plan(plan)
    return settled(plan)


def _asked_on(days: Days, plan: Plan, asked: str) -> dict[str, Any] | None:
    found = (entry for entry in days.all() if (entry["asked"], entry["plan_hash"]) == (asked, plan.hash))
    return next(found, None)


def _under_way(plan: Plan, parties: Parties, days: Days) -> dict[str, Any] | None:
    """The run of *plan* that was broken off, or only not written down; one of another plan is given up."""
    begun = days.under_way()
    if not begun:
        return None
    status = _status(parties.store, begun["run"])
    if begun["plan_hash"] == plan.hash and status in (*OPEN, "finished", None):
        return begun
    if status in OPEN:
        parties.drop(begun["run"])
    days.end()
    return None


def _status(store: RunStore, run: str) -> str | None:
    return next((str(row["status"]) for row in store.runs() if row["run"] == run), None)


def _finish(begun: Mapping[str, Any], plan: Plan, parties: Parties, days: Days, page: Page, tell: Event) -> Made:
    """Drive a run to its end, and keep its day."""
    run, store = str(begun["run"]), parties.store
    status = _status(store, run)
    try:
        if status is None:
            parties.begin(run, plan)
        if status != "finished":
            parties.drive(run, tell)
    except AtollError:
        if _status(store, run) not in OPEN:
            days.end()
        raise
    result, _ = store.result(run)
    told = of_day(result)
    ledgers = days.folder / "ledger"
    parties.export_ledgers(ledgers)
    shown = details(plan, store.metrics(run), store.rounds(run), {})
    shown["releases"] = {path.stem: releases(path, run) for path in sorted(ledgers.glob("*.jsonl"))}
    shown["releases"].pop("coordinator", None)
    shown["curves"] = result.pop("curves", {})
    why = {one["site"]: f"{one['message']} → {one['remedy']}" for one in told.get("problems") or []}
    absent = {site: parties.missing.get(site) or why.get(site) or "" for site in told.get("absent") or []}
    entry = {**begun, **{name: told.get(name) for name in ("day", "partial", "late")}, "absent": absent}
    entry |= {"joint": told.get("joint"), "seconds": result["seconds"], "note": store.run(run)["note"]}
    entry["made"] = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")

    def write(folder: Path) -> None:
        write_json(folder / "result.json", result)
        page(folder / "report.html", result, shown)

    days.keep(plan.name, entry, write)
    days.end()
    return Made(entry, result, before=False)


def of_day(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a result's output tells of its day; raises ProtocolError where it does not."""
    for told in (result.get("output") or {}).values():
        if isinstance(told, dict) and isinstance(told.get("day"), str):
            return told
    raise ProtocolError("daily.no-day", "the program's result tells no day", field="program")


# ---------------------------------------------------------------- who makes it


class OnThisMachine:
    """The sandbox, whose parties last. missing: sites whose table cannot be reached, and why; they are absent."""

    def __init__(
        self, plan: Plan, sources: Mapping[str, SourceSpec], base: Path, out: Path,
        transport: Literal["local", "grpc"], keep: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """base: what the sources' paths are relative to. keep: see :class:`LastingSandbox`."""
        allow(asked_in(plan.params))  # it is one's own
        self._plan, self._sources, self._base, self._transport = plan, sources, base, transport
        self._tables: dict[str, SiteData] = {}
        self.missing: dict[str, str] = {}
        self._last: dict[str, dt.date | None] = {}
        for site, spec in sources.items():
            try:
                self._last[site] = last_day(spec, plan, base)
            except AtollError as error:
                if not (isinstance(error, SchemaError) and error.code.startswith("source.")):
                    raise error.at(site=site) from None
                self.missing[site] = str(error)
        self._lasting = LastingSandbox(out / "parties", plan, sources, base, keep)
        self.store = self._lasting.store

    def newest(self, *, exactly: bool) -> str:
        """The latest day that most sites have; exactly: that the program would choose, if it says that it can
        (``newest_day``). Raises SchemaError where none has any."""
        if exactly and (choose := getattr(build(self._plan.program, self._plan.params), "newest_day", None)):
            chosen: str | None = choose(self._table(site).base() for site in self._last)
            if chosen is not None:
                return chosen
        days = sorted((day for day in self._last.values() if day is not None), reverse=True)
        if not days:
            raise SchemaError(
                "daily.no-rows", "no site has a table with a day in it", field="sites",
                remedy="check the sites' sources; the schema needs a column of role time",
            )  # fmt: skip
        return str(days[len(days) // 2])

    def begin(self, run: str, plan: Plan) -> None:
        """Submit a run of that id, for all sites."""
        self.store.create_run(among(plan, self._sources), tuple(self._sources), run, HELD)

    def drive(self, run: str, tell: Event) -> None:
        """Return when the run has finished."""
        plan = self.store.run(run)["plan"]
        same = (plan.table, plan.recipe, plan.run) == (self._plan.table, self._plan.recipe, self._plan.run)
        self._lasting.drive(run, list(self._last), self._transport, tell, self._table if same else None)

    def _table(self, site: str) -> SiteData:
        if site not in self._tables:
            try:
                self._tables[site] = SiteData.read(self._sources[site], self._plan, self._base, site)
            except AtollError as error:
                raise error.at(site=site) from None
        return self._tables[site]

    def drop(self, run: str) -> None:
        """Give up an open run."""
        self._lasting.drop(run)

    def export_ledgers(self, folder: Path) -> None:
        """Write every party's ledger."""
        self._lasting.export_ledgers(folder)

    def close(self) -> None:
        """Give back what is open."""
        self._lasting.close()


class Federation:
    """A live federation, by its coordinator's folder: runs are submitted to the coordinator that runs there."""

    def __init__(self, home: CoordinatorHome) -> None:
        self._home, self.store = home, home.store()
        self.missing: dict[str, str] = {}
        allow(home.config.models)

    def newest(self, *, exactly: bool) -> None:
        """Not known without asking."""

    def begin(self, run: str, plan: Plan) -> None:
        """Submit a run of that id. Raises PlanError when fewer sites are enrolled than the plan demands."""
        sites = plan.cohort.sites or tuple(self.store.roster())
        if len(sites) < plan.cohort.min_sites:
            raise PlanError(
                "cohort.too-small", f"the plan demands {plan.cohort.min_sites} sites, and {len(sites)} are enrolled",
                field="cohort.min_sites", remedy="enrol more sites, or lower min_sites",
            )  # fmt: skip
        self.store.create_run(plan, sites, run)

    def drive(self, run: str, tell: Event) -> None:
        """Return when the run has finished; raises TransportError when for long nothing happens to it: it stays open,
        and the next call waits for it again."""
        patience_s = PICKED_UP_S + 5 * self.store.run(run)["plan"].run.deadline_s
        before: tuple[Any, ...] = ()
        since = time.monotonic()
        while (row := self.store.run(run))["status"] in OPEN:
            rounds = self.store.rounds(run)
            for finished in rounds[before[0] if before else 0 :]:
                tell({"run": run, "round": finished["number"], "name": finished["name"]})
            if (now := (len(rounds), row["status"], row["note"])) != before:
                before, since = now, time.monotonic()
            if time.monotonic() - since > (PICKED_UP_S if row["status"] == "submitted" else patience_s):
                raise self._idle(row)
            time.sleep(0.1)
        if row["status"] != "finished":
            raise ProtocolError("run.failed", row["note"] or f"the run is {row['status']}").at(trace=run)

    def _idle(self, row: Mapping[str, Any]) -> TransportError:
        if row["status"] == "submitted":
            return TransportError(
                "daily.no-coordinator", "the coordinator did not take up the run", field="home",
                remedy=f"start it: atoll coordinator up --home {self._home.folder}; then call again",
            )  # fmt: skip
        return TransportError(
            "daily.no-progress", row["note"] or "the run makes no progress", field="home",
            remedy="see atoll coordinator status; the next call goes on with the same run",
        ).at(trace=row["run"])  # fmt: skip

    def drop(self, run: str) -> None:
        """Give up an open run."""
        self.store.request_cancel(run)

    def export_ledgers(self, folder: Path) -> None:
        """Write the coordinator's ledger; the sites have their own."""
        folder.mkdir(parents=True, exist_ok=True)
        self.store.export_ledger(folder / "coordinator.jsonl")

    def close(self) -> None:
        """Give back what is open."""
        self.store.close()
