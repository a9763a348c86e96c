"""Bins' edges near the quantiles of the cohort's rows, by counts on a grid that is refined where many rows are.

A real column's range by the schema is parted into CELLS; where a cell holds more than half of a bin's rows it is
parted again, into PARTS, up to LEVELS times: then to 2⁻³⁷ of the range. Code lists, and whole numbers of few, have
a cell for each value. Edges are lower ends of cells: of few occupied cells each has its own bin, else bins hold about
as many rows as each other, up to half as many again.

Parties: sites and coordinator. Messages: one Sum for each level, "cells" and then "parts", of the columns that need it;
mostly two. The coordinator learns how many of the cohort's rows are in each cell (each site's where replies are seen
singly: a site whose policy has a smallest group refuses that). Threat model: as the plan's protection; a coordinator
that does not keep the protocol may refine where few rows are. Dropout: of the survivors; cells that were told before
count as they were. Noise: one round of NOISY_CELLS, of which a row changes one for each column. Cost: 8 bytes for each
cell, 32 KiB a column at first (half where counts fit 32 bits); one pass over the rows a round.

Source: Chen & Guestrin 2016, XGBoost (KDD), §3.2; Greenwald & Khanna 2001 (what bounded error buys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, not_taken
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.statistics.noise import only_summed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CELLS, PARTS, LEVELS = 4096, 32, 6
NOISY_CELLS = 256


@dataclass(frozen=True)
class Scale:
    """A column's cells: *points*, or even steps from *low* over *width*."""

    low: float
    width: float
    points: Floats | None

    @staticmethod
    def of(schema: TableSchema, name: str) -> Scale:
        """Raises PlanError for a column without bounds."""
        low, high = feature_bounds(schema, name)
        column, points = schema.columns[name], None
        if column.values is not None:
            points = np.unique(np.array(column.values, np.float64))
        elif column.dtype == "integer" and high - low < CELLS:
            points = np.arange(np.ceil(low), np.floor(high) + 1)
        return Scale(low, high - low, points if points is not None and len(points) <= CELLS else None)

    def cells(self, most: int) -> int:
        """How many there are at first."""
        return len(self.points) if self.points is not None else most

    def places(self, values: Floats, cells: int) -> Ints:
        """In which of so many even cells, or at which point, each value is."""
        if self.points is not None:
            return np.maximum(np.searchsorted(self.points, values, "right") - 1, 0).astype(np.int64)
        found = np.floor((values - self.low) * (cells / self.width))
        return np.clip(found, 0, cells - 1).astype(np.int64)

    def starts(self, places: Ints, cells: int) -> Floats:
        """Lower ends of cells."""
        return np.asarray(self.points[places] if self.points is not None else self.low + places * (self.width / cells))


