"""Poisson negative log-likelihood of counts (up to log y!): μ = e^F, g = μ − y, h = μ e^δ, where δ = *max_delta_step*
raises the Hessian and limits a leaf's value, as in XGBoost: a step does not overshoot where μ grows fast.

A mean counts as at most the top of the target's range (at least 1), so that |g| is at most that.

*exposure* names a column of how long or how many each row was watched: its logarithm is added to the margin (XGBoost's
``base_margin``), so that the trees are of the rate for each unit of it, and the model predicts rate · exposure.

Source: Chen & Guestrin 2016, XGBoost (count:poisson)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.models.trees import Link, exposures
from atoll.trees import objective as port
from atoll.trees.objective import ONE, Declared, Each, Fixed, Floats, Ints, Objective, Sums, known, objective

LOWEST = -16.0
"""A margin below it counts as it in the loss: e⁻¹⁶ of a count."""


class PoissonSettings(port.Settings):
    """max_delta_step, exposure: see the module."""

    kind: Literal["poisson"] = "poisson"
    max_delta_step: float = Field(default=0.7, gt=0, le=10)
    exposure: str = ""


@objective
@dataclass(frozen=True)
class Poisson(Objective):
    """Of a target with a range from 0 up. top: the largest mean. delta: δ. exposure: its column, "" for none.
    watched: what exposures are rounded to in sums."""

    Settings: ClassVar[type[PoissonSettings]] = PoissonSettings
    link: ClassVar[Link] = "exp"

    top: float
    delta: float
    exposure: str = ""
    watched: Fixed = ONE

    @property
    def telling(self) -> bool:  # type: ignore[override]
        """Not of exposures: unlike counts may be of one rate."""
        return not self.exposure

    @property
    def max_step(self) -> float:
        """δ."""
        return self.delta

    @staticmethod
    def of(settings: PoissonSettings, target: str, schema: TableSchema) -> Poisson:
        """Raises PlanError for a target that may be negative, or an exposure that cannot be above 0."""
        low, high = feature_bounds(schema, target)
        if low < 0:
            raise PlanError("plan.bad-target", "poisson needs a target with a range from 0 up", field=target,
                            remedy="mend the range in the schema, or choose another objective")  # fmt: skip
        top, step = max(high, 1.0), settings.max_delta_step
        reach = max(math.log(top), -LOWEST)
        name, watched = settings.exposure, ONE
        if name:
            longest = feature_bounds(schema, name)[1]
            if longest <= 0 or name == target:
                raise PlanError("plan.bad-column", "an exposure needs a column of its own, of numbers above 0",
                                field=name, remedy="mend its range in the schema, or name another")  # fmt: skip
            watched = Fixed.of(longest, schema)
        return Poisson(
            target, Fixed.of(top, schema), Fixed.of(top * math.exp(step), schema),
            Fixed.of(top + high * reach, schema), top, step, name, watched,
        )  # fmt: skip

    @property
    def beside(self) -> tuple[str, ...]:
        """The exposure, too."""
        return (self.target, self.exposure) if self.exposure else (self.target,)

    @property
    def exposed(self) -> str:
        """The exposure."""
        return self.exposure

    def labels(self, table: TableView) -> Floats:
        """Counts, [n]; with an exposure [n, 2], the second its own. Raises SchemaError where one is missing, or an
        exposure is not above 0."""
        counts = known(table, (self.target,))[:, 0]
        return np.column_stack([counts, exposures(table, self.exposure)]) if self.exposure else counts

    @staticmethod
    def _counts(margin: Floats, labels: Floats) -> tuple[Floats, Floats]:
        """(margins with their offsets [n], counts [n])."""
        if labels.ndim == 1:
            return margin[:, 0], labels
        return margin[:, 0] + np.log(labels[:, 1]), labels[:, 0]

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """See the port."""
        m, counts = self._counts(margin, labels)
        mean = np.exp(np.minimum(m, math.log(self.top)))[:, None]
        return self.gradient.integers(mean - counts[:, None]), self.hessian.integers(mean * math.exp(self.delta))

    @property
    def begins(self) -> Declared:
        """Rows, or their exposures; and Σy."""
        return {"watched": Sums((), self.watched), "y": Sums((), self.gradient)}

    def begin_each(self, labels: Floats) -> Each:
        """See the port."""
        y = self.gradient.integers(labels if labels.ndim == 1 else labels[:, 0])
        watched = np.ones_like(y) if labels.ndim == 1 else self.watched.integers(labels[:, 1])
        return {"watched": (None, watched), "y": (None, y)}

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """The logarithm of the mean, or rate, of half a count where there is none."""
        y = max(float(self.gradient.reals(total["y"])), 0.5)
        watched = float(self.watched.reals(total["watched"]))
        if self.exposure:
            return np.array([math.log(y / max(watched, self.watched.unit))])
        return np.array([math.log(min(y / max(watched, 1.0), self.top))])

    def loss_of(self, margin: Floats, labels: Floats) -> Floats:
        """See the port."""
        m, counts = self._counts(margin, labels)
        m = np.clip(m, LOWEST, math.log(self.top))
        return np.exp(m) - counts * m
