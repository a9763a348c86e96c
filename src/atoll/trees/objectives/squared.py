"""Half the squared error: g = F − y, h = 1. A margin counts as within the target's range, so that |g| is at most the
range's width.

Source: Friedman 2001, Greedy Function Approximation, §4.1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.trees import objective as port
from atoll.trees.objective import ONE, Declared, Each, Fixed, Floats, Ints, Objective, Sums, objective


class SquaredSettings(port.Settings):
    """Nothing to set."""

    kind: Literal["squared"] = "squared"


@objective
@dataclass(frozen=True)
class Squared(Objective):
    """low, high: the target's range."""

    Settings: ClassVar[type[SquaredSettings]] = SquaredSettings
    constant: ClassVar[bool] = True

    low: float
    high: float

    @staticmethod
    def of(_: SquaredSettings, target: str, schema: TableSchema) -> Squared:
        """Of any numeric target."""
        low, high = feature_bounds(schema, target)
        width = high - low
        return Squared(target, Fixed.of(width, schema), ONE, Fixed.of(width**2 / 2, schema), low, high)

    def _errors(self, margin: Floats, labels: Floats) -> Floats:
        return np.clip(margin, self.low, self.high) - labels[:, None]

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """See the port."""
        return self.gradient.integers(self._errors(margin, labels)), np.ones(margin.shape, np.int64)

    @property
    def begins(self) -> Declared:
        """Rows, and Σ(y − low)."""
        return {"rows": Sums(), "above": Sums((), self.gradient)}

    def begin_each(self, labels: Floats) -> Each:
        """See the port."""
        above = self.gradient.integers(labels - self.low)
        return {"rows": (None, np.ones_like(above)), "above": (None, above)}

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """The mean."""
        above = float(self.gradient.reals(total["above"])) / max(float(total["rows"]), 1.0)
        return np.array([min(max(self.low + above, self.low), self.high)])

    def loss_of(self, margin: Floats, labels: Floats) -> Floats:
        """See the port."""
        return self._errors(margin, labels)[:, 0] ** 2 / 2
