"""Describe: count, missing, mean, variance and protected extremes of every numeric column.

Parties: sites and coordinator. Messages: one round, one Sum; a second one, about the mean,
where a column's spread is so small that the first lost digits. The coordinator learns, of
the cohort's total: rows, non-missing counts, first and second moments, and a histogram
over the schema's range; under ``plain`` also each site's share of them. Minimum and
maximum are never released: ``low`` and ``high`` are the outer edges of the outermost
histogram bins that, counted from that end, hold at least *tail_rows* rows; the returned
histogram ends there too, with the rows beyond counted in its outer bins. A column with few values, or
with a total that few people make, is withheld, and so are histogram bins with few people. Threat model:
as the plan's protection. Dropout: the statistics of the survivors. Cost: one round (or two),
(bins + 3) · 8 + bins bytes a column and site.

Moments are taken about the middle m of the schema's range, in units of half of it:
S1 = Σz and S2 = Σz² with z = (x − m)/h. Shifted data keep their digits (Chan, Golub &
LeVeque 1983, §1) unless the standard deviation is below a thousandth of the mean's
distance from m; then the mean itself is the shift (the corrected two-pass algorithm, ibid.).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import TOP, Cells, largest, suppress
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, TableView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, real, taken, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.moments import LOST, SLICE, add_largest
from atoll.statistics.noise import NOTHING, coarse, fine, powers, reach, smallest

VALUES = Cells("count", "withheld", ("s1", "s2"), largest="largest")
BINS = Cells("histogram", "hidden", lines=(1,))


def _grid(schema: TableSchema, names: tuple[str, ...]) -> tuple[Array, Array]:
    """(lowest, highest), each [num_columns], from the schema; raises PlanError for other columns."""
    if bad := sorted(set(names) - set(schema.numeric_columns())):
        raise PlanError("plan.bad-column", "describe needs numeric columns of the schema", field=", ".join(bad))
    low, high = np.array([schema.columns[name].bounds() for name in names], float).reshape(-1, 2).T
    return low, np.where(high > low, high, low + 1)


@program("statistics.describe", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Describe:
    """Count, missing, mean, variance, and minimum/maximum as protected bounds, by one Sum."""

    class Params(ProgramParams):
        """columns: numeric columns (default: all). bins: histogram bins over the schema's range.
        tail_rows: rows that the outermost bins must hold before they bound minimum or maximum."""

        columns: tuple[str, ...] = ()
        bins: int = Field(default=32, ge=1, le=4096)
        tail_rows: int = Field(default=5, ge=1)

    def __init__(self, params: Params) -> None:
        self.params = params

    def _names(self, schema: TableSchema) -> tuple[str, ...]:
        return self.params.columns or schema.numeric_columns()

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"columns": {name: {...}}, "rows": total rows}; low, high and the histogram between
        them are NaN and empty for columns with fewer than 2 · tail_rows values. A bin that is withheld is None, and
        count and missing are NaN where too few cells are missing; of a column that is withheld at any site all
        is NaN, and "withheld" is True."""
        names, rows = self._names(cohort.schema), cohort.schema.max_rows
        low, high = _grid(cohort.schema, names)
        size, middle, half = len(names), (low + high) / 2, (high - low) / 2
        fields = {"rows": count(bound=rows), "count": count(size, bound=rows)}
        step = fine(rows, 20) if cohort.exact else coarse(1.0)
        fields |= dict.fromkeys(("s1", "s2"), real(size, bound=rows, step=step))
        fields["withheld"] = withheld(size)
        bins = (size, self.params.bins)
        histogram = {"histogram": count(bins, bound=rows), "hidden": withheld(bins)}
        total = yield Round("moments", Sum(), {**fields, **histogram})
        gone = VALUES.hidden(total, smallest(cohort))
        all_rows, counts = int(total["rows"]), np.where(gone, 0, total["count"])
        mean, variance = _moments(total, middle, half)
        if not cohort.exact:
            mean = np.clip(mean, low, high)
        elif (variance < LOST * total["s2"] * half**2 / np.maximum(counts, 1)).any():
            center = np.where(counts > 0, mean, middle)
            bounds = {"s1": 2.0 * rows, "s2": 4.0 * rows}
            fields |= {name: real(size, bound=bound, step=fine(bound, 40)) for name, bound in bounds.items()}
            spread = yield Round("spread", Sum(), fields, {"center": center})
            gone |= VALUES.hidden(spread, smallest(cohort))
            mean, variance = _moments(spread, center, half)
        columns = {}
        for i, name in enumerate(names):
            n, hidden = int(counts[i]), total["hidden"][i] > 0
            missing = 0 if gone[i] else max(all_rows - n, 0)
            few = 0 < missing < smallest(cohort)
            described = self._tails(
                n, float(low[i]), float(high[i]), total["histogram"][i], hidden, missing if few else 0, cohort
            )
            moments = {"mean": float(mean[i]), "variance": float(variance[i]), "std": math.sqrt(variance[i])}
            counted: dict[str, Any] = {"rows": all_rows, "count": n, "missing": max(all_rows - n, 0)}
            if gone[i] or few:
                counted |= {"count": math.nan, "missing": math.nan}
            if gone[i]:
                counted["withheld"] = True
                moments = dict.fromkeys(moments, math.nan)
            columns[name] = {**counted, **moments, **described}
        return {"columns": columns, "rows": all_rows}

    def _tails(
        self, n: int, low: float, high: float, histogram: Array, hidden: NDArray[np.bool_], few: int, cohort: Cohort
    ) -> dict[str, Any]:
        """The histogram between its tails. few: missing cells, where they are so few that bins must not tell them."""
        edges = np.linspace(low, high, self.params.bins + 1)
        bins, tail = histogram.copy(), self.params.tail_rows
        enough = (
            min(n, bins.sum()) >= 2 * tail
        )  # with fewer, the two tails would overlap, and their ends show single rows
        first = int(np.searchsorted(np.cumsum(bins), tail)) if enough else 0
        end = len(bins) - int(np.searchsorted(np.cumsum(bins[::-1]), tail)) if enough else 0
        if enough:
            below, above = bins[:first].sum(), bins[end:].sum()
            bins[first] += below
            bins[end - 1] += above
        shown = np.append(bins[first:end], few)
        hidden = suppress(shown, np.append(hidden[first:end], False), smallest(cohort), (0,))[:-1]
        return {
            "low": float(edges[first]) if enough else math.nan,
            "high": float(edges[end]) if enough else math.nan,
            "edges": edges[first : end + 1].tolist() if enough else [],
            "histogram": [None if gone else int(rows) for rows, gone in zip(shown[:-1], hidden, strict=True)],
        }

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        size = len(self._names(schema))
        told = {"rows": touches(), "count": touches(size), "s1": touches(size), "s2": touches(size)}
        return {**told, "withheld": NOTHING, "histogram": touches(size), "hidden": NOTHING}

    def _per_record_about(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        names = self._names(schema)
        low, high = _grid(schema, names)
        center = taken(sent, "center", (len(names),))
        s1, s2 = powers(reach(low, high, center, (high - low) / 2))
        return {"rows": touches(), "count": touches(len(names)), "s1": s1, "s2": s2, "withheld": NOTHING}

    @handler("moments", groups=("rows",), cells=(VALUES, BINS), record=_per_record)
    def moments(self, site: SiteView, task: Task) -> Reply:
        """At the site: counts, moments about the middle of the range, and histogram of each column."""
        names, bins = self._names(site.table.schema), self.params.bins
        low, high = _grid(site.table.schema, names)
        histogram = np.zeros((len(names), bins), np.int64)
        for i, name in enumerate(names):
            for values in _pieces(site.table[name]):
                place = np.floor((values - low[i]) / (high[i] - low[i]) * bins).astype(np.int64)
                histogram[i] += np.bincount(np.clip(place, 0, bins - 1), minlength=bins)
        return {**self._sums(site, (low + high) / 2), "histogram": histogram}

    @handler("spread", groups=("rows",), cells=VALUES, record=_per_record_about)
    def spread(self, site: SiteView, task: Task) -> Reply:
        """At the site: counts and moments of each column about the cohort's mean."""
        return self._sums(site, task.take("center", (len(self._names(site.table.schema)),)))

    def _sums(self, site: SiteView, center: Array) -> dict[str, Any]:
        """Counts, Σz and Σz² of z = (x − center) / half the range, for each column."""
        table: TableView = site.table
        names = self._names(table.schema)
        low, high = _grid(table.schema, names)
        counts, s1, s2 = np.zeros(len(names), np.int64), np.zeros(len(names)), np.zeros(len(names))
        most = np.zeros((len(names), TOP + 1))
        for i, name in enumerate(names):
            for values in _pieces(table[name]):
                shifted = (values - center[i]) / ((high[i] - low[i]) / 2)
                counts[i] += len(shifted)
                s1[i] += shifted.sum()
                s2[i] += (shifted**2).sum()
                add_largest(most[i : i + 1], largest(values))
            site.progress(i + 1, len(names))
        return {"rows": len(table), "count": counts, "s1": s1, "s2": s2, "largest": most}


def _pieces(column: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """The values of a numeric column that are there, in pieces."""
    for start in range(0, len(column), SLICE):
        piece = column[start : start + SLICE]
        yield piece[~np.isnan(piece)]


def _moments(total: Mapping[str, Array], center: Array, half: Array) -> tuple[Array, Array]:
    """(mean, variance), each [num_columns], from Σz and Σz²; NaN where there are too few values."""
    with np.errstate(invalid="ignore", divide="ignore"):
        n = np.asarray(total["count"], np.float64)
        mean = center + half * total["s1"] / n
        variance = half**2 * np.maximum(total["s2"] - total["s1"] ** 2 / n, 0.0) / (n - 1)
    return np.where(n > 0, mean, np.nan), np.where(n > 1, variance, np.nan)
