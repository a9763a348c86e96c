"""A fleet: what the sites of a federation are like that need not exist yet. How many rows they have, how fast they
compute, how they are connected, and when they are there.

    fleet: 1
    seed: 7
    sites:
      hospital: {count: 20, rows: {low: 500, high: 5000}, speed: {median: 1, spread: 0.5}, up: 20 Mbit/s}
      clinic: {rows: 300, down: 64 kbit/s, up: 64 kbit/s, latency: 300 ms, trace: night}
    traces:
      night: {period: 24 h, there: [[0 h, 6 h], [22 h, 24 h]]}

Every quantity is a value, or drawn for each site: ``{low, high}`` evenly between them, ``{median, spread}`` from a
log-normal distribution whose logarithm has the standard deviation *spread*, ``{one_of: […]}``, each as likely. Or a CSV
file with a line for each site: ``site,rows,speed,down,up,latency,dropout,away,trace``.
"""

from __future__ import annotations

import contextlib
import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.errors import AtollError, PlanError, refuse_all
from atoll.contract.settings import read_yaml, validate

Floats = NDArray[np.float64]
Kind = Literal["rate", "time", "number", "share"]
RATES = {"bit/s": 1 / 8, "kbit/s": 125.0, "Mbit/s": 125e3, "Gbit/s": 125e6,
         "B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9}  # fmt: skip
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
UNITS: dict[Kind, dict[str, float]] = {"rate": RATES, "time": TIMES, "number": {}, "share": {}}
KINDS: dict[str, Kind] = {
    "rows": "number", "speed": "number", "step": "time", "down": "rate", "up": "rate", "latency": "time",
    "dropout": "share", "away": "time", "phase": "time",
}  # fmt: skip
MOST_SITES = 1_000_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SiteKind(_Part):
    """Sites that are alike. count: how many (more than one are called NAME-1, NAME-2 …). rows: of a site's table.
    speed: against the machine that step times are measured on. step: seconds of a local step instead, whatever the
    machine. down, up: bytes a second, to the site and from it. latency: of one direction. dropout: how likely a site
    vanishes during a task, and away: for how long. trace: when it is there (default: always), begun at phase."""

    count: int = Field(default=1, ge=1, le=MOST_SITES)
    rows: Any = 1000
    speed: Any = 1.0
    step: Any = None
    down: Any = "100 Mbit/s"
    up: Any = "100 Mbit/s"
    latency: Any = "10 ms"
    dropout: Any = 0.0
    away: Any = "10 min"
    phase: Any = "0 s"
    trace: str = ""


class Hub(_Part):
    """The coordinator's own link, which all sites share."""

    down: Any = None
    up: Any = None


class _File(_Part):
    fleet: Literal[1] = 1
    seed: int = Field(default=0, ge=0)
    sites: dict[str, SiteKind] = Field(default_factory=dict)
    traces: dict[str, Any] = Field(default_factory=dict)
    coordinator: Hub = Hub()


@dataclass(frozen=True, slots=True)
class Trace:
    """When a site is there: from ``starts`` to ``ends`` in seconds, ordered, and again every *period_s*."""

    starts: Floats
    ends: Floats
    period_s: float = math.inf

    def next(self, at_s: float) -> float:
        """From when on, at or after *at_s*, it is there; infinity: never again."""
        turns = math.floor(at_s / self.period_s) if self.period_s < math.inf else 0
        before = turns * self.period_s if turns else 0.0
        place = int(np.searchsorted(self.ends, at_s - before, side="right"))
        if place < len(self.starts):
            return max(at_s, before + float(self.starts[place]))
        return before + self.period_s + float(self.starts[0])

    def until(self, at_s: float) -> float:
        """Until when it stays, being there at *at_s*."""
        turns = math.floor(at_s / self.period_s) if self.period_s < math.inf else 0
        before = turns * self.period_s if turns else 0.0
        end = before + float(self.ends[np.searchsorted(self.ends, at_s - before, side="right")])
        whole = self.ends[-1] == self.period_s and self.starts[0] == 0  # it stays over the turn of the period
        if whole and end == before + self.period_s:
            return math.inf if len(self.starts) == 1 else end + float(self.ends[0])
        return end


@dataclass(frozen=True, slots=True)
class Fleet:
    """Sites, each quantity [num_sites]: rows, relative speed, seconds of a step (NaN: as measured), bytes a second
    down and up, seconds of latency, dropout probability, seconds away, phase; trace by number, −1 where always there.
    hub_down, hub_up: bytes a second that the coordinator takes and gives at most."""

    names: tuple[str, ...]
    values: Mapping[str, Floats]
    trace: NDArray[np.int64]
    traces: tuple[Trace, ...] = ()
    seed: int = 0
    hub_down: float = math.inf
    hub_up: float = math.inf

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, quantity: str) -> Floats:
        return self.values[quantity]

    def of(self, sites: Sequence[str]) -> Fleet:
        """These *sites*, by their names; or, where all are called otherwise, as many in order. Raises PlanError."""
        places = {name: place for place, name in enumerate(self.names)}
        known = [places[site] for site in sites if site in places]
        if not known and len(sites) == len(self):
            known = list(range(len(self)))
        if len(known) < len(sites):
            missing = next(site for site in sites if site not in places)
            raise PlanError(
                "fleet.other-sites", f"the fleet has no site {missing!r}", field="sites",
                remedy="name every site of the cohort in the fleet, or describe as many sites as there are",
            )  # fmt: skip
        chosen = np.array(known, np.int64)
        values = {name: value[chosen] for name, value in self.values.items()}
        return Fleet(tuple(sites), values, self.trace[chosen], self.traces, self.seed, self.hub_down, self.hub_up)

    @staticmethod
    def load(path: Path, count: int | None = None) -> Fleet:
        """Read a fleet file, YAML or CSV. count: draw so many sites instead, kinds in the same shares.

        Raises PlanError listing every problem: unknown keys, wrong units, no sites, a site that is never there.
        """
        if path.suffix.lower() == ".csv":
            return Fleet.drawn(_File(sites=_lines(path)), path.parent, count)
        return Fleet.drawn(validate(_File, read_yaml(path, "fleet"), "fleet"), path.parent, count)

    @staticmethod
    def from_json(content: Mapping[str, Any], base: Path = Path(), count: int | None = None) -> Fleet:
        """As :meth:`load`, from what a fleet file holds; trace files are relative to *base*."""
        return Fleet.drawn(validate(_File, dict(content), "fleet"), base, count)

    @staticmethod
    def drawn(file: _File, base: Path, count: int | None) -> Fleet:
        """Every site of the file, its quantities drawn by the file's seed, one stream for each kind and quantity."""
        if not file.sites or (count is not None and count < 1):
            raise PlanError("fleet.empty", "the fleet has no sites", field="sites",
                            remedy="describe at least one: sites: {hospital: {count: 10}}")  # fmt: skip
        problems: list[AtollError] = []
        traces = {name: _collected(problems, lambda n=name, v=value: _trace(n, v, base)) for name, value in
                  file.traces.items()}  # fmt: skip
        numbers = _shared([kind.count for kind in file.sites.values()], count)
        names: list[str] = []
        values: dict[str, list[Floats]] = {quantity: [] for quantity in KINDS}
        which: list[NDArray[np.int64]] = []
        for (name, kind), many in zip(file.sites.items(), numbers, strict=True):
            names += [name] if many == 1 and kind.count == 1 else [f"{name}-{i}" for i in range(1, many + 1)]
            if kind.trace and kind.trace not in traces:
                problems.append(PlanError("fleet.unknown-trace", f"there is no trace {kind.trace!r}",
                                          field=f"sites.{name}.trace", remedy="describe it under traces"))  # fmt: skip
            which.append(np.full(many, list(traces).index(kind.trace) if kind.trace in traces else -1))
            for order, (quantity, unit) in enumerate(KINDS.items()):
                random = np.random.Generator(
                    np.random.Philox(np.random.SeedSequence((file.seed, order, *name.encode())))
                )
                where, given = f"sites.{name}.{quantity}", getattr(kind, quantity)
                drawn = _collected(problems, lambda g=given, u=unit, w=where, r=random, m=many: _draw(g, u, w, r, m))
                values[quantity].append(np.full(many, np.nan) if drawn is None else drawn)
        hub = [_collected(problems, lambda side=side: _draw(getattr(file.coordinator, side), "rate",
               f"coordinator.{side}", np.random.default_rng(0), 1)) for side in ("down", "up")]  # fmt: skip
        refuse_all(PlanError, "fleet.invalid", problems)
        down, up = (math.inf if one is None or np.isnan(one[0]) else float(one[0]) for one in hub)
        made = {quantity: np.concatenate(parts) for quantity, parts in values.items()}
        known = tuple(trace for trace in traces.values() if trace is not None)
        return Fleet(tuple(names), made, np.concatenate(which), known, file.seed, down, up)


