"""Correlation matrices: Pearson exactly, Spearman to a bound that is told for every pair.

Parties: sites and coordinator. Messages: Pearson: a round of moments (a second one where a column's
spread is so small that the first lost digits), which give each column's centre and scale, then a round of
centred cross-products. Spearman: up to 1 + *refinements* rounds of histograms, which give the ranks, then the
cross-products of ranks. All are Sums.

Missing cells: ``pairwise`` takes, for each pair, the rows that have both columns; ``listwise`` the rows that
have all columns. Ranks are mid-ranks over a column's non-missing values (listwise: over the complete rows),
so that Spearman is pandas' ``df.rank().corr()``, which is ``df.corr("spearman")`` if nothing is missing.

Error. With the rows of a bin at its middle rank, the vector u of a column's ranks is known but for some e:
|e| ≤ √Σ(c³ − c)/12 over the counts c of bins that may hold different values, and more where sites protect small
groups (below). So u's direction is within arcsin(|e|/|u|) of the truth, and a correlation, the cosine between
two, within what both together may turn it. Bins hold one value each, and the answer is exact, where
the codes or integers fit into *bins*.

Small groups. A pair is withheld where fewer than k rows have both columns, or have the one but not the other:
the difference of the column's sums would tell those. (Differences between three columns' rows are not looked
at: use ``listwise``.) Sums over complete rows are withheld, all of them, where fewer than k other rows have some
column: available-case sums are often told too (``statistics.describe``), and the difference would tell those.
Pearson's sums of a column that a few people dominate are withheld, and its pairs; ranks have no magnitude.
Where a site's own numbers are seen (``site.min_group_size`` = k > 1), its histograms, of all refinements together,
hold nobody or k people between neighbouring cuts; other edges are told as the nearer cut, which is off by
D ≤ k − 1 rows, and e by D√n. And at least k of its rows share a score, their mean, so that no counts that a
coordinator makes up single out a row: e grows by at most what these groups span.

Noise. Pearson: one round, "products", about the middle of the schema's ranges in halves of them. Spearman: one
histogram, over even bins; then "grade_products", of ranks as shares of the largest, which go out with the edges, so
that what a row adds depends on that row alone. The matrix is mended to have no negative eigenvalue.

The coordinator learns, of the cohort's total: counts, moments or histograms of each column, and for each
pair the count, sums, squares and cross-product; listwise, how many incomplete rows have each column, and how
many sites left out theirs; under ``plain`` each site's. Threat model: as the plan's protection. Dropout: the
answer is over the sites of the last round; a site absent from a round is not asked again. Cost: p columns:
66 p² bytes a site, and 33 p for moments or 9 p · bins for each histogram.

Sources: Chan, Golub & LeVeque 1983 (two-pass moments); Kendall & Gibbons 1990, ch. 3 (mid-ranks, Σ(t³ − t)/12).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Setting
from scipy.special import betainc

from atoll.contract.disclosure import TOP, Cells
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Field, Reply, Round, Steps, Sum, Task, count, real, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics import ranks
from atoll.statistics.group_by import add_largest
from atoll.statistics.noise import (
    NOISED,
    NOTHING,
    coarse,
    cumulated,
    fine,
    mended,
    only_summed,
    powers,
    reach,
    sent_array,
    smallest,
)

Floats = NDArray[np.float64]
COLUMN = Cells("count", "withheld", values=("s1", "s2"), largest="top")
BINS = Cells("histogram", "withheld")
RANKED = Cells("pairs", "withheld", values=("sums",), lines=(2,))
"""[columns, columns, 2]: rows with both columns, and rows with the first alone."""
PAIRS = replace(RANKED, largest="top")
LOST = 1e-6
"""A spread below this share of the mean square has lost digits."""


@program("statistics.correlation", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Correlation:
    """Pearson or Spearman correlation matrix of numeric columns, with counts and p-values, by Sum."""

    class Params(ProgramParams):
        """columns: numeric columns (default: all). method, missing: see the module. bins: of the histograms that
        ranks come from; refinements: how often, at most, these are drawn anew where the rows are."""

        columns: tuple[str, ...] = ()
        method: Literal["pearson", "spearman"] = "pearson"
        missing: Literal["pairwise", "listwise"] = "pairwise"
        bins: int = Setting(default=2048, ge=16, le=65_536)
        refinements: int = Setting(default=3, ge=0, le=8)

    def __init__(self, params: Params) -> None:
        self.params = params
        self._listwise = params.missing == "listwise"

    def _names(self, schema: TableSchema) -> tuple[str, ...]:
        names = self.params.columns or schema.numeric_columns()
        if bad := sorted(set(names) - set(schema.numeric_columns())):
            raise PlanError("plan.bad-column", "correlation needs numeric columns of the schema", field=", ".join(bad))
        return names

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"correlation": {"method", "missing", "columns", "matrix", "pairs_count", "p_values",
        "error_bound", "mean", "std", "notes"}}.

        Matrices are lists of rows in the order of *columns*; None where a correlation is undefined (a column
        that does not vary) or withheld. error_bound: None for Pearson, and under noise. p_values: two-sided, of
        Student's t with n − 2 degrees of freedom. mean, std: of each column (Pearson), for programs
        that go on from here.
        """
        names, p = self._names(cohort.schema), len(self._names(cohort.schema))
        ranked = self.params.method == "spearman"
        error, fewest = np.zeros(p), smallest(cohort)
        if ranked and not cohort.exact:
            send, center, scale, bound, sites = yield from self._grades(cohort, names)
        elif not cohort.exact:
            (center, scale), bound, sites = self._ranges(cohort.schema), float(cohort.schema.max_rows), None
            send = {"center": center, "scale": scale}
        elif ranked:
            counts, error, bound, sites = yield from self._histograms(cohort, names)
            send, center, scale = {"counts": counts}, np.zeros(p), ranks.scores(counts)[1]
        else:
            center, scale, bound, sites = yield from self._scales(cohort, names)
            send = {"center": center, "scale": scale}
        fields = {
            **_counted(cohort.schema, p),
            "pairs": count((p, p, 2), bound=cohort.schema.max_rows),
            "sums": real((p, p, 2, 3), bound=bound, step=fine(bound, 20) if cohort.exact else coarse(1.0)),
            "withheld": withheld((p, p, 2)),
        }
        asked = ("rank_products" if cohort.exact else "grade_products") if ranked else "products"
        if asked == "rank_products":
            fields["blur"] = real(p, bound=4 * bound, step=fine(4 * bound, 20))
        total = yield Round(asked, Sum(), fields, send, sites=sites)
        if asked == "rank_products":
            error = error + scale * np.sqrt(total["blur"])
        hidden = PAIRS.hidden(total, fewest)[..., 0]
        hidden |= hidden.T | _tell_tale(total, fewest)
        n = total["pairs"][..., 0].astype(np.float64)
        s, q, c = np.moveaxis(total["sums"][..., 0, :], -1, 0)
        if not cohort.exact:
            n, s, q, c = self._averaged(n, s, q, c)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.maximum(q - s**2 / n, 0)
            r = (c - s * s.T / n) / np.sqrt(spread * spread.T)
        flat = ~(spread > np.maximum(LOST * q, 0)) | (n < 2)
        undefined = flat | flat.T | hidden
        r = np.where(undefined, np.nan, np.clip(r, -1, 1))
        if not cohort.exact:
            r = _mended(r)
        np.fill_diagonal(r, np.where(np.diag(undefined), np.nan, 1.0))
        mean = center + scale * np.diag(s) / n.diagonal().clip(1)
        std = scale * np.sqrt(np.diag(spread) / (n.diagonal() - 1).clip(1))
        if not (ranked or cohort.exact):
            mean, std = center + np.clip(mean - center, -scale, scale), np.minimum(std, 2 * scale)
        known = ~hidden.diagonal() & (n.diagonal() > 1)
        noted = [] if cohort.exact else [NOISED]
        described = {
            "mean": _told(np.where(known, mean, np.nan)),
            "std": _told(np.where(known, np.where(flat.diagonal(), 0, std), np.nan)),
        }
        with np.errstate(invalid="ignore", divide="ignore"):
            known_error = ranked and cohort.exact
            bounds = _turned(r, error[:, None] / (scale[:, None] * np.sqrt(spread))) if known_error else None
        found = {
            "method": self.params.method,
            "missing": self.params.missing,
            "columns": list(names),
            "matrix": _told(r),
            "pairs_count": _told(np.where(hidden, np.nan, n), int),
            "p_values": _told(_p_values(r, n)),
            "error_bound": None if bounds is None else _told(bounds),
            **({} if ranked else described),
            "notes": [*_notes(names, hidden, flat & ~hidden, " beyond a bin" if ranked else ""), *noted],
        }
        return {"correlation": found}

    def _scales(
        self, cohort: Cohort, names: tuple[str, ...]
    ) -> Generator[Any, Any, tuple[Floats, Floats, float, tuple[str, ...]]]:
        """(each column's mean, its standard deviation, a bound for a site's sums of squares in these units, sites)."""
        middle, half = self._ranges(cohort.schema)
        center, unit, bound, sites = middle, half, float(cohort.schema.max_rows), None
        for _ in range(2):
            fields = {
                **_counted(cohort.schema, len(names)),
                "count": count(len(names), bound=cohort.schema.max_rows),
                "s1": real(len(names), bound=bound, step=fine(bound, 20)),
                "s2": real(len(names), bound=bound, step=fine(bound, 20)),
                "withheld": withheld(len(names)),
            }
            send = {"center": center, "scale": unit}
            total = yield Round("moments", Sum(), fields, send, sites=sites)
            usable = (total["count"] > 0) & ~COLUMN.hidden(total, cohort.min_group_size)
            usable &= not _tell_tale(total, cohort.min_group_size)
            n, sites = np.maximum(total["count"], 1).astype(np.float64), total.sites
            shift, square = total["s1"] / n, total["s2"] / n
            variance = np.maximum(square - shift**2, 0)
            lost = usable & ~(variance > LOST * square)
            center = np.where(usable, center + unit * shift, middle)
            spread = np.where(usable & ~lost, unit * np.sqrt(variance), half)  # lost twice: it does not vary
            bound = 4 * max(float(n.max(initial=1)), cohort.schema.max_rows)
            if not lost.any():
                break
            unit = np.where(lost, half * math.sqrt(LOST), half)
        return center, spread, bound, sites or ()

    def _histograms(
        self, cohort: Cohort, names: tuple[str, ...]
    ) -> Generator[Any, Any, tuple[Floats, Floats, float, tuple[str, ...]]]:
        """(counts [columns, bins], bound of |e| [columns], bound for a site's sums of squared scores, sites)."""
        columns = [cohort.schema.columns[name] for name in names]
        size, rows, sites = self._size(cohort.schema), cohort.schema.max_rows, None
        edges = np.array([ranks.edges(column, size, None) for column in columns]).reshape(-1, size)
        for number in range(1 + self.params.refinements):
            fields = {
                **_counted(cohort.schema, len(names)),
                "histogram": count(edges.shape, bound=rows),
                "slack": count(len(names), bound=rows),
                "withheld": withheld(edges.shape),
            }
            total = yield Round("histogram", Sum(), fields, {"edges": edges}, sites=sites)
            counts, sites = total["histogram"].astype(np.float64), total.sites
            counts[total["withheld"].any(axis=1)] = 0  # ranks of a column of which a part is withheld are none
            single = np.array([ranks.single(c, e) for c, e in zip(columns, edges, strict=True)]).reshape(-1, size)
            within = np.array([ranks.within(c, s, d) for c, s, d in zip(counts, single, total["slack"], strict=True)])
            coarse = within > (2 / size) ** 2 * counts.sum(axis=1) ** 3 / 12
            if number == self.params.refinements or not coarse.any():
                break
            n = counts.sum(axis=1, keepdims=True)
            weights = np.where(single, np.minimum(counts, n / size), counts)
            edges = np.array(
                [
                    ranks.edges(c, size, (e, w)) if v else e
                    for c, e, w, v in zip(columns, edges, weights, within, strict=True)
                ]
            )
        n, scale, slack = counts.sum(axis=1), ranks.scores(counts)[1], total["slack"]
        reach = np.where(slack > 0, (n / math.sqrt(12) + slack) / scale, 1.0)
        bound = float((4 * n * reach**2).max(initial=4 * rows))
        return counts, np.sqrt(within) + slack * np.sqrt(n), bound, sites or ()

    # ---------------------------------------------------------------- under noise

    def _ranges(self, schema: TableSchema) -> tuple[Floats, Floats]:
        """(middle, half) of each column's range, each [columns]."""
        bounds = [schema.columns[name].bounds() for name in self._names(schema)]
        low, high = np.array(bounds, float).reshape(-1, 2).T
        return (low + high) / 2, np.where(high > low, (high - low) / 2, 1.0)

    def _grades(
        self, cohort: Cohort, names: tuple[str, ...]
    ) -> Generator[Any, Any, tuple[dict[str, Floats], Floats, Floats, float, tuple[str, ...]]]:
        """({edges and grades of bins}, zeros, the unit of grades, a bound for a site's sums, sites)."""
        p, size, rows = len(names), self._size(cohort.schema), cohort.schema.max_rows
        edges = np.array([ranks.edges(cohort.schema.columns[name], size, None) for name in names]).reshape(p, size)
        fields = {
            **_counted(cohort.schema, p),
            "histogram": real(edges.shape, bound=rows, step=1),  # clamped counts would add up to too many
            "slack": count(p, bound=rows),
            "withheld": withheld(edges.shape),
        }
        total = yield Round("histogram", Sum(), fields, {"edges": edges})
        scores, unit = ranks.scores(np.diff(cumulated(total["histogram"]), axis=1, prepend=0).astype(np.float64))
        most = np.maximum(np.abs(scores).max(axis=1, initial=0), 1e-9)
        return {"edges": edges, "grades": scores / most[:, None]}, np.zeros(p), unit * most, float(rows), total.sites

    def _averaged(self, *sums: Floats) -> tuple[Floats, ...]:
        """Rows, sums, squares and cross-products [columns, columns], where what is told twice has noise twice."""
        n, s, q, c = sums
        if self._listwise and n.size:
            n = np.full_like(n, np.rint(n.mean()))
            s, q = (np.repeat(power.mean(axis=1, keepdims=True), len(n), axis=1) for power in (s, q))
        n = np.rint((n + n.T) / 2)
        limit = np.maximum(n, 0)
        return n, np.clip(s, -limit, limit), np.clip(q, 0, limit), (c + c.T) / 2

    # ---------------------------------------------------------------- what one record changes

    def _counts_per_record(self, schema: TableSchema) -> dict[str, Norms]:
        apart = touches(len(self._names(schema)) if self._listwise else 0)
        return {"rows": touches(), "apart": apart, "left_out": NOTHING, "withheld": NOTHING}

    def _moments_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        s1, s2 = powers(self._reach(schema, sent))
        return {**self._counts_per_record(schema), "count": touches(len(self._names(schema))), "s1": s1, "s2": s2}

    def _histogram_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        names = self._names(schema)
        _sorted(sent_array(sent, "edges", (len(names), self._size(schema))))
        return {**self._counts_per_record(schema), "histogram": touches(len(names)), "slack": NOTHING}

    def _products_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return self._pairs_per_record(schema, self._reach(schema, sent))

    def _grades_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        shape = (len(self._names(schema)), self._size(schema))
        grades = _graded(sent_array(sent, "grades", shape))
        _sorted(sent_array(sent, "edges", shape))
        return self._pairs_per_record(schema, np.abs(grades).max(axis=1, initial=0))

    def _reach(self, schema: TableSchema, sent: Mapping[str, Array]) -> Floats:
        middle, half = self._ranges(schema)
        center, scale = (sent_array(sent, name, middle.shape) for name in ("center", "scale"))
        return reach(middle - half, middle + half, center, _positive(scale))

    def _pairs_per_record(self, schema: TableSchema, most: Floats) -> dict[str, Norms]:
        """Of columns with |z| ≤ *most* a record adds z, z² and zzᵀ, the former once for each pair."""
        p = len(most)
        s, q = powers(most)
        cross = s.l2 * s.l2  # of the outer product zzᵀ
        l1, l2 = p * (s.l1 + q.l1) + s.l1 * s.l1, math.sqrt(p * (s.l2 * s.l2 + q.l2 * q.l2) + cross * cross)
        return {**self._counts_per_record(schema), "pairs": touches(p * p), "sums": Norms(l1, l2)}

    def _size(self, schema: TableSchema) -> int:
        return max([self.params.bins, *(len(schema.columns[n].values or ()) for n in self._names(schema))])

    # ---------------------------------------------------------------- at the site

    def _batches(self, site: SiteView, apart: NDArray[np.int64]) -> Iterator[Floats]:
        """Matrices of a few MiB, of the rows that count; *apart* [columns] then has each column's values in others."""
        names = self._names(site.table.schema)
        done, size = 0, max(1024, (1 << 21) // max(len(names), 1))
        for batch in site.table.batches(names, size):
            if self._listwise:
                known = ~np.isnan(batch)
                complete = known.all(axis=1)
                apart += known.sum(axis=0) - complete.sum()
                yield batch[complete]
            else:
                yield batch
            done += len(batch)
            site.progress(done, len(site.table))

    @staticmethod
    def _guarded(site: SiteView, apart: NDArray[np.int64], reply: dict[str, Any]) -> Reply:
        """The reply, or nothing of it where a column's sums less those of the complete rows would tell a few."""
        if ((apart > 0) & (apart < site.min_group_size)).any():
            nothing = {name: np.zeros_like(array) for name, array in reply.items()}
            return {**nothing, "apart": np.zeros_like(apart), "left_out": 1}
        return {**reply, "apart": apart, "left_out": 0}

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
            add_largest(top, _most(_magnitudes(batch)))
            rows += len(batch)
        return self._guarded(site, apart, {"rows": rows, "count": counts, "s1": s1, "s2": s2, "top": top})

    @handler("products", groups=("rows",), cells=PAIRS, record=_products_per_record)
    def products(self, site: SiteView, task: Task) -> Reply:
        """At the site: for each pair of columns the rows, sums, squares and cross-products about the centre sent."""
        p = len(self._names(site.table.schema))
        center, scale = task.take("center", (p,)), _positive(task.take("scale", (p,)))
        most = np.zeros((p, p, TOP + 1))
        reply = self._products(site, lambda batch: (batch - center) / scale, most)
        return {**reply, "top": np.stack([_either(most), np.zeros_like(most)], axis=2)}

    @handler("histogram", groups=("rows",), cells=BINS, record=_histogram_per_record)
    def histogram(self, site: SiteView, task: Task) -> Reply:
        """At the site: how many rows each column has from each edge sent to the next."""
        names, smallest = self._names(site.table.schema), site.min_group_size
        asked = _sorted(task.take("edges", (len(names), self._size(site.table.schema))))
        cuts = [site.state.get(f"cuts {name}", np.zeros(0)) for name in names]
        edges = [np.unique(np.concatenate(pair)) for pair in zip(asked, cuts, strict=True)]
        counts, rows = [np.zeros(len(e), np.int64) for e in edges], 0
        apart = np.zeros(len(names), np.int64)
        for batch in self._batches(site, apart):
            for column, e, found in zip(batch.T, edges, counts, strict=True):
                found += np.bincount(ranks.bins(e, column[~np.isnan(column)]), minlength=len(e))
            rows += len(batch)
        told, slack = np.zeros(asked.shape, np.int64), np.zeros(len(names), np.int64)
        own = np.zeros(asked.shape)
        for i, name in enumerate(names):
            n, below = counts[i].sum(), np.cumsum(counts[i]) - counts[i]
            shown, cut = ranks.cut(below, n, np.isin(edges[i], cuts[i]), smallest)
            place = np.searchsorted(edges[i], asked[i])
            told[i] = np.diff(np.append(shown[place], n))
            told[i, 0] += shown[place[0]]
            own[i] = np.diff(np.append(below[place], n))
            own[i, 0] += below[place[0]]
            slack[i] = (smallest - 1) * bool((shown != below)[place].any())
            if smallest > 1:
                site.state[f"cuts {name}"] = edges[i][cut]
        site.state["edges"], site.state["told"] = asked.copy(), told.astype(np.float64)
        site.state["own"] = own
        return self._guarded(site, apart, {"rows": rows, "histogram": told, "slack": slack})

    @handler("rank_products", groups=("rows",), cells=RANKED)
    def rank_products(self, site: SiteView, task: Task) -> Reply:
        """At the site: the same of the rows' ranks in the histograms sent."""
        shape = (len(self._names(site.table.schema)), self._size(site.table.schema))
        counts, edges = task.take("counts", shape), site.state.get("edges")
        if edges is None or edges.shape != shape:
            raise ProtocolError("task.array", "no histogram was asked for before its ranks", field="counts")
        scores, _ = ranks.scores(np.maximum(counts, site.state["told"]))
        shared = [ranks.shared(*each, site.min_group_size) for each in zip(scores, site.state["own"], strict=True)]
        table = [score for score, _ in shared]
        reply = self._products(site, lambda batch: ranks.looked_up(batch, edges, table))
        blur = np.array([blur for _, blur in shared])
        return {**reply, "blur": np.zeros_like(blur) if reply["left_out"] else blur}

    @handler("grade_products", groups=("rows",), cells=RANKED, record=_grades_per_record)
    def grade_products(self, site: SiteView, task: Task) -> Reply:
        """At the site: the same of the grades sent, of the bins from each edge sent to the next."""
        only_summed(site)
        shape = (len(self._names(site.table.schema)), self._size(site.table.schema))
        edges, grades = _sorted(task.take("edges", shape)), _graded(task.take("grades", shape))
        return self._products(site, lambda batch: ranks.looked_up(batch, edges, list(grades)))

    def _products(self, site: SiteView, scored: Callable[[Floats], Floats], most: Floats | None = None) -> Reply:
        """Into *most* go the first column's largest magnitudes in each pair's rows, [columns, columns, TOP + 1]."""
        p, rows = len(self._names(site.table.schema)), 0
        pairs, sums, apart = np.zeros((p, p)), np.zeros((3, p, p)), np.zeros(p, np.int64)
        for seen in self._batches(site, apart):
            batch = scored(seen)
            known = ~np.isnan(batch)
            holes = np.asarray(~known.all(axis=0))  # only these columns need a product of masks
            mask, z = known[:, holes].astype(np.float64), np.where(known, batch, 0) if holes.any() else batch
            common = np.minimum.outer(known.sum(axis=0), known.sum(axis=0)).astype(np.float64)
            common[np.ix_(holes, holes)] = mask.T @ mask
            pairs += common
            for power, total in ((z, sums[0]), (z**2, sums[1])):
                together = np.repeat(power.sum(axis=0)[:, None], p, axis=1)
                together[:, holes] = power.T @ mask
                total += together
            sums[2] += z.T @ z
            rows += len(z)
            if most is not None:
                add_largest(most.reshape(p * p, TOP + 1), _most_of_pairs(_magnitudes(seen), known))
        both = np.rint(pairs).astype(np.int64)
        told = np.zeros((p, p, 2, 3))
        told[:, :, 0] = np.moveaxis(sums, 0, -1)
        alone = np.diag(both)[:, None] - both
        return self._guarded(site, apart, {"rows": rows, "pairs": np.stack([both, alone], axis=-1), "sums": told})


def _counted(schema: TableSchema, columns: int) -> dict[str, Field]:
    """Fields of every round: rows, how many others (listwise) have each column, and sites that left out their rows."""
    rows = schema.max_rows
    return {"rows": count(bound=rows), "apart": count(columns, bound=rows), "left_out": count(bound=1)}


def _tell_tale(total: Mapping[str, Array], min_group_size: int) -> bool:
    """Whether sums over the complete rows may not be told, at a site or of the cohort."""
    few = (total["apart"] > 0) & (total["apart"] < min_group_size)
    return bool(few.any() or total["left_out"] > 0)


def _magnitudes(batch: Floats) -> Floats:
    """[columns, rows] of a batch [rows, columns], 0 where missing."""
    return np.nan_to_num(np.abs(batch.T), nan=0.0)


def _most(sizes: Floats) -> Floats:
    """The TOP largest (in any order) and the sum of each column's magnitudes [columns, rows]; [columns, TOP + 1]."""
    found, n = np.zeros((len(sizes), TOP + 1)), min(TOP, sizes.shape[1])
    found[:, TOP] = sizes.sum(axis=1)
    if n:
        found[:, :n] = np.partition(sizes, -n, axis=1)[:, -n:]
    return found


def _most_of_pairs(sizes: Floats, known: NDArray[np.bool_], near: int = 64) -> Floats:
    """Of each pair of columns :func:`_most` of the first's magnitudes [columns, rows] in the rows *known* [rows,
    columns] of the second; [columns², TOP + 1]. Mostly they are among a column's *near* largest."""
    p, rows = sizes.shape
    found = np.zeros((p, p, TOP + 1))
    found[..., TOP] = sizes @ known.astype(np.float64)
    for i, size in enumerate(sizes):
        place = np.argpartition(size, -near)[-near:] if rows > near else np.arange(rows)
        there = known[place]
        found[i, :, :TOP] = _most((size[place, None] * there).T)[:, :TOP]
        if rows > near:
            for j in np.flatnonzero(there.sum(axis=0) < TOP):
                found[i, j, :TOP] = _most((size * known[:, j])[None])[0, :TOP]
    return found.reshape(p * p, TOP + 1)


def _either(most: Floats) -> Floats:
    """As :func:`_most`, but such that a pair is dominated where either of its columns is, of *most* [p, p, TOP + 1]."""
    with np.errstate(invalid="ignore"):
        share = np.nan_to_num(np.cumsum(most[..., :TOP], axis=-1) / most[..., TOP:], nan=0.0)
    share = np.minimum(np.maximum(share, share.swapaxes(0, 1)), 1.0)
    top = np.diff(share, axis=-1, prepend=0.0)
    return np.concatenate([top, np.maximum(top.sum(axis=-1, keepdims=True), 1.0)], axis=-1)


# ---------------------------------------------------------------- what is told


def _turned(r: Floats, size: Floats) -> Floats:
    """Most that cosines *r* are off when each vector may be off by *size* of its length."""
    angle = np.where(size < 1, np.arcsin(np.minimum(size, 1)), np.pi)
    turn, theta = angle + angle.T, np.arccos(r)
    bound = np.maximum(np.cos(np.maximum(theta - turn, 0)) - r, r - np.cos(np.minimum(theta + turn, np.pi)))
    bound = np.where(turn > 0, bound, 0.0)
    np.fill_diagonal(bound, 0.0)
    return np.where(np.isnan(r), np.nan, bound)


def _p_values(r: Floats, n: Floats) -> Floats:
    """Two-sided p-values of no correlation, of Student's t: 1 − I(r²) of a beta distribution."""
    with np.errstate(invalid="ignore"):
        tail = betainc(np.maximum(n - 2, 1) / 2, 0.5, (1 - r) * (1 + r))
    return np.where(np.isnan(r), np.nan, np.where(n > 2, tail, 1.0))


def _positive(scale: Floats) -> Floats:
    if not (scale > 0).all():
        raise ProtocolError("task.array", "a task's array is not what the handler takes", field="scale")
    return scale


def _sorted(edges: Floats) -> Floats:
    if (np.diff(edges, axis=1) < 0).any():
        raise ProtocolError("task.array", "a task's array is not what the handler takes", field="edges")
    return edges


def _graded(grades: Floats) -> Floats:
    if (np.abs(grades) > 1).any():
        raise ProtocolError("task.array", "a task's array is not what the handler takes", field="grades")
    return grades


def _mended(r: Floats) -> Floats:
    """Of the columns whose correlations are all defined, a matrix that is one; others stay."""
    whole = ~np.isnan(r.diagonal())
    place = np.ix_(whole, whole)
    if whole.any() and not np.isnan(r[place]).any():
        r[place] = mended(r[place])
    return r


def _told(values: Floats, kind: type = float) -> list[Any]:
    """As (lists of) lists, None for NaN."""
    return [_told(v, kind) if v.ndim else None if np.isnan(v) else kind(v) for v in values]


def _notes(names: tuple[str, ...], hidden: NDArray[np.bool_], flat: NDArray[np.bool_], beyond: str) -> list[str]:
    """Why correlations are not told: *hidden*, and *flat* (the first column, in the rows that both have)."""
    notes, still = [], flat.diagonal()
    if still.any():
        notes.append(f"does not vary{beyond}, so correlations are undefined: " + ", ".join(np.array(names)[still]))
    for mask, why in (
        (hidden, "withheld, as too few people have both columns, or one without the other, or make most of a column"),
        ((flat | flat.T) & ~still & ~still[:, None], "undefined, as one hardly varies in the rows that have both"),
    ):
        pairs = [f"{names[i]}-{names[j]}" if i < j else names[i] for i, j in np.argwhere(np.triu(mask))]
        if pairs:
            notes.append(f"{why}: {', '.join(pairs)}")
    return notes


# ---------------------------------------------------------------- for programs that go on from here


def complete_cases(
    cohort: Cohort, columns: tuple[str, ...]
) -> Generator[Any, Any, tuple[dict[str, Any], Floats, Floats, Floats]]:
    """Covariance of *columns* over the rows that have all of them; for programs that call "statistics.correlation".

    Returns (the result under "correlation", means [p], standard deviations [p], correlations [p, p]); NaN
    where undefined or withheld. Covariances are correlations times standard deviations.
    """
    steps = Correlation(Correlation.Params(columns=columns, missing="listwise"))
    found = (yield from steps.coordinate(cohort))["correlation"]
    mean, std, matrix = (np.array(found[name], np.float64) for name in ("mean", "std", "matrix"))
    return found, mean, std, matrix.reshape(len(mean), len(mean))


__all__ = ["Correlation", "complete_cases"]
