"""Pearson's half of ``statistics.correlation``: each column's mean and standard deviation, then centred products.

A round of moments gives both; a second one is asked where a column's spread is so small that the first lost digits.
Under noise the schema's ranges stand for them. Source: Chan, Golub & LeVeque 1983 (two-pass moments).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.disclosure import TOP, Cells
from atoll.contract.program import Cohort, SiteView, handler
from atoll.contract.rounds import Reply, Round, Sum, Task, count, not_taken, real, taken, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.moments import LOST, add_largest, ranges
from atoll.statistics.noise import fine, powers, reach
from atoll.statistics.pairs import (
    PAIRS,
    Pairs,
    Scores,
    counted,
    guarded,
    largest_of,
    largest_of_either,
    magnitudes,
    tell_tale,
)

Floats = NDArray[np.float64]
COLUMN = Cells("count", "withheld", values=("s1", "s2"), largest="top")


class Pearson(Pairs):
    """Scores are values about a centre, in units of a scale."""

    def _standardised(self, cohort: Cohort, names: tuple[str, ...]) -> Generator[Any, Any, Scores]:
        """Each column's mean, and its standard deviation; under noise the middle, and half, of its range."""
        middle, half = ranges(cohort.schema, names)
        center, scale, bound, sites = middle, half, float(cohort.schema.max_rows), None
        if cohort.exact:
            center, scale, bound, sites = yield from self._moments(cohort, middle, half)
        return Scores("products", {"center": center, "scale": scale}, center, scale, bound, sites)

    def _moments(
        self, cohort: Cohort, middle: Floats, half: Floats
    ) -> Generator[Any, Any, tuple[Floats, Floats, float, tuple[str, ...] | None]]:
        """(each column's mean, its standard deviation, a bound for a site's sums of squares in these units, sites)."""
        size, rows = len(middle), cohort.schema.max_rows
        center, unit, bound, sites = middle, half, float(rows), None
        for _ in range(2):
            fields = {
                **counted(cohort.schema, size),
                "count": count(size, bound=rows),
                "s1": real(size, bound=bound, step=fine(bound, 20)),
                "s2": real(size, bound=bound, step=fine(bound, 20)),
                "withheld": withheld(size),
            }
            send = {"center": center, "scale": unit}
            total = yield Round("moments", Sum(), fields, send, sites=sites)
            usable = (total["count"] > 0) & ~COLUMN.hidden(total, cohort.min_group_size)
            usable &= not tell_tale(total, cohort.min_group_size)
            n, sites = np.maximum(total["count"], 1).astype(np.float64), total.sites
            shift, square = total["s1"] / n, total["s2"] / n
            variance = np.maximum(square - shift**2, 0)
            lost = usable & ~(variance > LOST * square)
            center = np.where(usable, center + unit * shift, middle)
            spread = np.where(usable & ~lost, unit * np.sqrt(variance), half)  # lost twice: it does not vary
            bound = 4 * max(float(n.max(initial=1)), rows)
            if not lost.any():
                break
            unit = np.where(lost, half * math.sqrt(LOST), half)
        return center, spread, bound, sites

    # -- what one record changes

    def _moments_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        s1, s2 = powers(self._reach(schema, sent))
        return {**self._counts_per_record(schema), "count": touches(len(self._names(schema))), "s1": s1, "s2": s2}

    def _products_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return self._pairs_per_record(schema, self._reach(schema, sent))

    def _reach(self, schema: TableSchema, sent: Mapping[str, Array]) -> Floats:
        middle, half = ranges(schema, self._names(schema))
        center, scale = (taken(sent, name, middle.shape) for name in ("center", "scale"))
        return reach(middle - half, middle + half, center, _positive(scale))

    # -- at a site

    @handler("moments", groups=("rows",), cells=COLUMN, record=_moments_per_record)
    def moments(self, site: SiteView, task: Task) -> Reply:
        """At the site: counts and moments of each column about the centre sent, in the unit sent."""
        p, rows = len(self._names(site.table.schema)), 0
        center, scale = task.take("center", (p,)), _positive(task.take("scale", (p,)))
        counts, s1, s2 = np.zeros(p, np.int64), np.zeros(p), np.zeros(p)
        apart, top = np.zeros(p, np.int64), np.zeros((p, TOP + 1))
        for batch in self._batches(site, apart):
            known = ~np.isnan(batch)
            z = np.where(known, (batch - center) / scale, 0)
            counts += known.sum(axis=0)
            s1 += z.sum(axis=0)
            s2 += (z**2).sum(axis=0)
            add_largest(top, largest_of(magnitudes(batch)))
            rows += len(batch)
        return guarded(site, apart, {"rows": rows, "count": counts, "s1": s1, "s2": s2, "top": top})

    @handler("products", groups=("rows",), cells=PAIRS, record=_products_per_record)
    def products(self, site: SiteView, task: Task) -> Reply:
        """At the site: for each pair of columns the rows, sums, squares and cross-products about the centre sent."""
        p = len(self._names(site.table.schema))
        center, scale = task.take("center", (p,)), _positive(task.take("scale", (p,)))
        most = np.zeros((p, p, TOP + 1))
        reply = self._products(site, lambda batch: (batch - center) / scale, most)
        return {**reply, "top": np.stack([largest_of_either(most), np.zeros_like(most)], axis=2)}


def _positive(scale: Floats) -> Floats:
    if not (scale > 0).all():
        raise not_taken("scale")
    return scale
