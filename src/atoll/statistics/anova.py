"""One-way ANOVA: does the mean of a numeric column differ between the groups of a code list?

Parties: sites and coordinator. Messages: those of ``statistics.group_by``. The coordinator learns what that
program tells it: each group's count, sum and squares, small and dominated groups withheld; where one is,
there is no test of the others alone. Threat model: as the plan's protection. Dropout: the test of the survivors'
rows. Cost: one round, or two, of 50 bytes a group and site.

Source: Fisher 1925, Statistical Methods for Research Workers, ch. VII; η² and ω²: Hays 1963.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy

from atoll.contract.program import Cohort, ProgramParams, program
from atoll.contract.rounds import Steps
from atoll.contract.wire import Array
from atoll.statistics.group_by import group_moments
from atoll.statistics.noise import NOISED


@program(
    "statistics.anova",
    needs={"sum"},
    offers={"bounded", "resolution", "bounded-weight"},
    calls={"statistics.group_by"},
)
class Anova:
    """One-way analysis of variance of a numeric column between the groups of a code list."""

    class Params(ProgramParams):
        """column: a numeric column. by: a column with a code list."""

        column: str
        by: str

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"anova": {"column", "by", "groups": [{"key", "count", "mean", "std"}], "f", "p_value",
        "df_between", "df_within", "ss_between", "ss_within", "eta_squared", "omega_squared", "note"}}.

        Groups without a value are left out, and so are rows without a code. Statistics are None where they are
        undefined (fewer than two groups, no spread within any) or need a group that is withheld.
        """
        found = yield from group_moments(cohort, (self.params.by,), (self.params.column,))
        coded = np.array([None not in key for key in found.keys])
        hidden = found.hidden[:, 0] & coded
        used = np.flatnonzero(((found.count[:, 0] > 0) | hidden) & coded)
        n, center, offset = (array[used, 0] for array in (found.count, found.center, found.offset))
        variance = found.variance[used, 0]
        groups = [
            {"key": found.keys[g][0], "count": None, "mean": None, "std": None}
            if hidden[g]
            else {
                "key": found.keys[g][0],
                "count": int(n[i]),
                "mean": float(center[i] + offset[i]),
                "std": math.sqrt(variance[i]) if n[i] > 1 else None,
            }
            for i, g in enumerate(used)
        ]
        tested, note = _nothing(), ""
        if hidden.any():
            note = "groups are withheld, so nothing is tested: merge small groups in the code list"
        elif len(used) < 2 or n.sum() <= len(used):
            note = "too few groups or values for a test"
        else:
            tested = _tested(n.astype(np.float64), center - center[0] + offset, variance)
            note = "" if tested["f"] is not None else "no value differs from its group's mean: F is undefined"
            note = note or ("" if cohort.exact else NOISED)
        told = {"column": self.params.column, "by": self.params.by, "groups": groups, **tested, "note": note}
        return {"anova": told}


def _nothing() -> dict[str, Any]:
    shown = ("f", "p_value", "df_between", "df_within", "ss_between", "ss_within", "eta_squared", "omega_squared")
    return dict.fromkeys(shown)


def _tested(n: Array, mean: Array, variance: Array) -> dict[str, Any]:
    """The test from each group's count, mean (about any common point) and variance, each [num_groups]."""
    rows, k = float(n.sum()), len(n)
    shifted = mean - (n * mean).sum() / rows
    between = float((n * shifted**2).sum() - (n * shifted).sum() ** 2 / rows)
    within = float(((n - 1) * variance).sum())
    total, residual = between + within, within / (rows - k)
    ratio = between / (k - 1) / residual if residual > 0 else None
    return _nothing() | {
        "f": ratio,
        "p_value": None if ratio is None else float(scipy.stats.f.sf(ratio, k - 1, rows - k)),
        "df_between": k - 1,
        "df_within": int(rows) - k,
        "ss_between": between,
        "ss_within": within,
        "eta_squared": between / total if total > 0 else None,
        "omega_squared": (between - (k - 1) * residual) / (total + residual) if total > 0 else None,
    }


__all__ = ["Anova"]
