"""Frequency tables of code lists, and histograms of numbers whose small bins are merged.

Parties: sites and coordinator. Messages: one round, one Sum. The coordinator learns, of the cohort's
total: for each code of each column the rows that have it, and those without a value; for each other
numeric column its count, and bounds of the cumulative counts at the bins' edges; under ``plain`` each
site's. Codes are told apart by withholding small cells and their complement. Bins have an order, so a
site cuts a column only where at least its own smallest group (or nobody) is between two cuts, and at
least that group in the first and the last part, so that no empty bin shows where an extreme is. The
coordinator keeps the edges at which all sites cut and that pass the same test for the cohort: a bin that
is small at one site is merged with its neighbour, and every count of a merged bin is exact (see
``statistics.quantiles``). Under noise the bins themselves are asked for, as one record changes one of them but all
cumulative counts above it. Threat model: as the plan's protection. Dropout: the tables of the survivors.
Cost: one round, 9 bytes a code and 16 bytes a bin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import Cells
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.noise import NOTHING, only_summed, smallest
from atoll.statistics.quantiles import COUNT, cumulative, cut

CODES = Cells("codes", "codes_withheld", lines=(1,))


@program("statistics.frequency", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Frequency:
    """Frequency tables of code lists and histograms of numeric columns, by one Sum."""

    class Params(ProgramParams):
        """columns: with a code list, or numeric (default: all such features and labels). bins: of equal width
        over the schema's range. edges: other inner edges for some of the numeric columns, increasing."""

        columns: tuple[str, ...] = ()
        bins: int = Field(default=20, ge=1, le=4096)
        edges: dict[str, tuple[float, ...]] = Field(default_factory=dict)

    def __init__(self, params: Params) -> None:
        self.params = params

    def _columns(self, schema: TableSchema) -> tuple[dict[str, int], dict[str, NDArray[np.float64]]]:
        """({column with a code list: number of codes}, {numeric column: edges [num_bins + 1]})."""
        known = {n: c for n, c in schema.columns.items() if c.role != "ignore" and (c.values or c.numeric)}
        default = [n for n, c in known.items() if c.role in ("feature", "label")]
        names = self.params.columns or tuple(default)
        codes = {name: len(known[name].values or ()) for name in names if name in known and known[name].values}
        numbers = [name for name in names if name not in codes and name in schema.numeric_columns()]
        if bad := sorted((set(names) - set(codes) - set(numbers)) | (set(self.params.edges) - set(numbers))):
            raise PlanError(
                "plan.bad-column", "frequency needs columns with a code list, or numeric ones (which may have edges)",
                field=", ".join(bad),
            )  # fmt: skip
        edges = {}
        for name in numbers:
            low, high = known[name].bounds()
            edges[name] = np.linspace(low, high, self.params.bins + 1)
            if name in self.params.edges:
                edges[name] = np.array([low, *self.params.edges[name], high])
                if (np.diff(edges[name]) <= 0).any():
                    raise PlanError("plan.bad-value", "edges must increase within the schema's range", field=name)
        return codes, edges

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"frequency": {"columns": {name: {"kind": "codes", "values", "counts", "missing"} or
        {"kind": "histogram", "edges", "counts", "count", "withheld_sites"}}}}.

        Withheld counts are None. A bin holds low < x ≤ high (the first one also its lowest edge); bins of
        fewer than the plan's smallest group, and an empty first or last one, are merged. withheld_sites: how many
        had too few values to tell, and are not in count.
        """
        codes, edges = self._columns(cohort.schema)
        rows = cohort.schema.max_rows
        table, bounds, size = self._shapes(codes, edges)
        fields = {
            "codes": count(table, bound=rows),
            "codes_withheld": withheld(table),
            "count": count(size, bound=rows),
            "low": count(bounds, bound=rows),
            "high": count(bounds, bound=rows),
            "withheld": withheld(size),
        }
        if cohort.exact:
            total = yield Round("tables", Sum(), fields)
        else:
            noisy = {"codes": fields["codes"], "bins": count((size, bounds[1] + 1), bound=rows)}
            total = _as_tables((yield Round("cells", Sum(), noisy)), list(edges.values()))
        hidden, columns = CODES.hidden(total, smallest(cohort)), dict[str, Any]()
        for i, (name, length) in enumerate(codes.items()):
            cells = zip(total["codes"][i, : length + 1].tolist(), hidden[i].tolist(), strict=False)
            counts = [None if h else n for n, h in cells]
            values = list(cohort.schema.columns[name].values or ())
            columns[name] = {"kind": "codes", "values": values, "counts": counts[:-1], "missing": counts[-1]}
        for i, (name, places) in enumerate(edges.items()):
            n, asked = int(total["count"][i]), places[1:-1]
            low, high = (total[k][i, : len(asked)] for k in ("low", "high"))
            told = n >= max(smallest(cohort), 1)
            exact = (low == high) & told
            cuts, below = cut(asked[exact], low[exact], n, smallest(cohort))
            columns[name] = {
                "kind": "histogram",
                "edges": [float(places[0]), *cuts.tolist(), float(places[-1])] if told else [],
                "counts": np.diff([0, *below, n]).tolist() if told else [],
                "count": n if told or not n else None,
                "withheld_sites": int(total["withheld"][i]),
            }
        chosen = self.params.columns or [n for n in cohort.schema.columns if n in columns]
        return {"frequency": {"columns": {name: columns[name] for name in chosen}}}

    @staticmethod
    def _shapes(
        codes: Mapping[str, int], edges: Mapping[str, NDArray[np.float64]]
    ) -> tuple[tuple[int, int], tuple[int, int], int]:
        widest = max((len(places) - 2 for places in edges.values()), default=0)
        return (len(codes), max(codes.values(), default=0) + 1), (len(edges), widest), len(edges)

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        codes, edges = self._columns(schema)
        reached = touches(sum(len(places) - 2 for places in edges.values()))
        told = {"codes": touches(len(codes)), "count": touches(len(edges)), "low": reached, "high": reached}
        return {**told, "codes_withheld": NOTHING, "withheld": NOTHING}

    def _per_record_of_cells(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        codes, edges = self._columns(schema)
        return {"codes": touches(len(codes)), "bins": touches(len(edges))}

    @handler("tables", cells=(CODES, COUNT), record=_per_record)
    def tables(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows with each code and (after the last) with none; bounds of the counts up to each edge."""
        codes, edges = self._columns(site.table.schema)
        _, bounds, size = self._shapes(codes, edges)
        found, counts = self._coded(site), np.zeros(size, np.int64)
        low, high = np.zeros(bounds, np.int64), np.zeros(bounds, np.int64)
        for i, (name, places) in enumerate(edges.items()):
            asked = slice(len(places) - 2)
            counts[i], low[i, asked], high[i, asked] = cumulative(site, name, places[1:-1], places[0], places[-1])
            site.progress(len(codes) + i + 1, len(codes) + size)
        return {"codes": found, "count": counts, "low": low, "high": high}

    @handler("cells", record=_per_record_of_cells)
    def cells(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows with each code and (after the last) with none; values in each bin."""
        only_summed(site)
        codes, edges = self._columns(site.table.schema)
        bins = np.zeros((len(edges), self._shapes(codes, edges)[1][1] + 1), np.int64)
        for i, (name, places) in enumerate(edges.items()):
            values = site.table[name]
            place = np.searchsorted(places[1:-1], values[~np.isnan(values)], "left")
            bins[i] = np.bincount(place, minlength=bins.shape[1])
            site.progress(len(codes) + i + 1, len(codes) + len(edges))
        return {"codes": self._coded(site), "bins": bins}

    def _coded(self, site: SiteView) -> NDArray[np.int64]:
        """Rows with each code and, after the last, with none, [coded columns, most codes + 1]."""
        codes, edges = self._columns(site.table.schema)
        found = np.zeros(self._shapes(codes, edges)[0], np.int64)
        for i, (name, length) in enumerate(codes.items()):
            column = site.table.codes(name)
            found[i, :length] = np.bincount(column[column >= 0], minlength=length)
            found[i, length] = len(column) - found[i, :length].sum()
            site.progress(i + 1, len(codes) + len(edges))
        return found


def _as_tables(total: Mapping[str, Array], edges: Sequence[NDArray[np.float64]]) -> dict[str, Array]:
    """Cells as the exact round tells them: with cumulative counts up to *edges*, and nothing withheld."""
    bins, codes = total["bins"].copy(), total["codes"]
    for row, places in zip(bins, edges, strict=True):
        row[len(places) - 1 :] = 0  # there is no such bin
    reached = np.cumsum(bins, axis=1)[:, :-1]
    marks = {"codes_withheld": np.zeros(codes.shape), "withheld": np.zeros(len(bins))}
    return {"codes": codes, "count": bins.sum(axis=1), "low": reached, "high": reached, **marks}
