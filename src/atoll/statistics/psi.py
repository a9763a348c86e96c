"""Population-stability index (drift): each site against the cohort, or one period against another.

    PSI = Σ_b (q_b − p_b) · ln(q_b / p_b)

Parties: sites and coordinator. Messages: the rounds of ``statistics.quantiles`` for numeric columns,
whose *cuts* near its quantiles are the bins (a code list is its own bins), and one Sum of the people in
each bin. Between sites, the cohort's bins are then broadcast, one Sum counts the sites whose PSI against
them is above 0.1 and above 0.25 (the usual marks of a small and a large shift), and a Gather asks each site
for its own, which stays withheld unless its policy shares "metrics". The coordinator learns, of the
cohort's total: the people in each bin (in each period), and how many sites drifted; under ``plain``
each site's. At the cuts every site has told its count before, so they add nothing; cells that are small,
and their complement along bins and periods, are withheld, and are one bin together, "other". A site takes
no part in a column where fewer than its smallest group have a value (in a period, or without a date). Its
own index is over bins of which small ones, and their complement, are one bin with "other" too. It answers for one set
of bins and one cohort distribution a run. Threat model: as the plan's protection. Dropout: the cohort of
the survivors. Cost: 9 bytes a bin and period, and after it 3 numbers a column, besides the quantiles.

Smoothing: empty bins have no logarithm, so a share is (n_b + s) / (n + s · bins), s = ½ (Jeffreys' prior,
as Krichevsky & Trofimov 1981). Source of index and marks: Siddiqi 2006, Credit Risk Scorecards, ch. 9.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import Cells, suppress
from atoll.contract.errors import PlanError, PolicyError, ProtocolError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Gather, Reply, Round, Steps, Sum, Task, count, real, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.noise import NOTHING, smallest
from atoll.statistics.quantiles import Quantiles

Floats = NDArray[np.float64]
CELLS = Cells("counts", "withheld", lines=(0, 2))
MARKS = (0.1, 0.25)
ABSENT = -1.0
"""In the broadcast counts: a bin that the column does not have, or that is part of "other"."""


def stability_index(expected: Floats, actual: Floats, smoothing: float) -> float:
    """PSI of *actual* against *expected* counts, each [num_bins]; NaN with fewer than two bins, or nobody."""
    if len(expected) < 2 or not expected.sum() or not actual.sum():
        return math.nan
    p, q = ((n + smoothing) / (n.sum() + smoothing * len(n)) for n in (expected, actual))
    return float(((q - p) * np.log(q / p)).sum())


@program(
    "statistics.psi",
    needs={"sum"},
    offers={"bounded", "resolution", "bounded-weight"},
    calls={"statistics.quantiles"},
)
class StabilityIndex:
    """Population-stability index of each column between sites and cohort, or between two periods."""

    class Params(ProgramParams):
        """columns: with a code list, or numeric (default: all such features and labels). between: "sites", or
        "periods": rows before and from the day *cut* of the column *date*. bins: of a numeric column, of about
        equally many people. smoothing: added to each bin. own: also ask each site for its own index."""

        columns: tuple[str, ...] = ()
        between: Literal["sites", "periods"] = "sites"
        date: str = ""
        cut: datetime.date | None = None
        bins: int = Field(default=10, ge=2, le=100)
        smoothing: float = Field(default=0.5, gt=0, le=10)
        own: bool = True

    def __init__(self, params: Params) -> None:
        self.params = params

    def _columns(self, schema: TableSchema) -> tuple[dict[str, int], tuple[str, ...]]:
        """({column with a code list: number of codes}, numeric columns to be binned)."""
        known = {n: c for n, c in schema.columns.items() if c.role != "ignore" and (c.values or c.numeric)}
        names = self.params.columns or tuple(n for n, c in known.items() if c.role in ("feature", "label"))
        codes = {name: len(known[name].values or ()) for name in names if name in known and known[name].values}
        numbers = tuple(name for name in names if name not in codes and name in schema.numeric_columns())
        if bad := sorted(set(names) - set(codes) - set(numbers)):
            raise PlanError(
                "plan.bad-column", "psi needs columns with a code list, or numeric ones", field=", ".join(bad)
            )
        if self.params.between == "periods":
            dated = schema.columns.get(self.params.date)
            if dated is None or dated.dtype not in ("date", "datetime") or dated.role == "ignore":
                raise PlanError("plan.bad-column", "periods need a column of dates", field=self.params.date or "date")
            if self.params.cut is None:
                raise PlanError("plan.bad-value", "periods need the day that the second one begins", field="cut")
        return codes, numbers

    def _shape(self, codes: Mapping[str, int], numbers: tuple[str, ...]) -> tuple[int, int, int]:
        """(periods, columns, most bins): rows without a date are a third period, of which nothing is reported."""
        widest = max([*codes.values(), self.params.bins if numbers else 1])
        return 1 if self.params.between == "sites" else 3, len(codes) + len(numbers), widest

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"psi": {"between", "columns": {name: {"values" or "edges", "counts" (between sites) or
        "before" and "after", "psi" (of after against before) or "sites", "above" {mark: sites}, "note"}},
        "own": {site: {name: its index}}}}.

        counts end with "other", the people of all bins whose own count is None. sites: how many were measured.
        """
        codes, numbers = self._columns(cohort.schema)
        names, shape, rows = [*codes, *numbers], self._shape(codes, numbers), cohort.schema.max_rows
        edges = np.array([[cohort.schema.columns[n].bounds()[1]] * (self.params.bins - 1) for n in numbers], float)
        edges = edges.reshape(len(numbers), self.params.bins - 1)
        cuts: dict[str, list[float]] = {}
        if numbers:
            inner = tuple(j / self.params.bins for j in range(1, self.params.bins))
            asked = Quantiles.Params(columns=numbers, probabilities=inner, error=1e-4, bins=32)
            found = yield from Quantiles(asked).coordinate(cohort)
            for i, name in enumerate(numbers):
                cuts[name] = found["quantiles"]["columns"][name]["cuts"]
                edges[i, : len(cuts[name])] = cuts[name]
        fields = {"counts": count(shape, bound=rows), "total": count(shape[:2], bound=rows)}
        total = yield Round("bins", Sum(), {**fields, "withheld": withheld(shape)}, {"edges": edges})
        hidden = np.logical_or.reduce(CELLS.hidden(total, smallest(cohort)), axis=0)
        people = total["total"] if cohort.exact else total["counts"].sum(axis=-1)
        counts = np.full((*shape[:2], shape[2] + 1), ABSENT)
        for c, name in enumerate(names):
            size = codes.get(name) or len(cuts[name]) + 1
            shown = np.flatnonzero(~hidden[c, :size])
            counts[:, c, shown] = total["counts"][:, c, shown]
            if len(shown) < size:
                counts[:, c, -1] = people[:, c] - total["counts"][:, c, shown].sum(axis=-1)
        small = people < max(smallest(cohort), 1)
        enough = ~(small[:2].any(axis=0) | (small & (people > 0)).any(axis=0))
        counts[:, ~enough] = ABSENT
        columns = {}
        for c, name in enumerate(names):
            described: dict[str, Any] = {"note": "" if enough[c] else "too few people with a value, or without a date"}
            if name in codes:
                described["values"] = list(cohort.schema.columns[name].values or ())
            else:
                low, high = cohort.schema.columns[name].bounds()
                described["edges"] = [low, *cuts[name], high]
            size = codes.get(name) or len(cuts[name]) + 1
            told = [[*period[:size], period[-1]] for period in counts[:, c].tolist()]
            listed = [[None if n == ABSENT else int(n) for n in period] for period in told]
            described |= dict(zip(("counts",) if shape[0] == 1 else ("before", "after"), listed, strict=False))
            columns[name] = described
        if self.params.between == "periods":
            for c, name in enumerate(names):
                before, after = (period[period != ABSENT] for period in counts[:2, c])
                index = stability_index(before, after, self.params.smoothing)
                columns[name]["psi"] = None if math.isnan(index) else index
                if math.isnan(index) and not columns[name]["note"]:
                    columns[name]["note"] = "fewer than two bins to compare"
            return {"psi": {"between": "periods", "cut": str(self.params.cut), "columns": columns}}
        send = {"edges": edges, "cohort": counts[0]}
        marked = {"measured": count(len(names), bound=1), "above": count((len(names), len(MARKS)), bound=1)}
        drifted = yield Round("drift", Sum(), marked, send)
        for c, name in enumerate(names):
            above = dict(zip(map(str, MARKS), drifted["above"][c].tolist(), strict=True))
            columns[name] |= {"sites": int(drifted["measured"][c]), "above": above}
        own: dict[str, dict[str, float | None]] = {}
        if self.params.own and cohort.exact:
            gathered = yield Round("own", Gather(), {"psi": real(len(names))}, send, optional=True)
            for site in gathered:
                each = gathered[site]["psi"].tolist()
                own[site] = {n: None if math.isnan(v) else v for n, v in zip(names, each, strict=True)}
        return {"psi": {"between": "sites", "columns": columns, "own": own}}

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        codes, numbers = self._columns(schema)
        cells = touches(len(codes) + len(numbers))
        return {"counts": cells, "total": cells, "withheld": NOTHING}

    @handler("bins", cells=CELLS, record=_per_record)
    def bins(self, site: SiteView, task: Task) -> Reply:
        """At the site: people in each bin of each column (in each period)."""
        counts = self._counted(site, task)
        return {"counts": counts, "total": counts.sum(axis=-1)}

    @handler("drift")
    def drift(self, site: SiteView, task: Task) -> Reply:
        """At the site: for each column, whether its own index is known, and above each mark."""
        index = self._indices(site, task)
        return {"measured": ~np.isnan(index), "above": index[:, None] > np.array(MARKS)}

    @handler("own", reduce="gather")
    def own(self, site: SiteView, task: Task) -> Reply:
        """At the site: its own index of each column; withheld unless its policy shares "metrics"."""
        if not site.shares("metrics"):
            raise PolicyError("policy.withheld", "the site does not share its own metrics", field="share")
        return {"psi": self._indices(site, task)}

    def _indices(self, site: SiteView, task: Task) -> Floats:
        """The site's index of each column against the cohort's counts, [num_columns]; NaN where not known."""
        counts = self._counted(site, task)[0]
        cohort = task.take("cohort", (counts.shape[0], counts.shape[1] + 1))
        _once(site, "cohort", cohort)
        found = np.full(len(counts), np.nan)
        for c, (mine, theirs) in enumerate(zip(counts, cohort, strict=True)):
            told, small = theirs[:-1] >= 0, suppress(mine, np.zeros(len(mine), bool), site.min_group_size, (0,))
            apart, moved = told & ~small, told & small
            expected, actual = theirs[:-1][apart], mine[apart]
            if theirs[-1] >= 0 or moved.any():
                expected = np.append(expected, max(theirs[-1], 0) + theirs[:-1][moved].sum())
                actual = np.append(actual, mine[~apart].sum())
            found[c] = stability_index(expected, actual, self.params.smoothing)
        return found

    def _counted(self, site: SiteView, task: Task) -> NDArray[np.int64]:
        """People in each bin, [periods, columns, bins]; none where a column has too few."""
        codes, numbers = self._columns(site.table.schema)
        edges = task.take("edges", (len(numbers), self.params.bins - 1))
        _once(site, "edges", edges)
        periods, columns, width = self._shape(codes, numbers)
        counts = np.zeros((periods, columns, width), np.int64)
        when = np.zeros(len(site.table), np.int32)
        if self.params.between == "periods":
            dates = site.table[self.params.date]
            when = np.where(np.isnat(dates), 2, dates >= np.datetime64(str(self.params.cut))).astype(np.int32)
        for c, name in enumerate([*codes, *numbers]):
            if name in codes:
                place = site.table.codes(name)
            else:
                values = site.table[name]
                place = np.searchsorted(np.sort(edges[c - len(codes)]), values, "left").astype(np.int32)
                place[np.isnan(values)] = -1
            known = place >= 0
            cells = np.bincount((when * width + place)[known], minlength=periods * width)
            counts[:, c] = cells.reshape(periods, width)
            people = counts[:, c].sum(axis=-1)
            if ((people > 0) & (people < site.min_group_size)).any():
                counts[:, c] = 0
            site.progress(c + 1, columns)
        return counts


def _once(site: SiteView, name: str, array: Floats) -> None:
    """Answers about many bins of the coordinator's choice would tell single people by their differences."""
    if not np.array_equal(site.state.setdefault(name, array.copy()), array):
        raise ProtocolError("task.array", "a site answers for one set of bins a run", field=name)
