"""Quantiles of every numeric column, to a stated error, by few rounds of refined cumulative counts.

Parties: sites and coordinator. Messages: R rounds, each one Sum, R = ⌈log(points) / log(bins)⌉. The
possible answers of a column are a fixed grid: its code list, its integers (where 1/error of them
suffice), else steps of 2 · error · range. A round counts, for each requested quantile, the values up
to each of *bins* grid points within the bracket that still holds it; the bracket shrinks *bins*-fold.
The definition is the inverted CDF: the smallest x with at least p · n values ≤ x (Hyndman & Fan 1996,
definition 1).

Small groups. A site that others see alone (``site.min_group_size`` = k > 1) cuts its column only
where every part between neighbouring cuts, of this and of all earlier rounds of the run, holds nobody
or k people, so that no difference of two of its answers counts fewer than k; the first and the last
part hold k people, never nobody. In between it tells two bounds: the counts at the cuts below and above.
Of its k lowest and k highest people it never tells more than that they are such: at a point beyond all
but fewer than k people, the bounds are 0 and k, or n − k and n. So nobody sees where an extreme is. The
coordinator adds the bounds, so its bracket holds the true quantile always, and widens, by at most the
values between two cuts of each site, and k. Sites with fewer than k values of a column are withheld by
their gates; their k − 1 possible values widen the bracket also. And a bracket stops shrinking where fewer
than the plan's k people would be left in it, and a quantile among the cohort's k lowest or highest people
keeps the range's end: no extreme value and no one person's value is reported; the reported error is the
wider bracket's.

The coordinator learns, of the cohort's total: each column's count, and bounds of its cumulative
counts at the grid points asked; under ``plain`` each site's, cut as above. Threat model: as the plan's
protection; under one that shows only sums, the coordinator itself sees the sums around a bracket.
Dropout: the quantiles of the survivors; a bracket that they move out of is opened again, for at most
R further rounds. Noise: exactly R rounds, so a larger *error* (fewer rounds) may give better answers; within a
round the counts are made to rise; *errors* are those of the brackets, without the noise's. Cost: R
rounds of 16 · columns · probabilities · (bins + 1) bytes a site (the first without the factor probabilities), and a
sort of each column a round.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import Cells
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, taken, withheld
from atoll.contract.schema import Column, TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.noise import NOTHING, rising, smallest

Floats = NDArray[np.float64]
Probability = Annotated[float, Field(ge=0, le=1)]
COUNT = Cells("count", "withheld", values=("low", "high"))


@dataclass(frozen=True)
class Grid:
    """The *size* values that a column's quantiles are looked for among: *points*, or even steps from *low* to *high*.

    exact: the column has no other values.
    """

    low: float
    high: float
    size: int
    exact: bool
    points: Floats | None = None

    @staticmethod
    def of(column: Column, error: float) -> Grid:
        """The grid of a numeric *column* whose step is at most 2 · *error* · range."""
        if column.values is not None:
            points = np.unique(np.array(column.values, np.float64))
            return Grid(float(points[0]), float(points[-1]), len(points), True, points)
        low, high = column.bounds()
        first, last = math.ceil(low), math.floor(high)
        if column.dtype == "integer" and 0 <= last - first <= 1 / error:
            return Grid(first, last, last - first + 1, True)
        return Grid(low, high, math.ceil(0.5 / error) + 1, False)

    def at(self, index: Floats) -> Floats:
        """Values of grid points 0 … size − 1; what is below all of them is −∞."""
        index = np.clip(index, -1, self.size - 1)
        if self.points is not None:
            values = self.points[index.astype(np.int64)]
        else:
            step = 1.0 if self.exact else (self.high - self.low) / (self.size - 1)
            values = self.low + step * index
            values = np.where(index == self.size - 1, self.high, values)
        return np.where(index < 0, -np.inf, values)

    def within(self, first: float, last: float) -> tuple[float, float]:
        """(value, error): the quantile lies after point *first*, and at or before point *last*."""
        if self.exact:
            value = self.at(np.array([(first + 1 + last) // 2, first + 1, last]))
            return float(value[0]), float(max(value[0] - value[1], value[2] - value[0]))
        below, above = self.at(np.array([max(first, 0), last]))
        return float((below + above) / 2), float((above - below) / 2)


def _probes(brackets: Floats, bins: int) -> Floats:
    """The grid points asked for *brackets* [..., 2]: their ends and bins − 1 between, [..., bins + 1]."""
    first, last = brackets[..., :1], brackets[..., 1:]
    return first + np.ceil((last - first) * np.arange(bins + 1) / bins)


class _Nearest:
    """For each column and probability, the grid point at which all sites' counts are exact and nearest to p · n."""

    def __init__(self, probabilities: tuple[float, ...], shape: tuple[int, int]) -> None:
        self._p = probabilities
        self._point, self._below, self._off = np.zeros(shape), np.zeros(shape, np.int64), np.full(shape, np.inf)
        self._sites: tuple[str, ...] = ()

    def see(self, total: Mapping[str, Array], sites: tuple[str, ...], probes: Floats) -> None:
        """Look at one round's counts; those of another cohort are forgotten."""
        if sites != self._sites:
            self._off[:], self._sites = np.inf, sites
        for c, n in enumerate(total["count"].tolist()):
            for i, p in enumerate(self._p):
                at = min(i, probes.shape[1] - 1)
                low, high = total["low"][c, at], total["high"][c, at]
                off = np.where((low == high) & (low > 0) & (low < n), np.abs(low - p * n), np.inf)
                best = int(off.argmin())
                if off[best] < self._off[c, i]:
                    self._point[c, i], self._below[c, i], self._off[c, i] = probes[c, at, best], low[best], off[best]

    def cuts(self, column: int, grid: Grid, n: int, smallest: int) -> dict[str, list[float]]:
        """Those of one column that leave at least *smallest* people, and somebody, beside them."""
        found = np.isfinite(self._off[column])
        below, first = np.unique(self._below[column][found], return_index=True)
        points = grid.at(self._point[column][found][first])
        cuts, reached = cut(points, below, n, smallest)
        return {"cuts": cuts.tolist(), "cut_counts": reached.tolist()}