@program("trees.edges", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Edges:
    """Edges of bins that hold about as many rows as each other, by a few rounds of counts."""

    class Params(ProgramParams):
        """columns: numeric ones. max_bins: at most so many bins of each."""

        columns: tuple[str, ...] = Field(min_length=1)
        max_bins: int = Field(default=254, ge=2, le=4096)

    def __init__(self, params: Params) -> None:
        self.params = params

    def _scales(self, schema: TableSchema) -> list[Scale]:
        return [Scale.of(schema, name) for name in self.params.columns]

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {column: edges, float64, rising}: at most max_bins − 1 of each."""
        if len(set(self.params.columns)) < len(self.params.columns):
            raise PlanError("plan.bad-column", "a column is named twice", field="columns", remedy="name it once")
        scales, rows = self._scales(cohort.schema), cohort.schema.max_rows
        first = CELLS if cohort.exact else NOISY_CELLS
        sizes = [scale.cells(first) for scale in scales]
        name = "cells" if cohort.exact else "noisy cells"
        total = yield Round(name, Sum(), {"counts": count(sum(sizes), bound=rows)})
        told = np.split(np.maximum(total["counts"], 0), np.cumsum(sizes)[:-1])
        starts = [scale.starts(np.arange(size), size) for scale, size in zip(scales, sizes, strict=True)]
        counts = [np.asarray(each, np.float64) for each in told]
        heavy = [self._heavy(scale, np.arange(len(c)), c, c.sum()) for scale, c in zip(scales, counts, strict=True)]
        cells = CELLS
        for level in range(1, LEVELS if cohort.exact else 1):
            if not sum(map(len, heavy)):
                break
            cells *= PARTS
            places = np.concatenate(heavy)
            of = np.array([len(each) for each in heavy], np.int64)
            fields = {"counts": count((len(places), PARTS), bound=rows)}
            total = yield Round("parts", Sum(), fields, {"level": np.array(level), "places": places, "of": of})
            parts = np.split(np.maximum(total["counts"], 0).astype(np.float64), np.cumsum(of)[:-1])
            for i, (scale, split, inner) in enumerate(zip(scales, heavy, parts, strict=True)):
                if not len(split):
                    continue
                below = (split[:, None] * PARTS + np.arange(PARTS)).ravel()
                gone = np.isin(starts[i], scale.starts(split, cells // PARTS))
                rows_of = counts[i].sum()
                starts[i] = np.concatenate([starts[i][~gone], scale.starts(below, cells)])
                counts[i] = np.concatenate([counts[i][~gone], inner.ravel()])
                heavy[i] = self._heavy(scale, below, inner.ravel(), rows_of)
        return {
            name: self._edges(starts[i], counts[i]) for i, name in enumerate(self.params.columns)
        }  # fmt: skip

    def _heavy(self, scale: Scale, places: Ints, counts: Floats, rows: float) -> Ints:
        """Cells that are to be parted."""
        if scale.points is not None:
            return np.zeros(0, np.int64)
        return places[counts * 2 * self.params.max_bins > rows].astype(np.int64)

    def _edges(self, starts: Floats, counts: Floats) -> Floats:
        order = np.argsort(starts, kind="stable")
        order = order[counts[order] > 0]
        starts, counts = starts[order], counts[order]
        if len(starts) <= self.params.max_bins:
            return starts[1:]
        below = np.cumsum(counts) - counts
        wanted = counts.sum() * np.arange(1, self.params.max_bins) / self.params.max_bins
        places = np.unique(np.searchsorted(below, wanted))
        return np.asarray(starts[places[(places > 0) & (places < len(starts))]])

    def _per_cell(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"counts": touches(len(self.params.columns))}

    @handler("cells", record=_per_cell)
    def cells(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows in each cell of each column."""
        return self._counted(site, CELLS)

    @handler("noisy cells", record=_per_cell)
    def noisy_cells(self, site: SiteView, task: Task) -> Reply:
        """At the site: the same of fewer cells."""
        return self._counted(site, NOISY_CELLS)

    def _counted(self, site: SiteView, most: int) -> Reply:
        only_summed(site)
        found = []
        for name, scale in zip(self.params.columns, self._scales(site.table.schema), strict=True):
            values, cells = _values(site, name), scale.cells(most)
            found.append(np.bincount(scale.places(values, cells), minlength=cells))
        return {"counts": np.concatenate(found)}

    @handler("parts", record=_per_cell)
    def refined(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows in each part of some cells."""
        only_summed(site)
        level, asked, of = (task.arrays.get(name) for name in ("level", "places", "of"))
        if level is None or asked is None or of is None or any(a.dtype != np.int64 for a in (level, asked, of)):
            raise not_taken("places")
        if level.shape or not 1 <= int(level) < LEVELS or of.shape != (len(self.params.columns),) or (of < 0).any():
            raise not_taken("level")
        cells = CELLS * PARTS ** int(level)
        if asked.ndim != 1 or (of > len(asked)).any() or of.sum() != len(asked) or (asked < 0).any():
            raise not_taken("of")
        if (asked >= cells // PARTS).any():
            raise not_taken("places")
        found = [np.zeros((0, PARTS), np.int64)]
        each = np.split(asked, np.cumsum(of)[:-1])
        for name, scale, places in zip(self.params.columns, self._scales(site.table.schema), each, strict=True):
            if (np.diff(places) <= 0).any() or (scale.points is not None and len(places)):
                raise not_taken("places")
            if len(places):
                fine = scale.places(_values(site, name), cells)
                at = np.minimum(np.searchsorted(places, fine // PARTS), len(places) - 1)
                here = places[at] == fine // PARTS
                inside = at[here] * PARTS + fine[here] % PARTS
                found.append(np.bincount(inside, minlength=len(places) * PARTS).reshape(-1, PARTS))
        return {"counts": np.concatenate(found)}


def _values(site: SiteView, name: str) -> Floats:
    values = np.asarray(site.table[name], np.float64)
    return values[~np.isnan(values)]
