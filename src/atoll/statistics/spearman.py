"""Spearman's half of ``statistics.correlation``: ranks from histograms, which give each bin's rows their middle rank.

Up to 1 + *refinements* rounds of histograms, each drawn anew where the rows are, then the cross-products of ranks in
units of their standard deviation. The vector u of a column's ranks is known but for some e: |e| ≤ √Σ(c³ − c)/12 over
the counts c of bins that may hold different values (Kendall & Gibbons 1990, ch. 3), and more where sites protect small
groups.

Small groups. Where a site's own numbers are seen (``site.min_group_size`` = k > 1), its histograms, of all refinements
together, hold nobody or k people between neighbouring cuts; other edges are told as the nearer cut, which is off by
D ≤ k − 1 rows, and e by D√n. And at least k of its rows share a score, their mean, so that no counts that a
coordinator makes up single out a row: e grows by at most what these groups span.

Noise. One histogram, over even bins; then the products of grades, ranks as shares of the largest, which go out with
the edges, so that what a row adds depends on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.disclosure import Cells
from atoll.contract.errors import ProtocolError
from atoll.contract.program import Cohort, SiteView, handler
from atoll.contract.rounds import Reply, Round, Sum, Task, count, not_taken, real, taken, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics import ranks
from atoll.statistics.noise import NOTHING, cumulated, fine, only_summed
from atoll.statistics.pairs import RANKED, Pairs, Scores, counted, guarded

Floats = NDArray[np.float64]
BINS = Cells("histogram", "withheld")


class Spearman(Pairs):
    """Scores are ranks."""

    def _size(self, schema: TableSchema) -> int:
        """How many bins a histogram has: a code list needs one a code."""
        bins: int = self.params.bins
        return max([bins, *(len(schema.columns[name].values or ()) for name in self._names(schema))])

    def _ranked(self, cohort: Cohort, names: tuple[str, ...]) -> Generator[Any, Any, Scores]:
        """Each column's mid-ranks, centred; under noise their grades."""
        columns = [cohort.schema.columns[name] for name in names]
        size, rows = self._size(cohort.schema), cohort.schema.max_rows
        edges = np.array([ranks.edges(column, size, None) for column in columns]).reshape(-1, size)
        fields = {
            **counted(cohort.schema, len(names)),
            # under noise no counts: clamped ones would add up to too many
            "histogram": count(edges.shape, bound=rows) if cohort.exact else real(edges.shape, bound=rows, step=1),
            "slack": count(len(names), bound=rows),
            "withheld": withheld(edges.shape),
        }
        if not cohort.exact:
            total = yield Round("histogram", Sum(), fields, {"edges": edges})
            scores, unit = ranks.scores(np.diff(cumulated(total["histogram"]), axis=1, prepend=0).astype(np.float64))
            most = np.maximum(np.abs(scores).max(axis=1, initial=0), 1e-9)
            send = {"edges": edges, "grades": scores / most[:, None]}
            return Scores("grade_products", send, np.zeros(len(names)), unit * most, float(rows), total.sites)
        sites = None
        for number in range(1 + self.params.refinements):
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
        blur = {"blur": real(len(names), bound=4 * bound, step=fine(4 * bound, 20))}
        error = np.sqrt(within) + slack * np.sqrt(n)
        send = {"counts": counts, "edges": edges}  # else sites could be asked of histograms that are not the same
        return Scores("rank_products", send, np.zeros(len(names)), scale, bound, sites, error, blur)

    # -- what one record changes

    def _histogram_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        names = self._names(schema)
        _sorted(taken(sent, "edges", (len(names), self._size(schema))))
        return {**self._counts_per_record(schema), "histogram": touches(len(names)), "slack": NOTHING}

    def _grades_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        shape = (len(self._names(schema)), self._size(schema))
        grades = _graded(taken(sent, "grades", shape))
        _sorted(taken(sent, "edges", shape))
        return self._pairs_per_record(schema, np.abs(grades).max(axis=1, initial=0))

    # -- at a site

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
        return guarded(site, apart, {"rows": rows, "histogram": told, "slack": slack})

    @handler("rank_products", groups=("rows",), cells=RANKED)
    def rank_products(self, site: SiteView, task: Task) -> Reply:
        """At the site: for each pair of columns the sums of the rows' ranks in the histograms sent."""
        shape = (len(self._names(site.table.schema)), self._size(site.table.schema))
        counts, edges = task.take("counts", shape), task.take("edges", shape)
        if not np.array_equal(site.state.get("edges", np.zeros(0)), edges):
            raise ProtocolError("task.array", "no such histogram was asked for before its ranks", field="edges")
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


def _sorted(edges: Floats) -> Floats:
    if (np.diff(edges, axis=1) < 0).any():
        raise not_taken("edges")
    return edges


def _graded(grades: Floats) -> Floats:
    if (np.abs(grades) > 1).any():
        raise not_taken("grades")
    return grades
