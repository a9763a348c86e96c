"""Log loss of a target with K classes: p = softmax(F), g_k = p_k − 1{y = k}, h_k = 2 p_k (1 − p_k), as XGBoost has it:
the diagonal of the Hessian, doubled so that a step of every output at once does not overshoot.

Source: Friedman 2001, Greedy Function Approximation, §4.6; Chen & Guestrin 2016, XGBoost (multi:softprob)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.model import missing
from atoll.models.trees import Link
from atoll.trees import objective as port
from atoll.trees.objective import Declared, Each, Fixed, Floats, Ints, Objective, Sums, objective

FAR = 32.0
"""A row's loss is at most this, as if no class had a probability below e⁻³²."""
MOST_CLASSES = 64


class SoftmaxSettings(port.Settings):
    """Nothing to set."""

    kind: Literal["softmax"] = "softmax"


@objective
@dataclass(frozen=True)
class Softmax(Objective):
    """Of a target with a code list, in the schema's order."""

    Settings: ClassVar[type[SoftmaxSettings]] = SoftmaxSettings
    link: ClassVar[Link] = "softmax"

    classes: int

    @staticmethod
    def of(_: SoftmaxSettings, target: str, schema: TableSchema) -> Softmax:
        """Raises PlanError for a target without a list of 2 to MOST_CLASSES values."""
        column = schema.columns.get(target)
        size = len(column.values or ()) if column is not None and column.role != "ignore" else 0
        if not 2 <= size <= MOST_CLASSES:
            raise PlanError("plan.bad-target", "softmax needs a target with a list of values", field=target,
                            remedy=f"declare from 2 to {MOST_CLASSES} values, or choose another objective")  # fmt: skip
        return Softmax(target, Fixed.of(1.0, schema), Fixed.of(0.5, schema), Fixed.of(FAR, schema), size)

    @property
    def outputs(self) -> int:
        """One for each class."""
        return self.classes

    def labels(self, table: TableView) -> Floats:
        """Places in the code list, [n]."""
        places = table.codes(self.target)
        if (places < 0).any():
            raise missing([self.target])
        return places.astype(np.float64)

    def _shares(self, margin: Floats) -> Floats:
        raised = np.exp(margin - margin.max(axis=1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=1, keepdims=True))

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """See the port."""
        p = self._shares(margin)
        hit = labels[:, None] == np.arange(self.classes)
        return self.gradient.integers(p - hit), self.hessian.integers(2 * p * (1 - p))

    @property
    def begins(self) -> Declared:
        """Rows of each class."""
        return {"of_class": Sums((self.classes,))}

    def begin_each(self, labels: Floats) -> Each:
        """See the port."""
        places = labels.astype(np.int64)
        return {"of_class": (places, np.ones_like(places))}

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """Logarithms of the classes' shares, that of half a row where there is none, about their mean."""
        logs = np.log(np.maximum(np.asarray(total["of_class"], np.float64), 0.5))
        return np.asarray(logs - logs.mean())

    def loss_of(self, margin: Floats, labels: Floats) -> Floats:
        """See the port."""
        chosen = self._shares(margin)[np.arange(len(margin)), labels.astype(np.int64)]
        return -np.log(np.maximum(chosen, np.exp(-FAR)))