def _collected(problems: list[AtollError], make: Any) -> Any:
    """What *make* makes; None, and its error among the problems, where it makes none."""
    try:
        return make()
    except AtollError as error:
        problems.append(error)
        return None


def _shared(counts: Sequence[int], total: int | None) -> list[int]:
    """*total* in the shares of *counts*, by largest remainder; the counts themselves without a total."""
    if total is None:
        return list(counts)
    exact = np.array(counts) * total / sum(counts)
    found = np.floor(exact).astype(int)
    for place in np.argsort(found - exact, kind="stable")[: total - int(found.sum())]:
        found[place] += 1
    return [int(number) for number in found]


def quantity(value: Any, kind: Kind, where: str) -> float:
    """*value* in bytes a second, seconds, or as it is. Raises PlanError for a wrong unit or sign."""
    units = UNITS[kind]
    number: float | None = None
    if not units and isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif units and isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(\S+)\s*", value)):
        factor = units.get(match[2])
        try:
            number = None if factor is None else float(match[1]) * factor
        except ValueError:
            number = None
    if number is None:
        written = f"a number and a unit: {', '.join(units)}" if units else "a number"
        raise PlanError("fleet.unit", f"{where} needs {written}", field=where,
                        remedy='write it like "64 kbit/s"' if kind == "rate" else
                        'write it like "20 ms"' if kind == "time" else "write a plain number")  # fmt: skip
    least_allowed = number > 0 if kind == "rate" or where.endswith(".speed") else number >= 0
    if not math.isfinite(number) or not least_allowed or (kind == "share" and number > 1):
        raise PlanError("fleet.range", f"{where} is beyond what it can be", field=where,
                        remedy="rates and speeds are above 0, probabilities at most 1, all else 0 or more")  # fmt: skip
    return number


