"""Negative partial log-likelihood of Cox's proportional hazards model, ties by Breslow, on an agreed grid of times.

Of row i with margin F, duration t and event δ (1: it happened, 0: censored): with d_j events in interval j and
S_j = Σ e^F over the rows still at risk in it,

    r = Σ_{j ≤ j(t)} d_j / S_j,  s = Σ_{j ≤ j(t)} d_j / S_j²,  g = e^F r − δ,  h = e^F r − e^{2F} s.

S_j is a sum over everybody, so before each tree one more Sum tells e^F and events by interval; r and s then go out to
the sites. The target is the duration; the plan names its event column as ``statistics.survival`` does: values [0, 1].
The grid is that program's: one interval for each possible time of integers and code lists (nothing is then rounded),
else *intervals* of equal width over the duration's range; or *edges*. Rows in one interval count as tied, and the
censored ones as at risk in all of it.

The margin counts as within ±*reach*, and a row's e^F r (of mean d/n) as at most MOST: rare, and it bounds what one
row adds. Under noise choose a small *reach*: one row moves S by e^reach.

The model predicts e^F, a risk relative to that of a row with margin 0. That is no duration, so the ordinary evaluation
does not apply (``evaluated``): the mean loss on held-out rows, made with their own sums S_j, is what is told of it.

Learned: by the coordinator, before each tree, the cohort's events and summed relative risks by interval. Every site
learns r and s, from which events by interval follow.

Sources: Cox 1972, Regression Models and Life-Tables; Breslow 1974 (ties); Chen & Guestrin 2016, XGBoost
(survival:cox: the diagonal of the Hessian).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.models.trees import Link
from atoll.trees import objective as port
from atoll.trees.objective import Declared, Each, Fixed, Floats, Ints, Objective, Summed, Sums, binary, known, objective

MOST = 32.0
"""The largest e^F r of a row."""
POSSIBLE = 4096
"""So many possible times get an interval each."""


class CoxSettings(port.Settings):
    """event: a column with values [0, 1], 0 for censored. intervals, edges: see the module. reach: largest |margin|."""

    kind: Literal["cox"] = "cox"
    event: str
    intervals: int | None = Field(default=None, ge=1, le=POSSIBLE)
    edges: tuple[float, ...] = Field(default=(), max_length=POSSIBLE)
    reach: float = Field(default=8.0, gt=0, le=20)


@objective
@dataclass(frozen=True)
class Cox(Objective):
    """ends: of the intervals (…, end], increasing; later durations count as in the last. risk: of e^F."""

    Settings: ClassVar[type[CoxSettings]] = CoxSettings
    link: ClassVar[Link] = "exp"
    evaluated: ClassVar[bool] = False
    weighable: ClassVar[bool] = False  # XGBoost's risk sets leave weights out, and weighted rows would not

    event: str
    ends: tuple[float, ...]
    reach: float
    risk: Fixed

    @staticmethod
    def of(settings: CoxSettings, target: str, schema: TableSchema) -> Cox:
        """Raises PlanError for columns that do not suit."""
        binary(schema, settings.event)
        ends = _ends(settings, target, schema)
        bound = Fixed.of(MOST, schema)
        return Cox(
            target, bound, bound, Fixed.of(settings.reach, schema), settings.event, tuple(ends.tolist()),
            settings.reach, Fixed.of(math.exp(settings.reach), schema),
        )  # fmt: skip

    @property
    def beside(self) -> tuple[str, ...]:
        """Duration and event."""
        return (self.target, self.event)

    def labels(self, table: TableView) -> Floats:
        """(interval, event) of all rows, [n, 2]."""
        found = known(table, (self.target, self.event))
        found[:, 0] = np.minimum(np.searchsorted(self.ends, found[:, 0]), len(self.ends) - 1)
        return found

    def gradients(self, margin: Floats, labels: Floats, shared: Floats) -> tuple[Ints, Ints]:
        """See the port. shared: r of all intervals, then s."""
        place, happened = labels[:, 0].astype(np.int64), labels[:, 1]
        raised, (first, second) = self._raised(margin), shared.reshape(2, -1)
        reached = np.minimum(raised * first[place], MOST)
        curvature = np.maximum(reached - raised**2 * second[place], 0)
        return self.gradient.integers(reached - happened)[:, None], self.hessian.integers(curvature)[:, None]

    def _raised(self, margin: Floats) -> Floats:
        return np.exp(np.clip(margin[:, 0], -self.reach, self.reach))

    @property
    def begins(self) -> Declared:
        """Events."""
        return {"events": Sums()}

    def begin_each(self, labels: Floats) -> Each:
        """See the port."""
        return {"events": (None, labels[:, 1].astype(np.int64))}

    def base(self, total: Mapping[str, Array], smallest: int = 1) -> Floats:
        """0: only differences of margins count."""
        return np.zeros(1)

    @property
    def shares(self) -> Declared:
        """By interval: events, and Σ e^F of the rows that leave in it."""
        size = (len(self.ends),)
        return {"events": Sums(size), "risk": Sums(size, self.risk)}

    @property
    def shared_size(self) -> int:
        """r and s of all intervals."""
        return 2 * len(self.ends)

    def share_sums(self, margin: Floats, labels: Floats) -> Summed:
        """See the port."""
        place, size = labels[:, 0].astype(np.int64), len(self.ends)
        risk = np.zeros(size, np.int64)
        np.add.at(risk, place, self.risk.integers(self._raised(margin)))
        return {"events": np.bincount(place[labels[:, 1] == 1], minlength=size), "risk": risk}

    def _sums(self, total: Mapping[str, Array]) -> tuple[Floats, Floats]:
        """(d, S) of all intervals: never negative, and S never 0."""
        events = np.maximum(np.asarray(total["events"], np.float64), 0)
        at_risk = np.cumsum(np.maximum(self.risk.reals(total["risk"]), 0)[::-1])[::-1]
        return events, np.maximum(at_risk, math.exp(-self.reach))

    def shared(self, total: Mapping[str, Array]) -> Floats:
        """See the port."""
        events, at_risk = self._sums(total)
        return np.concatenate([np.cumsum(events / at_risk), np.cumsum(events / at_risk**2)])

    # -- loss: of the rows at hand, among themselves

    @property
    def losses(self) -> Declared:
        """Rows; Σ F over events; and as *shares*."""
        return {"rows": Sums(), "margins": Sums((), self.per_row), **self.shares}

    def loss_sums(self, margin: Floats, labels: Floats) -> Summed:
        """See the port."""
        happened = margin[labels[:, 1] == 1, 0]
        told = {"rows": len(margin), "margins": self.per_row.integers(happened).sum()}
        return {**told, **self.share_sums(margin, labels)}

    def loss(self, total: Mapping[str, Array]) -> float:
        """Per event; NaN where there was none."""
        events, at_risk = self._sums(total)
        loss = float(events @ np.log(at_risk)) - float(self.per_row.reals(total["margins"]))
        return loss / float(events.sum()) if events.any() else math.nan


def _ends(settings: CoxSettings, target: str, schema: TableSchema) -> NDArray[np.float64]:
    low, high = feature_bounds(schema, target)
    column = schema.columns[target]
    if settings.edges:
        ends = np.array(settings.edges, np.float64)
        if (np.diff(ends) <= 0).any() or ends[0] < low or ends[-1] > high:
            raise PlanError("plan.bad-edges", "edges must increase within the schema's range", field=target,
                            remedy="list times of the duration's column, from early to late")  # fmt: skip
        return np.append(ends, [high] if ends[-1] < high else [])
    if settings.intervals is None and column.values is not None:
        return np.unique(np.array(column.values, np.float64))
    first, last = math.ceil(low), math.floor(high)
    if settings.intervals is None and column.dtype == "integer" and 0 <= last - first < POSSIBLE:
        return np.arange(first, last + 1, dtype=np.float64)
    return np.linspace(low, high, (settings.intervals or 256) + 1)[1:]
