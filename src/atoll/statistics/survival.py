"""Kaplan–Meier curves and the log-rank test, on an agreed time grid.

Sources: Kaplan & Meier 1958 (product limit); Greenwood 1926 (variance); Kalbfleisch & Prentice 2002, §1.4 (confidence
limits on the scale log(−log S)); Mantel 1966 and Peto & Peto 1972 (log-rank, for any number of groups).

Parties: sites and coordinator. Messages: one round, one Sum of events and censored rows up to each end of an
interval (…, end], by group. Every number equals the pooled estimate with durations rounded up to the reported
*times*. ``exact``: each interval holds one possible time (integers, or a code list), so nothing is
rounded. Else the curve can only be too high, because censored rows count as at risk for the whole interval:
the pooled curve lies, at each reported time, between *survival_lowest* and *survival* (all censored
rows leave before, or after, the interval's events).

Small groups. No single event's time is told: a site that others see alone (``site.min_group_size`` = k > 1) tells
its counts at an end only where both parts of the time axis beside it hold nobody or k events, and nobody or k censored
rows, of that group, and the first and the last part at least k rows, so that neither the shortest nor the longest
duration is told (``statistics.cuts``); the coordinator keeps what every site told and what
passes the same test for the cohort. Small intervals are thus merged (*note*). The log-rank test uses the
ends that all groups share. A site whose group has fewer than k events (and more than none), or k censored
rows, is left out of that group, and counted in *withheld_sites*.

Under noise the counts of each interval are asked for (round "cells"), as one record changes one of them but all
cumulative ones after it; these are then made to rise, by least squares.

The coordinator learns, of the cohort's total: events and censored rows by group up to each end, and rows left out for
a missing duration, event or group; under ``plain`` each site's, cut as above. Threat model: as the plan's
protection. Dropout: the survivors' curves. Cost: one round, 24 · (intervals + 1) bytes a group and site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import Cells
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Summed, Task, count, real, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.cuts import halving, kept
from atoll.statistics.noise import NOISED, NOTHING, cumulated, only_summed, smallest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PEOPLE = Cells("people", "withheld", values=("below",), lines=(1,))
LEFT_OUT = Cells("left_out", "left_out_withheld")
MOST = 4096
"""So many possible times get an interval each; more are put into 100 intervals."""
MERGED = "intervals were merged, because fewer than the smallest group that may be told were in them"
SMALL = "withheld: fewer events or censored rows than the smallest group that may be told"


@program("statistics.survival", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Survival:
    """Kaplan–Meier survival curves with confidence limits, and the log-rank test, by one Sum."""

    class Params(ProgramParams):
        """duration: numeric column. event: column with values [0, 1], 0 for censored. group: column with a code
        list (default: all rows are one group). intervals: so many of equal width over the duration's range
        (default: one for each possible time of integers and code lists, else 100); edges: their ends instead,
        increasing, in the column's unit. confidence: of the limits."""

        duration: str
        event: str
        group: str = ""
        intervals: int | None = Field(default=None, ge=1, le=100_000)
        edges: tuple[float, ...] = ()
        confidence: float = Field(default=0.95, gt=0, lt=1)

    def __init__(self, params: Params) -> None:
        self.params = params

    def _times(self, schema: TableSchema) -> tuple[Floats, Floats | None]:
        """(ends of the intervals, all possible times or None); raises PlanError for columns that do not fit."""
        asked, columns = self.params, schema.columns
        duration, event = columns.get(asked.duration), columns.get(asked.event)
        if duration is None or asked.duration not in schema.numeric_columns():
            raise PlanError("plan.bad-column", "survival needs a numeric duration", field=asked.duration)
        if event is None or asked.event not in schema.numeric_columns() or set(event.values or ()) != {0, 1}:
            raise PlanError("plan.bad-column", "survival needs an event column with values [0, 1]", field=asked.event)
        group = columns.get(asked.group)
        if asked.group and (group is None or group.role == "ignore" or group.values is None):
            raise PlanError("plan.bad-column", "groups are made by a column with a code list", field=asked.group)
        low, high = duration.bounds()
        possible: Floats | None = None
        if duration.values is not None:
            possible = np.unique(np.array(duration.values, np.float64))
        elif duration.dtype == "integer" and math.ceil(low) <= math.floor(high) < math.ceil(low) + MOST:
            possible = np.arange(math.ceil(low), math.floor(high) + 1, dtype=np.float64)
        if asked.edges:
            ends = np.array(asked.edges, np.float64)
            if (np.diff(ends) <= 0).any() or ends[0] < low or ends[-1] > high:
                raise PlanError("plan.bad-edges", "edges must increase within the schema's range", field=asked.duration)
            return np.append(ends, [high] if ends[-1] < high else []), possible
        if asked.intervals is None and possible is not None:
            return possible, possible
        return np.linspace(low, max(high, low), (asked.intervals or 100) + 1)[1:], possible

    def _groups(self, schema: TableSchema) -> tuple[Any, ...]:
        return tuple(schema.columns[self.params.group].values or ()) if self.params.group else ("all",)

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"survival": {"duration", "event", "group", "exact", "confidence", "left_out", "curves": {group:
        {"rows", "events", "censored", "times", "at_risk", "events_at", "censored_at", "survival", "survival_lowest",
        "variance", "low", "high", "median", "median_after", "withheld_sites", "note"}}, "logrank": {"chi_square",
        "degrees_of_freedom", "p_value", "groups", "note"}}}.

        The curves' lists have one element for each reported time. median: first time at which survival is at most a
        half, None if there is none; the median's event lies after median_after. variance, low and high are NaN where
        they are undefined (survival 0 or 1).
        """
        (ends, possible), groups = self._times(cohort.schema), self._groups(cohort.schema)
        rows, size = cohort.schema.max_rows, len(groups)
        fields = {
            "people": count((size, 2), bound=rows),
            "withheld": withheld((size, 2)),
            "below": count((size, 2, len(ends) - 1), bound=rows),
            "told": count((size, len(ends) - 1), bound=1),
            "telling": count(size, bound=1),
            "left_out": count(1, bound=rows),
            "left_out_withheld": withheld(1),
        }
        if cohort.exact:
            total = yield Round("survival", Sum(), fields)
        else:
            noisy = {"cells": real((size, 2, len(ends)), bound=rows, step=1), "left_out": fields["left_out"]}
            total = _as_told((yield Round("cells", Sum(), noisy)))
        fewest = smallest(cohort)
        curves, tested = {}, []
        for g, name in enumerate(groups):
            people, below, telling = total["people"][g], total["below"][g].T, int(total["telling"][g])
            order = [place for place in halving(len(ends) - 1) if total["told"][g, place] == telling]
            cuts = kept(below, people, order, fewest)
            small = bool(((people > 0) & (people < fewest)).any())
            if people.any() and not small:
                tested.append((str(name), people, below, set(cuts)))
            curve = {"withheld_sites": total.members - telling, "note": ""}
            if small:
                curves[str(name)] = curve | {"note": SMALL}
                continue
            table = Intervals.of(ends, people, below, cuts)
            note = MERGED if len(cuts) < len(ends) - 1 else "" if cohort.exact else NOISED
            curves[str(name)] = curve | table.curve(possible, self.params.confidence) | {"note": note}
        hidden = LEFT_OUT.hidden(total, fewest)[0]
        return {
            "survival": {
                **self.params.model_dump(include={"duration", "event", "group", "confidence"}),
                "exact": cohort.exact and _resolved(ends, possible) and not any(c["note"] for c in curves.values()),
                "left_out": None if hidden else int(total["left_out"][0]),
                "curves": curves,
                "logrank": _logrank(ends, tested),
            }
        }

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        reached = touches(len(self._times(schema)[0]) - 1)
        told = dict.fromkeys(("withheld", "told", "telling", "left_out_withheld"), NOTHING)
        return {**told, "people": touches(), "below": reached, "left_out": touches()}

    def _per_record_of_cells(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"cells": touches(), "left_out": touches()}

    @handler("survival", cells=(PEOPLE, LEFT_OUT), record=_per_record)
    def survival(self, site: SiteView, task: Task) -> Reply:
        """At the site: events and censored rows up to each end of an interval, where the groups between are large."""
        counts, left_out = self._counted(site)
        size, _, intervals = counts.shape
        below, people = np.cumsum(counts, axis=2)[:, :, :-1], counts.sum(axis=2)
        told = np.zeros((size, intervals - 1), np.int64)
        for g in range(size):
            told[g, kept(below[g].T, people[g], halving(intervals - 1), site.min_group_size)] = 1
        return {
            "people": people,
            "below": below * told[:, None],
            "told": told,
            "telling": ((people == 0) | (people >= site.min_group_size)).all(axis=1).astype(np.int64),
            "left_out": np.array([left_out]),
        }

    @handler("cells", record=_per_record_of_cells)
    def cells(self, site: SiteView, task: Task) -> Reply:
        """At the site: events and censored rows in each interval."""
        only_summed(site)
        counts, left_out = self._counted(site)
        return {"cells": counts, "left_out": np.array([left_out])}

    def _counted(self, site: SiteView) -> tuple[Ints, int]:
        """(events and censored rows in each interval, [groups, 2, intervals]; rows left out)."""
        table = site.table
        (ends, _), size = self._times(table.schema), len(self._groups(table.schema))
        duration, event = table[self.params.duration], table[self.params.event]
        group = table.codes(self.params.group) if self.params.group else np.zeros(len(table), np.int32)
        known = ~(np.isnan(duration) | np.isnan(event)) & (group >= 0)
        place = np.minimum(np.searchsorted(ends, duration[known]), len(ends) - 1)
        place += (group[known] * 2 + (event[known] == 0)) * len(ends)
        counts = np.bincount(place, minlength=size * 2 * len(ends)).reshape(size, 2, len(ends))
        return counts, len(table) - int(known.sum())


def _as_told(total: Summed) -> Summed:
    """Noisy cells as the exact round tells them: cumulative, at every end, by all sites."""
    reached, sites = cumulated(total["cells"]), total.members
    size, ends = len(reached), reached.shape[2] - 1
    told = {"told": np.full((size, ends), sites), "telling": np.full(size, sites), "left_out": total["left_out"]}
    marks = {"withheld": np.zeros((size, 2)), "left_out_withheld": np.zeros(1)}
    return Summed({**told, **marks, "people": reached[..., -1], "below": reached[..., :-1]}, total.sites, total.behind)


class Intervals:
    """Events and censored rows of one group in intervals up to *times*, and how many were *at_risk* in each."""

    def __init__(self, starts: Floats, times: Floats, events: Ints, censored: Ints) -> None:
        self.starts, self.times, self.events, self.censored = starts, times, events, censored
        left = events + censored
        self.at_risk = left.sum() - np.cumsum(left) + left

    @staticmethod
    def of(ends: Floats, people: Ints, below: Ints, cuts: list[int]) -> Intervals:
        """From cumulative counts *below* [ends − 1, 2], of which those at *cuts* are right."""
        counts = np.diff(below[cuts], axis=0, prepend=np.zeros((1, 2), np.int64), append=people[None])
        times = ends[[*cuts, len(ends) - 1]]
        return Intervals(np.append(-np.inf, times[:-1]), times, counts[:, 0], counts[:, 1])

    def curve(self, possible: Floats | None, confidence: float) -> dict[str, Any]:
        """The Kaplan–Meier curve; *possible* are all times that there can be, None if any."""
        n, d, c = (values.astype(np.float64) for values in (self.at_risk, self.events, self.censored))
        with np.errstate(divide="ignore", invalid="ignore"):
            survival = np.cumprod(np.where(n > 0, 1 - d / n, 1.0))
            single = np.zeros(len(n), bool)
            if possible is not None:
                single = np.diff(np.searchsorted(possible, np.append(-np.inf, self.times), "right")) <= 1
            lowest = np.cumprod(np.where(single | (n == 0), 1 - d / n, np.where(d > 0, 1 - d / (n - c), 1.0)))
            lowest = np.where(np.isnan(lowest), survival, lowest)
            spread = np.cumsum(np.where(n > 0, d / (n * (n - d)), 0.0))
            variance = np.where(survival > 0, survival**2 * spread, np.nan)
            reach = scipy.stats.norm.ppf((1 + confidence) / 2) * np.sqrt(spread) / np.abs(np.log(survival))
            limits = [np.where(variance > 0, survival ** np.exp(sign * reach), np.nan) for sign in (1, -1)]
        reached = np.flatnonzero(survival <= 0.5 + 1e-12)
        half = int(reached[0]) if len(reached) else None
        after = None if half is None else float(self.starts[half])
        return {
            "rows": int(n[0]),
            "events": int(d.sum()),
            "censored": int(c.sum()),
            "times": self.times,
            "at_risk": self.at_risk,
            "events_at": self.events,
            "censored_at": self.censored,
            "survival": survival,
            "survival_lowest": lowest,
            "variance": variance,
            "low": limits[0],
            "high": limits[1],
            "median": None if half is None else float(self.times[half]),
            "median_after": after if after is not None and math.isfinite(after) else None,
        }


def _resolved(ends: Floats, possible: Floats | None) -> bool:
    """Whether every possible time has an interval of its own, and is its end."""
    return possible is not None and bool(np.isin(possible, ends).all())


def _logrank(ends: Floats, groups: list[tuple[str, Ints, Ints, set[int]]]) -> dict[str, Any] | None:
    """The log-rank test of (name, people, below, cuts) of each group that has rows; None for fewer than two."""
    if len(groups) < 2:
        return None
    shared = sorted(set.intersection(*(cuts for *_, cuts in groups)))
    tables = [Intervals.of(ends, people, below, shared) for _, people, below, _ in groups]
    at_risk = np.array([table.at_risk for table in tables], np.float64)
    events = np.array([table.events for table in tables], np.float64)
    n, d = at_risk.sum(axis=0), events.sum(axis=0)
    use = (d > 0) & (n > 1)
    at_risk, events, n, d = at_risk[:, use], events[:, use], n[use], d[use]
    excess = (events - at_risk * d / n).sum(axis=1)[:-1]
    share = at_risk / n
    scale = d * (n - d) / (n - 1)
    covariance = (np.diag((share * scale).sum(axis=1)) - (share * scale) @ share.T)[:-1, :-1]
    found: dict[str, Any] = {"groups": [name for name, *_ in groups], "degrees_of_freedom": len(groups) - 1}
    if not len(n) or np.linalg.matrix_rank(covariance) < len(covariance):
        return {**found, "chi_square": None, "p_value": None, "note": "undefined: too few events on the shared times"}
    square = float(excess @ np.linalg.solve(covariance, excess))
    note = MERGED if len(shared) < len(ends) - 1 else ""
    return {**found, "chi_square": square, "p_value": float(scipy.stats.chi2.sf(square, len(groups) - 1)), "note": note}


__all__ = ["LEFT_OUT", "PEOPLE", "Intervals", "Survival"]
