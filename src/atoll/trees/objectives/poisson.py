"""Poisson negative log-likelihood of counts (up to log y!): μ = e^F, g = μ − y, h = μ e^δ, where δ = *max_delta_step*
raises the Hessian and limits a leaf's value, as in XGBoost: a step does not overshoot where μ grows fast.

A mean counts as at most the top of the target's range (at least 1), so that |g| is at most that.

Source: Chen & Guestrin 2016, XGBoost (count:poisson)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.models.trees import Link
from atoll.trees import objective as port
from atoll.trees.objective import Declared, Fixed, Floats, Ints, Objective, Summed, Sums, objective

LOWEST = -16.0
"""A margin below it counts as it in the loss: e⁻¹⁶ of a count."""


class PoissonSettings(port.Settings):
    """max_delta_step: see the module."""

    kind: Literal["poisson"] = "poisson"
    max_delta_step: float = Field(default=0.7, gt=0, le=10)


@objective
@dataclass(frozen=True)
class Poisson(Objective):
    """Of a target with a range from 0 up. top: the largest mean. delta: δ."""

    Settings: ClassVar[type[PoissonSettings]] = PoissonSettings
    link: ClassVar[Link] = "exp"

    top: float
    delta: float

    @property
    def max_step(self) -> float:
        """δ."""
        return self.delta

    @staticmethod
    def of(settings: PoissonSettings, target: str, schema: TableSchema) -> Poisson:
        """Raises PlanError for a target that may be negative."""
        low, high = feature_bounds(schema, target)
        if low < 0:
            raise PlanError("plan.bad-target", "poisson needs a target with a range from 0 up", field=target,
                            remedy="mend the range in the schema, or choose another objective")  # fmt: skip
        top, step = max(high, 1.0), settings.max_delta_step
        reach = max(math.log(top), -LOWEST)
        return Poisson(
            target, Fixed.of(top, schema), Fixed.of(top * math.exp(step), schema),
            Fixed.of(top + high * reach, schema), top, step,
        )  # fmt: skip

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """See the port."""
        mean = np.exp(np.minimum(margin, math.log(self.top)))
        return self.gradient.integers(mean - labels[:, None]), self.hessian.integers(mean * math.exp(self.delta))

    @property
    def begins(self) -> Declared:
        """Rows, and Σy."""
        return {"rows": Sums(), "y": Sums((), self.gradient)}

    def begin_sums(self, labels: Floats) -> Summed:
        """See the port."""
        return {"rows": len(labels), "y": self.gradient.integers(labels).sum()}

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """The logarithm of the mean, of half a count where there is none."""
        y = max(float(self.gradient.reals(total["y"])), 0.5)
        return np.array([math.log(min(y / max(float(total["rows"]), 1.0), self.top))])

    def loss_of(self, margin: Floats, labels: Floats) -> Floats:
        """See the port."""
        m = np.clip(margin[:, 0], LOWEST, math.log(self.top))
        return np.exp(m) - labels * m