@program("statistics.quantiles", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Quantiles:
    """Quantiles of numeric columns, to a stated error, by a few rounds of Sum."""

    class Params(ProgramParams):
        """columns: numeric columns (default: all). probabilities: which quantiles. error: most that an answer
        may be off, relative to the schema's range. bins: parts that a round splits a bracket into."""

        columns: tuple[str, ...] = ()
        probabilities: tuple[Probability, ...] = Field(
            default=(0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99), min_length=1, max_length=1000
        )
        error: float = Field(default=1e-6, ge=1e-12, le=0.5)
        bins: int = Field(default=128, ge=2, le=4096)

    def __init__(self, params: Params) -> None:
        self.params = params

    def _grids(self, schema: TableSchema) -> dict[str, Grid]:
        names = self.params.columns or schema.numeric_columns()
        if bad := sorted(set(names) - set(schema.numeric_columns())):
            raise PlanError("plan.bad-column", "quantiles needs numeric columns of the schema", field=", ".join(bad))
        return {name: Grid.of(schema.columns[name], self.params.error) for name in names}

    def rounds(self, schema: TableSchema) -> int:
        """R: rounds that are enough for every column, when no site drops out."""
        size, needed = max((grid.size for grid in self._grids(schema).values()), default=1), 1
        while self.params.bins**needed < size:
            needed += 1
        return needed

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"quantiles": {"columns": {name: {"count", "probabilities", "values", "errors", "error",
        "cuts", "cut_counts", "withheld_sites"}}, "rounds"}}.

        Each true quantile of the values that were counted lies within errors[i] of values[i]; error is the
        largest. Values are None for columns with fewer than the plan's smallest group. withheld_sites: how
        many had too few values to tell; what they could hold is within the error, not within count. cuts:
        for binning, the points near the quantiles (at most one for each) at which every site has told its
        exact count, so that counting there again adds nothing to what is known of a site; cut_counts: how
        many values are at or below each of them.
        """
        grids, bins = self._grids(cohort.schema), self.params.bins
        shape, rows, enough = (len(grids), len(self.params.probabilities)), cohort.schema.max_rows, None
        top = np.array([grid.size - 1.0 for grid in grids.values()])
        brackets = np.empty((*shape, 2))
        brackets[..., 0], brackets[..., 1] = -1, top[:, None]
        rounds, nearest = self.rounds(cohort.schema), _Nearest(self.params.probabilities, shape)
        for number in range(2 * rounds):
            asked, handled = (brackets, "brackets") if number else (brackets[:, :1], "range")
            cumulative = count((*asked.shape[:2], bins + 1), bound=rows)
            fields = {"count": count(shape[0], bound=rows), "low": cumulative, "high": cumulative}
            send = {"brackets": brackets} if number else {}
            total = yield Round(handled, Sum(), {**fields, "withheld": withheld(shape[0])}, send)
            probes = _probes(asked, bins)
            counted = total if cohort.exact else _risen(total, probes)
            nearest.see(counted, total.sites, probes)
            narrowed = self._narrowed(counted, probes, shape, top, smallest(cohort), exact=cohort.exact)
            before, brackets = brackets, narrowed
            if not cohort.exact:
                if number + 1 < rounds:
                    continue
                break
            left = brackets[..., 1] - brackets[..., 0]
            if (left > before[..., 1] - before[..., 0]).any():
                enough = 2 * rounds  # sites dropped out, and the survivors' quantile is elsewhere
            if number + 1 >= (enough or rounds) or (left <= 1).all() or np.array_equal(before, brackets):
                break
        columns = {
            name: {
                **self._reported(grid, int(total["count"][i]), int(total["withheld"][i]), brackets[i], cohort),
                **nearest.cuts(i, grid, int(total["count"][i]), smallest(cohort)),
            }
            for i, (name, grid) in enumerate(grids.items())
        }
        return {"quantiles": {"columns": columns, "rounds": number + 1}}

    def _narrowed(
        self, total: Mapping[str, Array], probes: Floats, shape: tuple[int, int], top: Floats, smallest: int,
        *, exact: bool = True,
    ) -> Floats:  # fmt: skip
        """The brackets between *probes* [columns, 1 or probabilities, bins + 1] that hold the quantiles, [*shape, 2].

        A bracket keeps at least *smallest* people; it is opened to the grid's end where the quantile left it, or is
        among the *smallest* lowest or highest people. Counts that are not *exact* do not open it.
        """
        found, tail = np.empty((*shape, 2)), _tail(smallest)
        for c in range(shape[0]):
            n, unknown = int(total["count"][c]), int(total["withheld"][c]) * (smallest - 1)
            for i, p in enumerate(self.params.probabilities):
                at = min(i, probes.shape[1] - 1)
                points, bottom, end = probes[c, at], probes[c, at] < 0, probes[c, at] >= top[c]
                low, _ = _bounds(total["low"][c, at], n, tail)
                _, high = _bounds(total["high"][c, at], n, tail)
                low, high = np.where(end, n, low), high + unknown
                rank = max(math.ceil(Fraction(str(p)) * n), 1)
                latest = max(math.ceil(Fraction(str(p)) * (n + unknown)), 1)
                below, reached = np.flatnonzero((high < rank) | bottom), np.flatnonzero((low >= latest) | end)
                high = np.where(bottom, 0, high)
                if not exact:
                    last = max(int(np.append(reached, len(points) - 1)[0]), 1)
                    before = below[points[below] < points[last]]
                    found[c, i] = points[before[-1] if len(before) else 0], points[last]
                    continue
                if not len(below) or not len(reached):
                    found[c, i] = (
                        (points[below[-1]] if len(below) else -1),
                        (points[reached[0]] if len(reached) else top[c]),
                    )
                    continue
                first, last = below[-1], reached[0]
                if low[last] - high[first] < smallest:
                    wider = np.flatnonzero(low >= high[first] + smallest)
                    last = wider[0] if len(wider) else len(points) - 1
                    lower = np.flatnonzero(high[: first + 1] <= low[last] - smallest)
                    first = lower[-1] if len(lower) else 0
                found[c, i] = points[first], points[last]
        return found

    def _reported(self, grid: Grid, n: int, withheld_sites: int, brackets: Floats, cohort: Cohort) -> dict[str, Any]:
        told = n >= max(smallest(cohort), 1)
        answers = [grid.within(*bracket) if told else (None, None) for bracket in brackets.tolist()]
        return {
            "count": n if told or not n else None,
            "probabilities": list(self.params.probabilities),
            "values": [value for value, _ in answers],
            "errors": [error for _, error in answers],
            "error": max(error for _, error in answers if error is not None) if told else None,
            "withheld_sites": withheld_sites,
        }

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        """A value is at or below up to all points asked."""
        columns, brackets = len(self._grids(schema)), 1
        if "brackets" in sent:
            brackets = len(self.params.probabilities)
            taken(sent, "brackets", (columns, brackets, 2))
        reached = touches(columns * brackets * (self.params.bins + 1))
        return {"count": touches(columns), "low": reached, "high": reached, "withheld": NOTHING}

    @handler("range", cells=COUNT, record=_per_record)
    def range(self, site: SiteView, task: Task) -> Reply:
        """At the site: counts, and bounds of the cumulative counts over the whole range of each column."""
        grids = self._grids(site.table.schema)
        whole = np.array([[[-1.0, grid.size - 1.0]] for grid in grids.values()]).reshape(-1, 1, 2)
        return self._counted(site, grids, whole)

    @handler("brackets", cells=COUNT, record=_per_record)
    def brackets(self, site: SiteView, task: Task) -> Reply:
        """At the site: the same within one bracket for each column and probability."""
        grids = self._grids(site.table.schema)
        return self._counted(site, grids, task.take("brackets", (len(grids), len(self.params.probabilities), 2)))

    def _counted(self, site: SiteView, grids: Mapping[str, Grid], brackets: Floats) -> Reply:
        asked = _probes(brackets, self.params.bins)
        counts = np.zeros(len(grids), np.int64)
        low, high = np.zeros(asked.shape, np.int64), np.zeros(asked.shape, np.int64)
        for i, (name, grid) in enumerate(grids.items()):
            counts[i], low[i], high[i] = cumulative(site, name, grid.at(np.rint(asked[i])), grid.low, grid.high)
            site.progress(i + 1, len(grids))
        return {"count": counts, "low": low, "high": high}


def _risen(total: Mapping[str, Array], probes: Floats) -> dict[str, Array]:
    """Noisy counts that do not fall: the mean of both bounds, which are the same count but at −∞."""
    both = np.where(probes < 0, 0.0, np.asarray(total["low"] + total["high"], np.float64) / 2)
    both = np.minimum(rising(both), total["count"].reshape(-1, 1, 1))
    return {"count": total["count"], "withheld": total["withheld"], "low": both, "high": both}


def cumulative(
    site: SiteView, name: str, edges: Floats, lowest: float, highest: float
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """At a site: (values of column *name*, and bounds of how many are ≤ each of *edges*, of their shape).

    Both bounds are the count itself where the site may cut (see the module); *lowest* and *highest* clip values.
    """
    smallest, tail = site.min_group_size, _tail(site.min_group_size)
    column = site.table[name]
    values = column[~np.isnan(column)]
    np.clip(values, lowest, highest, out=values)
    values.sort()
    known = f"cuts of {name}"
    before = site.state.get(known, np.zeros(0))
    n, new = len(values), np.unique(edges[np.isfinite(edges)])
    below = np.searchsorted(values, new, "right")
    low_tail, high_tail = below < tail, n - below < tail  # the innermost points of either say all that the others do
    asked = np.concatenate([before, new[~low_tail & ~high_tail], new[low_tail][-1:], new[high_tail][:1]])
    below = np.searchsorted(values, asked, "right")
    cuts, _ = cut(asked, np.minimum(np.maximum(below, tail), n - tail), n, smallest)
    if smallest > 1 and len(cuts) > len(before):
        site.state[known] = cuts
    low, high = _bounds(np.searchsorted(values, cuts, "right"), n, tail)
    left, right = (np.searchsorted(cuts, edges, side) for side in ("left", "right"))
    return n, np.concatenate([[0], low])[right], np.concatenate([high, [n]])[left]


def _tail(smallest: int) -> int:
    """How many of the lowest, and of the highest, people are not told apart."""
    return smallest if smallest > 1 else 0


def _bounds(
    below: NDArray[np.integer[Any]], total: int, tail: int
) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
    """Bounds of counts *below* that do not tell which of the *tail* lowest and highest of *total* people are in."""
    if total < 2 * tail:
        return np.zeros_like(below), np.full_like(below, total)
    low = np.where(below < tail, 0, np.minimum(below, total - tail))
    return low, np.where(total - below < tail, total, np.maximum(below, tail))


def cut(edges: Floats, below: NDArray[np.integer[Any]], total: int, smallest: int) -> tuple[Floats, NDArray[np.int64]]:
    """(cuts, people at or below each): of *edges*, in turn, those that leave nobody or at least *smallest* of
    *total* people between them and the cuts beside them, and at least *smallest* below the first and above the last
    one, never nobody: that would tell an extreme. below: people at or below each edge."""
    if smallest <= 1:
        cuts, first = np.unique(edges, return_index=True)
        return cuts, below[first].astype(np.int64)
    kept: list[float] = []
    reached = [0, total]
    for edge, people in zip(edges.tolist(), below.tolist(), strict=True):
        place = bisect_right(kept, edge)
        parts = (people - reached[place], reached[place + 1] - people)
        inner = (place > 0, place < len(kept))  # whether a part may be empty: the first and the last may not
        if not (place and kept[place - 1] == edge) and all(
            part >= smallest or (part == 0 and may) for part, may in zip(parts, inner, strict=True)
        ):
            kept.insert(place, edge)
            reached.insert(place + 1, people)
    return np.array(kept), np.array(reached[1:-1], np.int64)


__all__ = ["COUNT", "Grid", "Quantiles", "cumulative", "cut"]
