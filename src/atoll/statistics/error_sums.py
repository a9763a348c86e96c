"""Metrics of predicted values from sums of errors, in units of half each target's range about its middle.

So that every sum has a bound: targets lie within one unit of the middle, and predictions farther than *far* count as
that far.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from atoll.contract.rounds import not_taken
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.linear import feature_bounds
from atoll.statistics.scores import error_metrics

Floats = NDArray[np.float64]
FAR = 30.0
"""Predicted values farther than this many half ranges from the target's middle count as that far; under noise, one."""


def allowed(far: float) -> float:
    """One of the two that a plan leads to; another would leave errors without a bound. Raises ProtocolError."""
    if far not in (1.0, FAR):
        raise not_taken("far")
    return far


def most_of(far: float) -> dict[str, float]:
    """How much one row can add to each error sum when predictions are within *far*."""
    return {"absolute": 1 + far, "squared": (1 + far) ** 2, "y": 1.0, "y_squares": 1.0}


def error_sums(schema: TableSchema, targets: tuple[str, ...], y: Floats, p: Floats, far: float) -> dict[str, Floats]:
    """Of each target, [targets]; *y* and *p* are [num_rows] or [num_rows, targets], in the targets' own units."""
    middle, half = np.array([_middle(schema, name) for name in targets]).T
    y, p = (values.reshape(len(values), len(targets)) for values in (y, p))
    y, p = (y - middle) / half, np.clip((p - middle) / half, -far, far)
    error = p - y
    return {
        "absolute": np.abs(error).sum(0), "squared": (error**2).sum(0), "y": y.sum(0), "y_squares": (y**2).sum(0),
    }  # fmt: skip


def metrics_by_target(
    schema: TableSchema, targets: tuple[str, ...], rows: int, sums: Mapping[str, Array]
) -> dict[str, float]:
    """MAE, RMSE and R² of each target, in its own unit; of several, their means first, then "mae speed_15" …"""
    each = [
        error_metrics(rows, **{n: float(v[i]) for n, v in sums.items()}, unit=_middle(schema, name)[1])
        for i, name in enumerate(targets)
    ]
    if len(each) == 1:
        return each[0]
    named = {f"{n} {name}": v for name, found in zip(targets, each, strict=True) for n, v in found.items()}
    return {**{n: float(np.mean([found[n] for found in each])) for n in each[0]}, **named}


def _middle(schema: TableSchema, target: str) -> tuple[float, float]:
    """(middle, half) of the target's range."""
    low, high = feature_bounds(schema, target)
    return (low + high) / 2, (high - low) / 2
