"""Updates as weighted monoids: what a site sends is (Σ weight·value, Σ weight).

Adding two updates is adding both parts, so merging is associative and commutative up
to rounding, has a zero, and needs no knowledge of who contributed: the same algebra
serves plain sums, masked sums, hierarchies (sites → city → province) and buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import Field, real
from atoll.contract.wire import Array

WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Update:
    """Weighted sums: ``values[name] = Σ weight·x``; ``weight = Σ weight`` (≥ 0, often rows)."""

    values: dict[str, Array]
    weight: float

    @staticmethod
    def of(values: Mapping[str, Array], weight: float) -> Update:
        """One site's contribution: *values* (unweighted) counted *weight* times."""
        return Update({name: value * weight for name, value in values.items()}, float(weight))

    @staticmethod
    def zero_like(values: Mapping[str, Array]) -> Update:
        """The neutral element for arrays shaped like *values*."""
        return Update({name: np.zeros_like(value) for name, value in values.items()}, 0.0)

    def __add__(self, other: Update) -> Update:
        if set(self.values) != set(other.values):
            raise ProtocolError("update.fields", "updates with different parts cannot be added")
        return Update({n: v + other.values[n] for n, v in self.values.items()}, self.weight + other.weight)

    def mean(self) -> dict[str, Array]:
        """The weighted mean; raises ProtocolError when nothing (weight 0) was summed."""
        if not self.weight > 0:
            raise ProtocolError(
                "update.no-weight", "no site contributed any weight", remedy="check that sites have training rows"
            )
        return {name: value / self.weight for name, value in self.values.items()}

    # -- how an update travels: as the fields of a Sum round

    @staticmethod
    def fields(
        values: Mapping[str, Array], *, value_bound: float, weight_bound: float, step: float
    ) -> dict[str, Field]:
        """Declared fields of a reply carrying an update of arrays shaped like *values*.

        value_bound bounds |x| before weighting, weight_bound one site's weight.
        """
        bound = value_bound * weight_bound
        fields = {name: real(np.shape(value), bound=bound, step=step) for name, value in values.items()}
        return {**fields, WEIGHT: real(bound=weight_bound, step=min(step, 1e-6))}

    def reply(self) -> dict[str, Any]:
        """As a handler's reply."""
        return {**self.values, WEIGHT: self.weight}

    @staticmethod
    def from_sum(total: Mapping[str, Array], names: tuple[str, ...]) -> Update:
        """The arrays *names* of a Sum's result, with the summed weight."""
        return Update({name: total[name] for name in names}, float(total[WEIGHT]))
