"""Weight of evidence and information value of features against a binary label.

Parties: sites and coordinator. Messages: for binning by quantiles (`quantile`, `monotone`, `optimal`) the
rounds of ``statistics.quantiles``; then one Sum, "labels", of how many rows of each label lie at or below
every edge. All merging of bins is done by the coordinator on these sums, so every count is exact.

WOE and IV, and how bins are merged, are those of ``binning.py``; missing cells are one of a feature's bins. Rows
without a label are left out. Bins are right-closed, as pandas.cut's. Edges by quantiles lie within 2 · *resolution*
of the schema's range (or at a neighbouring value, of an integer column) from the quantile of all rows, farther where
a site's groups beside it are small; what is told *at* the edges is exact.

- `equal`: *bins* bins of equal width over the schema's range. `quantile`: *bins* bins of equal share.
- `monotone`: *prebins* bins of equal share; neighbours whose WOE goes the wrong way are pooled, then as `optimal`,
  for the direction with the larger IV.
- `optimal`: of all ways to merge neighbouring pre-bins into at most *bins* bins of at least *min_share* of the
  non-missing rows, the one of largest IV; with *monotone*, among those of monotone WOE.
- A code list is its own pre-bins. `equal` and `quantile` keep each code; the others merge neighbours: in
  order of value, for text in order of WOE.

Small groups. Missing cells and pre-bins form one row of parts, and a site that others see alone
(``site.min_group_size`` = k > 1) tells the count at an edge only if both parts beside it, as cut so far in
the run, hold nobody or k rows of *each* label, and of none, which subtracting from the counts of all rows would
tell: no difference of two of its answers counts fewer. The lowest and the highest part of an ordered feature hold k
rows, never nobody, so that no extreme is told. All sites
try edges in one order, halving the row, so that they mostly agree. The coordinator keeps edges that every site
told and that pass the same test for the cohort with the plan's k. Bins too small are thus merged with their
neighbours and said to be (*note*), missing cells with the lowest bin; no number is guessed. A site with
fewer than k rows of either label, or of none (and more than none), is left out, and counted in *withheld_sites*;
a recipe that drops rows without a label keeps it in.

Under noise a site is asked for the parts' counts (round "cells"), as one record changes one of a feature's but all
cumulative ones above it; labels are then counted from each feature's own parts.

The coordinator learns, of the cohort's total: counts by label up to every edge, and what the quantiles
program says; under ``plain`` each site's, cut as above. Threat model: as the plan's protection; a coordinator
that keeps to the protocol asks about labels only at edges where the quantiles program told all counts.
Dropout: the survivors' counts; edges that were asked stay. Cost: quantiles' rounds of 272 · columns ·
(prebins − 1) bytes a site, then one of 24 · (edges + 1) a column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import Cells
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, withheld
from atoll.contract.schema import Column, TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.binning import merged, woe_iv
from atoll.statistics.cuts import halving, kept
from atoll.statistics.noise import NOTHING, only_summed, smallest
from atoll.statistics.quantiles import Quantiles

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LABELS = Cells("labels", "withheld", values=("below",), lines=(0,))
UNLABELLED = Cells("unlabelled", "unlabelled_withheld")
MERGED = "bins were merged, because fewer than the smallest group that may be told were in them"
MISSING_MERGED = "missing cells are counted with the lowest bin, because too few would be told apart"
UNDEFINED = "undefined: one of the labels is withheld or has no rows"


@dataclass(frozen=True)
class _Feature:
    """edges: between pre-bins, increasing, in the column's unit (of text: positions in the code list);
    None until quantiles say. values: the code list, in the order of pre-bins."""

    name: str
    column: Column
    edges: Floats | None
    values: tuple[Any, ...] | None = None

    @staticmethod
    def of(name: str, column: Column, binning: str, bins: int) -> _Feature:
        """Raises PlanError for a column that has neither numbers nor a code list."""
        if column.values is not None and column.numeric:
            codes = sorted(set(column.values), key=float)
            return _Feature(name, column, np.array(codes[:-1], np.float64), tuple(codes))
        if column.values is not None and column.dtype == "text":
            return _Feature(name, column, np.arange(len(column.values) - 1.0), column.values)
        if not column.numeric:
            raise PlanError("plan.bad-column", "woe needs numeric columns, or columns with a code list", field=name)
        low, high = column.bounds()
        return _Feature(name, column, np.linspace(low, high, bins + 1)[1:-1] if binning == "equal" else None)

    @property
    def ordered(self) -> bool:
        """Whether it has extremes: names have none."""
        return self.column.numeric

    def places(self, site: SiteView) -> Floats:
        """At the site: the cells on the scale of *edges*, NaN where missing, [num_rows]."""
        if self.column.numeric:
            return site.table[self.name]
        codes = site.table.codes(self.name)
        return np.where(codes < 0, np.nan, codes)


@program(
    "statistics.woe", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"}, calls={"statistics.quantiles"}
)
class Woe:
    """Weight of evidence and information value, binned equally, by quantiles, monotonically or optimally."""

    class Params(ProgramParams):
        """target: label column with values [0, 1]. features: numeric columns and code lists (default: all).
        bins: most bins of a number. prebins: pre-bins that `monotone` and `optimal` merge. min_share: of a
        merged bin in the non-missing rows. monotone: also of `optimal`. smoothing: see ``binning.py``.
        resolution: of quantiles, relative to the schema's range."""

        target: str
        features: tuple[str, ...] = ()
        binning: Literal["equal", "quantile", "monotone", "optimal"] = "optimal"
        bins: int = Field(default=8, ge=2, le=256)
        prebins: int = Field(default=20, ge=2, le=256)
        min_share: float = Field(default=0.05, ge=0, lt=1)
        monotone: bool = False
        smoothing: float = Field(default=0.5, gt=0)
        resolution: float = Field(default=1e-5, ge=1e-9, le=0.1)

    def __init__(self, params: Params) -> None:
        self.params = params
        self._parts = params.bins if params.binning in ("equal", "quantile") else params.prebins

    def _features(self, schema: TableSchema) -> list[_Feature]:
        """Raises PlanError for a target without values [0, 1], and for features that cannot be binned."""
        asked, target = self.params, schema.columns.get(self.params.target)
        if target is None or not target.numeric or set(target.values or ()) != {0, 1}:
            raise PlanError("plan.bad-target", "woe needs a numeric target with values [0, 1]", field=asked.target)
        usable = {
            name: column
            for name, column in schema.columns.items()
            if column.role not in ("ignore", "entity", "time")
            and (column.numeric or (column.dtype == "text" and column.values is not None))
            and name != asked.target
        }
        names = asked.features or tuple(name for name, column in usable.items() if column.role == "feature")
        if bad := sorted(set(names) - set(usable)):
            raise PlanError(
                "plan.bad-column", "woe needs numeric features, or features with a code list", field=", ".join(bad)
            )
        return [_Feature.of(name, usable[name], asked.binning, asked.bins) for name in names]

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"woe": {"target", "positives", "negatives", "unlabelled", "withheld_sites", "ranking", "features":
        {name: {"iv", "bins": [{"from", "to" or "values", "count", "positives", "negatives", "share", "rate", "woe",
        "iv"}], "missing": {…} or None, "binning", "note"}}}}.

        share: of all rows with a label. A bin that is empty has no woe. ranking: features by IV, largest first.
        """
        features, rows, fewest = self._features(cohort.schema), cohort.schema.max_rows, smallest(cohort)
        send: dict[str, Array] = {}
        if numbers := tuple(feature.name for feature in features if feature.edges is None):
            probabilities = tuple(part / self._parts for part in range(1, self._parts))
            asked = Quantiles.Params(
                columns=numbers, probabilities=probabilities, error=self.params.resolution, bins=16
            )
            found = (yield from Quantiles(asked).coordinate(cohort))["quantiles"]["columns"]
            cuts = {name: np.array(found[name]["cuts"], np.float64)[: self._parts - 1] for name in numbers}
            send["edges"] = np.array([self._padded(cuts[f.name], f) for f in features if f.edges is None])
            features = [f if f.edges is not None else _Feature(f.name, f.column, cuts[f.name]) for f in features]
        sizes = self._sizes(cohort.schema)
        fields = {
            "labels": count(2, bound=rows),
            "withheld": withheld(2),
            "below": count((2, sum(sizes)), bound=rows),
            "told": count(sum(sizes), bound=1),
            "telling": count(bound=1),
            "unlabelled": count(1, bound=rows),
            "unlabelled_withheld": withheld(1),
        }
        if cohort.exact:
            total = yield Round("labels", Sum(), fields, send)
        else:
            cells = count((2, sum(sizes) + len(sizes)), bound=rows)
            total = yield Round("cells", Sum(), {"cells": cells, "unlabelled": fields["unlabelled"]}, send)
            total = _as_told(total, features, sizes)
        labels, telling = total["labels"], int(total["telling"])
        small = bool(((labels > 0) & (labels < fewest)).any())
        ends, results = np.cumsum(sizes), {}
        for number, (feature, end, size) in enumerate(zip(features, ends, sizes, strict=True)):
            below = total["below"][:, end - size : end].T
            exact = total["told"][end - size : end] == telling
            own = labels if cohort.exact else total["own"][number]
            results[feature.name] = self._described(feature, below, exact, own, small, fewest)
        return {
            "woe": {
                "target": self.params.target,
                "positives": None if small else int(labels[1]),
                "negatives": None if small else int(labels[0]),
                "unlabelled": None if UNLABELLED.hidden(total, fewest)[0] else int(total["unlabelled"][0]),
                "withheld_sites": total.members - telling if cohort.exact else 0,
                "ranking": sorted(results, key=lambda name: -(results[name]["iv"] or 0.0)),
                "features": results,
            }
        }

    def _sizes(self, schema: TableSchema) -> list[int]:
        """How many edges are asked of each feature; the first is between missing cells and all others."""
        return [1 + (self._parts - 1 if f.edges is None else len(f.edges)) for f in self._features(schema)]

    def _padded(self, cuts: Floats, feature: _Feature) -> Floats:
        """*cuts* with the last (or the range's lowest value) repeated, [parts − 1]: repeated edges cut nothing."""
        last = cuts[-1] if len(cuts) else feature.column.bounds()[0]
        return np.append(cuts, np.full(self._parts - 1 - len(cuts), last))

    # ---------------------------------------------------------------- at the site

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        told = dict.fromkeys(("withheld", "told", "telling", "unlabelled_withheld"), NOTHING)
        return {**told, "labels": touches(), "below": touches(sum(self._sizes(schema))), "unlabelled": touches()}

    def _per_record_of_cells(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"cells": touches(len(self._sizes(schema))), "unlabelled": touches()}

    @handler("labels", cells=(LABELS, UNLABELLED), record=_per_record)
    def labels(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows by label up to every edge of every feature, where the groups between are large enough."""
        label, sizes = self._label(site), self._sizes(site.table.schema)
        below, told, end = np.zeros((2, sum(sizes)), np.int64), np.zeros(sum(sizes), np.int64), 0
        for feature, levels in self._levels(site, task):
            part = slice(end, end := end + len(levels))
            below[:, part], told[part] = _up_to(site, feature, label, levels)
        rows = np.bincount(label, minlength=3)
        telling = int(((rows == 0) | (rows >= site.min_group_size)).all())
        return {
            "labels": rows[:2] * telling,
            "unlabelled": rows[2:],
            "below": below * telling,
            "told": told * telling,
            "telling": telling,
        }

    @handler("cells", record=_per_record_of_cells)
    def cells(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows by label in every part of every feature: missing cells, then up to each edge, and above."""
        only_summed(site)
        label, found = self._label(site), []
        for feature, levels in self._levels(site, task):
            places = feature.places(site)
            part = np.where(np.isnan(places), 0, np.searchsorted(levels, places))
            part += label.astype(np.int64) * (len(levels) + 1)
            counts = np.bincount(part, minlength=3 * (len(levels) + 1)).reshape(3, -1)
            found.append(counts[:2])
        unlabelled = np.array([(label == 2).sum()])
        return {"cells": np.concatenate([np.zeros((2, 0), np.int64), *found], axis=1), "unlabelled": unlabelled}

    def _label(self, site: SiteView) -> NDArray[np.int8]:
        """0, 1, or 2 for none, [num_rows]."""
        label = site.table[self.params.target]
        return np.where(np.isnan(label), 2, label).astype(np.int8)

    def _levels(self, site: SiteView, task: Task) -> Iterator[tuple[_Feature, Floats]]:
        """Each feature and the ends of its parts: −∞, of missing cells, and its edges."""
        features = self._features(site.table.schema)
        open_ended = sum(feature.edges is None for feature in features)
        edges = iter(task.take("edges", (open_ended, self._parts - 1)) if open_ended else ())
        for number, feature in enumerate(features, 1):
            asked = np.sort(next(edges)) if feature.edges is None else feature.edges
            yield feature, np.append(-np.inf, asked)
            site.progress(number, len(features))

    # ---------------------------------------------------------------- at the coordinator

    def _described(
        self, feature: _Feature, below: Ints, exact: NDArray[np.bool_], labels: Ints, small: bool, smallest: int
    ) -> dict[str, Any]:
        """One feature's result from its cumulative counts *below* [edges + 1, 2], right where *exact*."""
        found: dict[str, Any] = {"iv": None, "bins": [], "missing": None, "binning": self.params.binning, "note": ""}
        if small or not labels.all():
            return {**found, "note": UNDEFINED}
        edges = np.asarray(feature.edges)
        order = [place for place in _order(len(edges) + 1) if exact[place]]
        cuts = kept(below, labels, order, smallest, start=0, ordered=feature.ordered)
        counts = np.diff(below[cuts], axis=0, prepend=np.zeros((1, 2), np.int64), append=labels[None])
        apart = cuts[:1] == [0]
        spans = list(zip([0, *cuts], [*cuts, len(edges) + 1], strict=True))
        bins = [
            {
                **self._named(feature, edges, [spans[1 + part] for part in group]),
                **self._numbers(counts[1:][group].sum(axis=0), labels),
            }
            for group in self._grouped(feature, counts[1:], labels)
        ]
        missing = None
        if not apart:
            missing = {**self._named(feature, edges, spans[:1]), **self._numbers(counts[0], labels)}
        elif counts[0].any():
            missing = self._numbers(counts[0], labels)
        notes = [MISSING_MERGED] * (not apart) + [MERGED] * (len(cuts) < len(edges) + 1)
        iv = math.fsum(part["iv"] for part in [*bins, *([missing] if missing else [])])
        return {**found, "iv": iv, "bins": bins, "missing": missing, "note": "; ".join(notes)}

    def _named(self, feature: _Feature, edges: Floats, members: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Which values a bin holds: *members* are (place of the edge below, place of the edge above)."""
        if feature.values is not None:
            return {"values": [value for first, last in members for value in feature.values[first:last]]}
        low, high = feature.column.bounds()
        first, last = members[0][0], members[-1][1]
        return {
            "from": float(edges[first - 1]) if first else low,
            "to": float(edges[last - 1]) if last <= len(edges) else high,
        }

    def _numbers(self, counts: Ints, labels: Ints) -> dict[str, Any]:
        negatives, positives = (int(number) for number in counts)
        people = negatives + positives
        woe, iv = (float(number) for number in woe_iv(counts, labels, self.params.smoothing))
        return {
            "count": people,
            "positives": positives,
            "negatives": negatives,
            "share": people / int(labels.sum()),
            "rate": positives / people if people else None,
            "woe": woe if people else None,
            "iv": iv,
        }

    def _grouped(self, feature: _Feature, counts: Ints, labels: Ints) -> list[list[int]]:
        """Which parts (of *counts*, [parts, 2]) make up each bin, in order."""
        p = self.params
        if p.binning in ("equal", "quantile") or not len(counts):
            return [[part] for part in range(len(counts))]
        return merged(
            counts, labels, bins=p.bins, least=max(p.min_share * float(counts.sum()), 1.0), smoothing=p.smoothing,
            nominal=feature.column.dtype == "text", monotone=p.monotone or p.binning == "monotone",
            pool=p.binning == "monotone",
        )  # fmt: skip


def _as_told(total: Mapping[str, Array], features: Sequence[_Feature], sizes: Sequence[int]) -> dict[str, Any]:
    """Noisy cells as the exact round tells them; "own": labels as each feature's parts count them, [features, 2]."""
    own, below, end = np.zeros((len(features), 2), np.int64), np.zeros((2, sum(sizes)), np.int64), 0
    for number, (feature, size) in enumerate(zip(features, sizes, strict=True)):
        edges = len(np.asarray(feature.edges))
        parts = total["cells"][:, end + number : end + number + size + 1]
        parts = np.append(parts[:, : edges + 1], parts[:, -1:], axis=1)  # between repeated edges is nothing
        below[:, end : end + edges + 1] = np.cumsum(parts, axis=1)[:, :-1]
        own[number] = parts.sum(axis=1)
        end += size
    labels = np.rint(own.mean(axis=0)).astype(np.int64) if len(own) else np.zeros(2, np.int64)
    told = {"told": np.ones(sum(sizes), np.int64), "telling": np.int64(1), "unlabelled_withheld": np.zeros(1)}
    return {**told, "labels": labels, "own": own, "below": below, "unlabelled": total["unlabelled"]}


def _up_to(site: SiteView, feature: _Feature, label: NDArray[np.int8], asked: Floats) -> tuple[Ints, Ints]:
    """At a site: rows of either label up to each of *asked* (the first, −∞, has missing cells before it), [2, asked],
    and whether they are told, [asked]; what is not told is 0."""
    known = f"label cuts of {feature.name}"
    before = site.state.get(known, np.zeros(0))
    levels = np.unique(np.concatenate([before, asked]))
    place = np.searchsorted(np.append(levels, np.inf), feature.places(site))  # missing cells come last of all
    place *= 3
    place += label
    counts = np.bincount(place, minlength=3 * (len(levels) + 2)).reshape(-1, 3)
    counts[0] = counts[-1]
    reached = np.cumsum(counts[:-1], axis=0)
    order = np.searchsorted(levels, np.concatenate([before, asked[_order(len(asked))]]))
    # of the three classes: rows without a label are the difference of what is told here and of all rows
    cuts = kept(reached, reached[-1], order.tolist(), site.min_group_size, start=0, ordered=feature.ordered)
    if site.min_group_size > 1 and len(cuts) > len(before):
        site.state[known] = levels[cuts]
    at = np.searchsorted(levels, asked)
    told = np.isin(at, cuts)
    return np.where(told, reached[at, :2].T, 0), told.astype(np.int64)


def _order(size: int) -> list[int]:
    """In which order *size* edges are tried: the one beside missing cells, then the halves of all others."""
    return [0, *(1 + place for place in halving(size - 1))]


__all__ = ["LABELS", "UNLABELLED", "Woe"]
