"""Rows with weights, of any objective that takes them: gradients, Hessians, base margins and losses are of weighted
rows, as with XGBoost's ``sample_weight``. A row of weight 2 is two rows, and one of weight 0 none.

What counts rows goes on to count rows: the smallest group and ``min_rows`` are not had by weight, and rows of weight 0
are left out of them. A weight is at most the top of its column's range: by that factor grow the bounds that rings are
sized and noise is chosen by, and, where bits are short, what a row is rounded to.

A group of rows does not hide one that outweighs all others in it: a leaf's value is then about that row's own.

Source: Chen & Guestrin 2016, XGBoost (KDD), §2.2 (each row's loss times its weight).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.models.trees import Link
from atoll.trees.objective import ONE, Declared, Each, Fixed, Floats, Ints, Objective, Summed, Sums, known


@dataclass(frozen=True)
class Weighted(Objective):
    """Labels are the inner objective's and, in one more column, the weights. weight: their column. share: what weights
    are rounded to in sums. begun: the inner objective's *begins*, of weighted rows."""

    inner: Objective
    weight: str
    share: Fixed
    begun: Declared

    @staticmethod
    def of(inner: Objective, weight: str, schema: TableSchema) -> Weighted:
        """Raises PlanError for an objective that takes no weights, or a column that cannot hold them."""
        if not inner.weighable:
            raise PlanError("trees.unweighted", "the objective takes no weights", field="weight",
                            remedy="leave weight out, or choose another objective")  # fmt: skip
        feature_bounds(schema, weight)
        low, most = schema.columns[weight].bounds()
        if low < 0 or most <= 0 or weight in inner.beside:
            raise PlanError("plan.bad-column", "weights need a column of their own, with a range from 0 up",
                            field=weight, remedy="mend its range in the schema, or name another column")  # fmt: skip

        def raised(fixed: Fixed) -> Fixed:
            return fixed.times(most, schema)

        begun = {name: replace(sums, fixed=raised(sums.fixed)) for name, sums in inner.begins.items()}
        return Weighted(
            inner.target, raised(inner.gradient), raised(inner.hessian), raised(inner.per_row), inner, weight,
            raised(ONE), begun,
        )  # fmt: skip

    @property
    def link(self) -> Link:  # type: ignore[override]
        """The inner objective's."""
        return self.inner.link

    @property
    def telling(self) -> bool:  # type: ignore[override]
        """The inner objective's."""
        return self.inner.telling

    @property
    def outputs(self) -> int:
        """The inner objective's."""
        return self.inner.outputs

    @property
    def max_step(self) -> float:
        """The inner objective's."""
        return self.inner.max_step

    @property
    def beside(self) -> tuple[str, ...]:
        """The weights, too."""
        return (*self.inner.beside, self.weight)

    @property
    def exposed(self) -> str:
        """The inner objective's."""
        return self.inner.exposed

    def labels(self, table: TableView) -> Floats:
        """See the class, [n, 2 or more]; raises SchemaError for a weight that is missing, negative or above the top."""
        weights = known(table, (self.weight,))[:, 0]
        if not ((weights >= 0) & (weights <= self.share.bound)).all():
            raise SchemaError("schema.bad-weight", "a row's weight is below 0 or above its column's range",
                              field=self.weight, remedy="mend the weights, or the range in the schema")  # fmt: skip
        return np.column_stack([self.inner.labels(table), weights])

    @staticmethod
    def _parts(labels: Floats) -> tuple[Floats, Floats]:
        """(the inner objective's labels, weights)."""
        return labels[:, 0] if labels.shape[1] == 2 else labels[:, :-1], labels[:, -1]

    def counting(self, labels: Floats) -> NDArray[np.bool_]:
        """Rows with a weight."""
        return labels[:, -1] > 0

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """See the port."""
        told, weights = self._parts(labels)
        g, h = self.inner.gradients(margin, told, shared)
        return (
            self.gradient.integers(self.inner.gradient.reals(g) * weights[:, None]),
            self.hessian.integers(self.inner.hessian.reals(h) * weights[:, None]),
        )

    @property
    def begins(self) -> Declared:
        """Rows, their weights, and the inner objective's of weighted rows."""
        return {"counted": Sums(), "weight": Sums((), self.share), **self.begun}

    def begin_each(self, labels: Floats) -> Each:
        """See the port."""
        told, weights = self._parts(labels)
        inner = self.inner.begins
        found: dict[str, tuple[Ints | None, Ints]] = {
            "counted": (None, (weights > 0).astype(np.int64)),
            "weight": (None, self.share.integers(weights)),
        }
        for name, (place, values) in self.inner.begin_each(told).items():
            found[name] = place, self.begun[name].fixed.integers(inner[name].fixed.reals(values) * weights)
        return found

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """The inner objective's, of sums as if the mean weight were 1."""
        weight = self.share.reals(total["weight"])
        mean = max(float(total["counted"]), 0.0) / weight if weight > 0 else 0.0
        scaled = {}
        for name, sums in self.inner.begins.items():
            scaled[name] = self.begun[name].fixed.reals(total[name]) * mean / sums.fixed.unit
        return self.inner.base(scaled, smallest)

    def loss_of(self, margin: Floats, labels: Floats) -> Floats:
        """The inner objective's, of each row as one."""
        return self.inner.loss_of(margin, self._parts(labels)[0])

    @property
    def losses(self) -> Declared:
        """Rows, their weights, and their weighted loss."""
        return {"rows": Sums(), "weight": Sums((), self.share), "loss": Sums((), self.per_row)}

    def loss_sums(self, margin: Floats, labels: Floats) -> Summed:
        """See the port."""
        told, weights = self._parts(labels)
        each = self.inner.per_row.reals(self.inner.per_row.integers(self.inner.loss_of(margin, told)))
        return {
            "rows": len(margin),
            "weight": self.share.integers(weights).sum(),
            "loss": self.per_row.integers(each * weights).sum(),
        }

    def loss(self, total: Mapping[str, Array]) -> float:
        """The weighted mean."""
        weight = float(self.share.reals(total["weight"]))
        return float(self.per_row.reals(total["loss"])) / weight if weight > 0 else math.nan