def _draw(given: Any, kind: Kind, where: str, random: np.random.Generator, many: int) -> Floats:
    """A quantity of so many sites, [many]; NaN where none is given."""
    if given is None:
        return np.full(many, np.nan)
    match given:
        case {"low": low, "high": high, **rest} if not rest:
            return random.uniform(quantity(low, kind, where), quantity(high, kind, where), many)
        case {"median": median, "spread": spread, **rest} if not rest:
            middle, width = quantity(median, kind, where), quantity(spread, "number", where)
            drawn = middle * np.exp(width * random.standard_normal(many))
            return np.minimum(drawn, 1.0) if kind == "share" else drawn
        case {"one_of": [*these], **rest} if these and not rest:
            return random.choice([quantity(one, kind, where) for one in these], many)
        case dict() | list():
            raise PlanError("fleet.draw", f"{where} is drawn in no way that is known", field=where,
                            remedy="give a value, {low, high}, {median, spread} or {one_of: […]}")  # fmt: skip
    return np.full(many, quantity(given, kind, where))


def _trace(name: str, given: Any, base: Path) -> Trace:
    """A trace as the file describes it, or the CSV file with columns start_s and end_s that it names."""
    where, period = f"traces.{name}", math.inf
    if isinstance(given, str):
        rows = _csv(base / given)
        try:
            spans = [(float(row["start_s"]), float(row["end_s"])) for row in rows]
        except (KeyError, TypeError, ValueError):
            raise PlanError("fleet.trace", f"{given} needs numbers in columns start_s and end_s", field=where) from None
    elif isinstance(given, dict) and given.keys() <= {"period", "there"} and isinstance(given.get("there"), list):
        period = quantity(given["period"], "time", f"{where}.period") if "period" in given else math.inf
        if any(not isinstance(span, list) or len(span) != 2 for span in given["there"]):
            raise PlanError("fleet.trace", f"{where} lists spans [start, end]", field=where)
        spans = [(quantity(a, "time", where), quantity(b, "time", where)) for a, b in given["there"]]
    else:
        raise PlanError("fleet.trace", f"{where} is no trace", field=where,
                        remedy="give {period: 24 h, there: [[0 h, 6 h]]}, or a CSV file's name")  # fmt: skip
    if not spans:
        raise PlanError("fleet.never-there", f"a site with the trace {name!r} is never there", field=where,
                        remedy="give it at least one span of time, or leave such sites out")  # fmt: skip
    spans.sort()
    flat = [edge for span in spans for edge in span]
    if any(a >= b for a, b in spans) or flat != sorted(flat) or flat[-1] > period:
        raise PlanError("fleet.trace", f"the spans of {where} overlap, end before they start, or leave the period",
                        field=where, remedy="order them within the period")  # fmt: skip
    starts, ends = np.array(spans).T
    return Trace(starts, ends, period)


def _csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise PlanError("plan.missing-file", f"there is no CSV file {path}", field=path.name,
                        remedy="check the path") from None  # fmt: skip


def _lines(path: Path) -> dict[str, SiteKind]:
    """The sites of a CSV file; empty cells are as by default."""
    found: dict[str, SiteKind] = {}
    for row in _csv(path):
        given: dict[str, Any] = {name: cell for name, cell in row.items() if cell and name != "site"}
        for name in given.keys() & {"rows", "speed", "dropout"}:
            with contextlib.suppress(ValueError):  # it is refused with its place
                given[name] = float(given[name])
        name = row.get("site") or ""
        if not name or name in found:
            raise PlanError("fleet.site", "every line of a fleet needs a site's name of its own", field="site")
        found[name] = validate(SiteKind, given, f"site {name}")
    return found
