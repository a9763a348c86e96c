"""Variance-inflation factors: how well the other columns explain each column.

Parties: sites and coordinator. Messages: those of a listwise ``statistics.correlation``. The coordinator learns
what that program tells it: counts, sums, squares and cross-products over the rows that have all columns.
Threat model: as the plan's protection. Dropout: the factors of the survivors' rows. Cost: that program's, two or
three rounds of up to 64 bytes for each pair of columns and site.

VIF = 1/(1 − R²) is the diagonal of the inverse of the correlation matrix (Belsley, Kuh & Welsch 1980, §3.3).
Columns in the span of its eigenvectors of eigenvalue zero (below 1e-10) are exactly collinear: R² = 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from atoll.contract.program import Cohort, ProgramParams, program
from atoll.contract.rounds import Steps
from atoll.contract.wire import Array
from atoll.statistics.correlation import complete_cases

SINGULAR = 1e-10


@program(
    "statistics.vif",
    needs={"sum"},
    offers={"bounded", "resolution", "bounded-weight"},
    calls={"statistics.correlation"},
)
class VIF:
    """Variance-inflation factors of numeric columns, over the rows that have all of them."""

    class Params(ProgramParams):
        """columns: numeric columns (default: all)."""

        columns: tuple[str, ...] = ()

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"vif": {"columns": {name: {"vif", "r_squared"}}, "rows", "notes"}}.

        vif is None where it is infinite (r_squared is then 1) or undefined (a column that does not vary), and of
        all columns where one is withheld; *notes* names those columns.
        """
        found, _, std, matrix = yield from complete_cases(cohort, self.params.columns)
        names, notes = np.array(found["columns"]), list(found["notes"])
        usable = ~np.isnan(matrix.diagonal()) & (std > 0) & ~np.isnan(std).any()
        factors, explained = np.full(len(names), np.nan), np.full(len(names), np.nan)
        inner = matrix[np.ix_(usable, usable)]
        if usable.any() and not np.isnan(inner).any():
            values, vectors = np.linalg.eigh(inner)
            zero = values < SINGULAR
            collinear = (vectors[:, zero] ** 2).sum(axis=1) > SINGULAR
            factor = (vectors[:, ~zero] ** 2 / values[~zero]).sum(axis=1).clip(1)
            factors[usable] = np.where(collinear, np.nan, factor)
            explained[usable] = np.where(collinear, 1.0, 1 - 1 / factor)
            if collinear.any():
                notes.append("infinite, as exactly collinear: " + ", ".join(names[usable][collinear]))
        columns = {
            str(name): {"vif": _told(factor), "r_squared": _told(share)}
            for name, factor, share in zip(names, factors, explained, strict=True)
        }
        rows = found["pairs_count"][0][0] if len(names) else None
        return {"vif": {"columns": columns, "rows": rows, "notes": notes}}


def _told(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


__all__ = ["VIF"]
