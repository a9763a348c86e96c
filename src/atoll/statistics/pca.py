"""Principal components of numeric columns, from their federated covariance.

Parties: sites and coordinator. Messages: those of a listwise ``statistics.correlation``. The coordinator learns
what that program tells it: counts, sums, squares and cross-products over the rows that have all columns; no
site's rows are ever projected. Threat model: as the plan's protection. Dropout: the components of the survivors'
rows. Cost: that program's, two or three rounds of up to 64 bytes for each pair of columns and site.

Source: Jolliffe 2002, Principal Component Analysis, §2.3 (of the correlation or the covariance matrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from atoll.contract.program import Cohort, ProgramParams, program
from atoll.contract.rounds import Steps
from atoll.contract.wire import Array
from atoll.statistics.correlation import complete_cases


@program(
    "statistics.pca",
    needs={"sum"},
    offers={"bounded", "resolution", "bounded-weight"},
    calls={"statistics.correlation"},
)
class PCA:
    """Principal components: eigenvalues, explained shares and loadings of centred or standardised columns."""

    class Params(ProgramParams):
        """columns: numeric columns (default: all). standardise: in units of each column's standard deviation
        (else the columns are only centred). components: how many (default: all)."""

        columns: tuple[str, ...] = ()
        standardise: bool = True
        components: int | None = Field(default=None, ge=1)

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"pca": {"columns", "rows", "mean", "scale", "eigenvalues", "explained_share", "loadings",
        "notes"}}; a row's scores are loadings @ ((row − mean) / scale).

        Eigenvalues are of the sample covariance (n − 1) of the scaled columns, descending. Loadings have
        the shape [components, columns] and unit length, and their largest entry (the first of equals) is
        positive. Columns that do not vary are left out, and named in *notes*.
        If anything is withheld there are no components.
        """
        found, mean, std, matrix = yield from complete_cases(cohort, self.params.columns)
        withheld = np.isnan(std).any()
        used = np.zeros(len(std), bool) if withheld else std > 0
        scale = std[used] if self.params.standardise else np.ones(int(used.sum()))
        weights = std[used] / scale
        values, vectors = np.linalg.eigh(matrix[np.ix_(used, used)] * np.outer(weights, weights))
        values, loadings = np.maximum(values[::-1], 0), vectors.T[::-1]
        size = np.abs(loadings)
        first = np.argmax(size > size.max(axis=1, keepdims=True) * (1 - 1e-6), axis=1) if used.any() else []
        loadings = loadings * np.sign(loadings[np.arange(len(loadings)), first])[:, None]
        kept = slice(self.params.components)
        told: dict[str, Any] = {
            "columns": np.array(found["columns"])[used].tolist(),
            "rows": found["pairs_count"][0][0] if len(std) else None,
            "mean": mean[used].tolist(),
            "scale": scale.tolist(),
            "eigenvalues": values[kept].tolist(),
            "explained_share": (values / values.sum())[kept].tolist() if used.any() else [],
            "loadings": loadings[kept].tolist(),
            "notes": found["notes"],
        }
        return {"pca": told}


__all__ = ["PCA"]
