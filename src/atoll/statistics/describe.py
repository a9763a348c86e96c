"""Describe: count, missing, mean, variance and protected extremes of every numeric column.

Parties: sites and coordinator. Messages: one round, one Sum. The coordinator learns, of
the cohort's total: rows, non-missing counts, first and second moments, and a histogram
over the schema's range; under ``plain`` also each site's share of them. Minimum and
maximum are never released: ``low`` and ``high`` are the outer edges of the outermost
histogram bins that, counted from that end, hold at least *tail_rows* rows. Threat model: as
the plan's protection. Dropout: the statistics of the survivors. Cost: one round,
(bins + 3) · 8 bytes a column and site.

Moments are taken about the middle m of the schema's range, S1 = Σ(x − m) and
S2 = Σ(x − m)²: shifted data lose no digits (Chan, Golub & LeVeque 1983, §1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, TableView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array


def _grid(schema: TableSchema, names: tuple[str, ...]) -> tuple[Array, Array]:
    """(lowest, highest), each [num_columns], from the schema; raises PlanError for other columns."""
    bad = [name for name in names if name not in schema.columns or not schema.columns[name].numeric]
    if bad:
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
        """Returns {"columns": {name: {...}}, "rows": total rows}."""
        names, rows = self._names(cohort.schema), cohort.schema.max_rows
        low, high = _grid(cohort.schema, names)
        reach = float(((high - low) / 2).max(initial=0))
        size = len(names)
        total = yield Round(
            "moments",
            Sum(),
            {
                "rows": count(bound=rows, group=True),
                "count": count(size, bound=rows),
                "s1": real(size, bound=rows * reach, step=1e-9 * max(reach, 1e-3)),
                "s2": real(size, bound=rows * reach**2, step=1e-9 * max(reach, 1e-3) ** 2),
                "histogram": count((size, self.params.bins), bound=rows),
            },
        )
        all_rows = int(total["rows"])
        columns = {
            name: self._column(all_rows, float(low[i]), float(high[i]), {k: v[i] for k, v in total.items() if v.ndim})
            for i, name in enumerate(names)
        }
        return {"columns": columns, "rows": all_rows}

    def _column(self, rows: int, low: float, high: float, sums: Mapping[str, Any]) -> dict[str, Any]:
        n, middle = int(sums["count"]), (low + high) / 2
        mean = middle + float(sums["s1"]) / n if n else math.nan
        variance = max(float(sums["s2"] - sums["s1"] ** 2 / n) / (n - 1), 0.0) if n > 1 else math.nan
        edges = np.linspace(low, high, self.params.bins + 1)
        histogram = np.asarray(sums["histogram"])
        from_low, from_high = np.cumsum(histogram), np.cumsum(histogram[::-1])
        enough = n >= self.params.tail_rows
        return {
            "rows": rows,
            "count": n,
            "missing": rows - n,
            "mean": mean,
            "variance": variance,
            "std": math.sqrt(variance) if n > 1 else math.nan,
            "low": float(edges[np.searchsorted(from_low, self.params.tail_rows)]) if enough else math.nan,
            "high": float(edges[::-1][np.searchsorted(from_high, self.params.tail_rows)]) if enough else math.nan,
            "edges": edges.tolist(),
            "histogram": histogram.tolist(),
        }

    @handler("moments")
    def moments(self, site: SiteView, task: Task) -> Reply:
        """At the site: counts, shifted moments and histogram of each column."""
        table: TableView = site.table
        names, bins = self._names(table.schema), self.params.bins
        low, high = _grid(table.schema, names)
        counts, s1, s2 = np.zeros(len(names), np.int64), np.zeros(len(names)), np.zeros(len(names))
        histogram = np.zeros((len(names), bins), np.int64)
        for i, name in enumerate(names):
            values = table[name]
            shifted = values[~np.isnan(values)] - (low[i] + high[i]) / 2
            counts[i], s1[i], s2[i] = len(shifted), shifted.sum(), (shifted**2).sum()
            place = np.floor((shifted / (high[i] - low[i]) + 0.5) * bins).astype(np.int64)
            histogram[i] = np.bincount(np.clip(place, 0, bins - 1), minlength=bins)
            site.progress(i + 1, len(names))
        return {"rows": len(table), "count": counts, "s1": s1, "s2": s2, "histogram": histogram}
