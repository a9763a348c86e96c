"""Pinball loss of the α-quantile: ρ(y − F) = max(α (y − F), (α − 1)(y − F)).

Its gradient says only on which side a row lies (g = 1 − α where F ≥ y, else −α; h = 1, as in XGBoost), which finds the
splits; a leaf's value is then made anew: the α-quantile of its rows' residuals y − F. That is one more Sum for each
tree, of histograms of residuals by leaf.

The histograms' cells are signed and geometric: OCTAVES octaves below the width of the target's range, PARTS cells
each, and one around 0; residuals within a cell count as spread evenly. So a leaf's value is within a factor of 2^(1/8)
of the exact one (or 2⁻¹⁶ of the range), and as every tree begins from what is left, those errors do not add up.

Learned: by the coordinator, the cohort's histogram of residuals in every leaf. Neither the base margin nor a leaf
is given a value among the ``smallest`` − 1 least or greatest of its rows, and none of fewer than ``smallest`` rows.

Sources: Koenker & Bassett 1978, Regression Quantiles; Friedman 2001, Greedy Function Approximation, §4.3 (leaves of
absolute loss are medians of residuals).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.trees import objective as port
from atoll.trees.objective import ONE, Declared, Each, Fixed, Floats, Ints, Objective, Summed, Sums, objective

OCTAVES, PARTS = 16, 8
_MAGNITUDES = 2.0 ** (np.arange(-OCTAVES * PARTS, 1) / PARTS)
EDGES = np.concatenate([-_MAGNITUDES[::-1], _MAGNITUDES])
"""Of the cells, in units of the range's width; residuals cannot lie beyond the outermost."""
CELLS = len(EDGES) - 1


class QuantileSettings(port.Settings):
    """alpha: which quantile."""

    kind: Literal["quantile"] = "quantile"
    alpha: float = Field(default=0.5, gt=0, lt=1)


@objective
@dataclass(frozen=True)
class Quantile(Objective):
    """low, high: the target's range."""

    Settings: ClassVar[type[QuantileSettings]] = QuantileSettings
    constant: ClassVar[bool] = True
    telling: ClassVar[bool] = False
    weighable: ClassVar[bool] = False  # sums of weights do not say whether a quantile tells of few rows

    alpha: float
    low: float
    high: float

    @staticmethod
    def of(settings: QuantileSettings, target: str, schema: TableSchema) -> Quantile:
        """Of any numeric target."""
        low, high = feature_bounds(schema, target)
        return Quantile(
            target, Fixed.of(1.0, schema), ONE, Fixed.of(high - low, schema), settings.alpha, low, high
        )  # fmt: skip

    def _residuals(self, margin: Floats, labels: Floats) -> Floats:
        return labels[:, None] - np.clip(margin, self.low, self.high)

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """See the port."""
        sides = np.where(margin >= labels[:, None], 1 - self.alpha, -self.alpha)
        return self.gradient.integers(sides), np.ones(margin.shape, np.int64)

    def _cells(self, residuals: Floats) -> NDArray[np.int64]:
        return np.searchsorted(EDGES[1:-1], residuals / (self.high - self.low))

    def _quantile(self, cells: Array, smallest: int) -> float:
        """Of one histogram, [CELLS], evenly spread within its cells; 0 of one of fewer rows than *smallest*."""
        reached = np.maximum.accumulate(np.cumsum(np.maximum(np.asarray(cells, np.float64), 0)))
        rows = float(reached[-1])
        edge = min(smallest - 1, rows / 2)
        rank = min(max(self.alpha * rows, edge), rows - edge)
        if rows < max(smallest, 1):
            return 0.0
        return float(np.interp(rank, np.append(0.0, reached), EDGES)) * (self.high - self.low)

    @property
    def begins(self) -> Declared:
        """Histogram of the target above the bottom of its range."""
        return {"above": Sums((CELLS,))}

    def begin_each(self, labels: Floats) -> Each:
        """See the port."""
        cells = self._cells(labels - self.low)
        return {"above": (cells, np.ones_like(cells))}

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """The target's α-quantile, as near as the cells tell; the bottom of its range where too few rows do."""
        return np.array([min(max(self.low + self._quantile(total["above"], smallest), self.low), self.high)])

    def loss_of(self, margin: Floats, labels: Floats) -> Floats:
        """See the port."""
        left = self._residuals(margin, labels)[:, 0]
        return np.maximum(self.alpha * left, (self.alpha - 1) * left)

    def renews(self, leaves: int) -> Declared:
        """Histograms of residuals."""
        return {"residuals": Sums((1, leaves, CELLS))}

    def renew_sums(self, margin: Floats, labels: Floats, leaf: NDArray[np.int32], leaves: int) -> Summed:
        """See the port."""
        here = leaf[:, 0] >= 0
        places = leaf[here, 0].astype(np.int64) * CELLS + self._cells(self._residuals(margin, labels)[here, 0])
        return {"residuals": np.bincount(places, minlength=leaves * CELLS).reshape(1, leaves, CELLS)}

    def renewed(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """See the port."""
        return np.array([[self._quantile(cells, smallest) for cells in total["residuals"][0]]])
