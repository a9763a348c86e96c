"""Log loss of a binary target: p = 1 / (1 + e^−F), g = p − y, h = p (1 − p).

Source: Friedman, Hastie & Tibshirani 2000, Additive Logistic Regression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.trees import Link
from atoll.trees import objective as port
from atoll.trees.objective import Declared, Each, Fixed, Floats, Ints, Objective, Sums, binary, objective

FAR = 32.0
"""A margin farther from 0 counts as that far in the loss, as does a base margin that all labels being alike gives."""


class LogisticSettings(port.Settings):
    """Nothing to set."""

    kind: Literal["logistic"] = "logistic"


@objective
@dataclass(frozen=True)
class Logistic(Objective):
    """Of a target with values 0 and 1."""

    Settings: ClassVar[type[LogisticSettings]] = LogisticSettings
    link: ClassVar[Link] = "logistic"

    @staticmethod
    def of(_: LogisticSettings, target: str, schema: TableSchema) -> Logistic:
        """Raises PlanError for another target."""
        binary(schema, target)
        return Logistic(target, Fixed.of(1.0, schema), Fixed.of(0.25, schema), Fixed.of(FAR + 1, schema))

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """See the port."""
        p = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
        return self.gradient.integers(p - labels[:, None]), self.hessian.integers(p * (1 - p))

    @property
    def begins(self) -> Declared:
        """Rows, and those labelled 1."""
        return {"rows": Sums(), "ones": Sums()}

    def begin_each(self, labels: Floats) -> Each:
        """See the port."""
        ones = labels.astype(np.int64)
        return {"rows": (None, np.ones_like(ones)), "ones": (None, ones)}

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """Log odds of the mean, that of half a row where there is none of a label."""
        rows = max(float(total["rows"]), 1.0)
        ones = min(max(float(total["ones"]), 0.5), rows - 0.5)
        return np.array([math.log(ones / (rows - ones))])

    def loss_of(self, margin: Floats, labels: Floats) -> Floats:
        """See the port."""
        m = np.clip(margin[:, 0], -FAR, FAR)
        return np.logaddexp(0, m) - labels * m
