"""Cross-tables of two code lists, and the chi-square test of their independence.

Parties: sites and coordinator. Messages: one round, one Sum. The coordinator learns, of the cohort's
total: for each pair of columns, the rows that have each combination of their codes, a missing one being a
code of its own; under ``plain`` each site's. Small cells and their complement, along rows and columns, are
withheld: a code's rows are told by ``statistics.frequency``, so those where the other code is missing are
part of that line, though not reported. Threat model: as the plan's protection. Dropout: the tables of the
survivors. Cost: one round, 9 bytes a cell.

Tables and tests are of the rows that have both codes. A test needs every cell, so where one is withheld it is
not computed, and the result says so. Codes that nobody has leave the test, as in
``scipy.stats.chi2_contingency`` on the pooled cross-table, to which it is equal. Cramér's V is without bias
correction and without Yates' (Cramér 1946, §21.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import Cells
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.noise import NOISED, NOTHING, smallest

CELLS = Cells("counts", "withheld", lines=(1, 2))


@program("statistics.crosstab", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Crosstab:
    """Cross-tables of pairs of code lists with chi-square test and Cramér's V, by one Sum."""

    class Params(ProgramParams):
        """pairs: (rows, columns), each a column with a code list. yates: correct 2 × 2 tables for continuity."""

        pairs: tuple[tuple[str, str], ...] = Field(min_length=1)
        yates: bool = False

    def __init__(self, params: Params) -> None:
        self.params = params

    def _sizes(self, schema: TableSchema) -> NDArray[np.int64]:
        """Number of codes of each pair, without the missing one, [num_pairs, 2]."""
        listed = {n: len(c.values) for n, c in schema.columns.items() if c.values and c.role != "ignore"}
        if bad := sorted({name for pair in self.params.pairs for name in pair} - set(listed)):
            raise PlanError("plan.bad-column", "crosstab needs columns with a list of values", field=", ".join(bad))
        return np.array([[listed[a], listed[b]] for a, b in self.params.pairs])

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"crosstab": {"tables": [{"rows", "columns", "row_values", "column_values", "counts", "test",
        "note"}]}}; withheld counts are None.

        test: {"statistic", "dof", "p_value", "expected" (of the codes that occur), "cramers_v"}, or None,
        and the note says why.
        """
        sizes = self._sizes(cohort.schema)
        shape = (len(sizes), int(sizes[:, 0].max()) + 1, int(sizes[:, 1].max()) + 1)
        fields = {"counts": count(shape, bound=cohort.schema.max_rows), "withheld": withheld(shape)}
        total = yield Round("tables", Sum(), fields)
        hidden, tables = CELLS.hidden(total, smallest(cohort)), []
        for i, ((rows, columns), (r, c)) in enumerate(zip(self.params.pairs, sizes, strict=True)):
            counts, hides = total["counts"][i, :r, :c], hidden[i, :r, :c]
            test, note = self._test(counts, bool(hides.any()))
            if test is not None and not cohort.exact:
                note = "; ".join(filter(None, (note, NOISED)))
            cells = zip(counts.tolist(), hides.tolist(), strict=True)
            tables.append({
                "rows": rows,
                "columns": columns,
                "row_values": list(cohort.schema.columns[rows].values or ()),
                "column_values": list(cohort.schema.columns[columns].values or ()),
                "counts": [[None if h else n for n, h in zip(*line, strict=True)] for line in cells],
                "test": test,
                "note": note,
            })  # fmt: skip
        return {"crosstab": {"tables": tables}}

    def _test(self, counts: NDArray[np.int64], hides: bool) -> tuple[dict[str, Any] | None, str]:
        if hides:
            return None, "not tested: cells of fewer people than may be told are withheld"
        table = counts[counts.any(axis=1)][:, counts.any(axis=0)]
        if not table.size:
            return None, "not tested: no row has both values"
        found = scipy.stats.chi2_contingency(table, correction=self.params.yates)
        plain = scipy.stats.chi2_contingency(table, correction=False).statistic
        expected, least = np.asarray(found.expected_freq, np.float64), min(table.shape) - 1
        few = int((expected < 5).sum())
        test = {
            "statistic": float(found.statistic),
            "dof": int(found.dof),
            "p_value": float(found.pvalue),
            "expected": expected.tolist(),
            "cramers_v": math.sqrt(plain / (table.sum() * least)) if least else None,
        }
        said = "1 expected count is" if few == 1 else f"{few} expected counts are"
        return test, f"{said} below 5: the p-value is a rough one" if few else ""

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        return {"counts": touches(len(self.params.pairs)), "withheld": NOTHING}

    @handler("tables", cells=CELLS, record=_per_record)
    def tables(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows with each combination of codes and, after the last one, of missing ones, for each pair."""
        sizes = self._sizes(site.table.schema)
        found = np.zeros((len(sizes), sizes[:, 0].max() + 1, sizes[:, 1].max() + 1), np.int64)
        for i, ((rows, columns), (r, c)) in enumerate(zip(self.params.pairs, sizes, strict=True)):
            row, column = site.table.codes(rows), site.table.codes(columns)
            cell = np.where(row < 0, r, row).astype(np.int64) * (c + 1) + np.where(column < 0, c, column)
            found[i, : r + 1, : c + 1] = np.bincount(cell, minlength=(r + 1) * (c + 1)).reshape(r + 1, c + 1)
            site.progress(i + 1, len(sizes))
        return {"counts": found}
