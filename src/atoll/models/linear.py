"""Generalised linear models: linear, logistic and Poisson, with their losses and derivatives.

Features are mapped to [-1, 1] by the *schema's* ranges, which are public, so that every
bound is known before data is read. Weights are [intercept, one per feature] in that
scale; :meth:`LinearModel.coefficients` gives them in the columns' own units.

Source: McCullagh & Nelder 1989, Generalized Linear Models, ch. 2 (canonical links).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema

Floats = NDArray[np.float64]
Family = Literal["linear", "logistic", "poisson"]
TASK = {"linear": "regression", "logistic": "binary", "poisson": "count"}


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps each feature from its schema range to [-1, 1]: x' = (x - middle) / half."""

    middle: Floats
    half: Floats

    @staticmethod
    def of(schema: TableSchema, features: tuple[str, ...]) -> Scale:
        """From the ranges of *features*; raises PlanError for absent or non-numeric ones."""
        low, high = np.array([feature_bounds(schema, name) for name in features], float).reshape(-1, 2).T
        return Scale((low + high) / 2, (high - low) / 2)


def feature_bounds(schema: TableSchema, name: str) -> tuple[float, float]:
    """[lowest, highest] of a numeric column; raises PlanError if it is absent or has none."""
    if name not in schema.numeric_columns():
        text = f"{name!r} is not a numeric feature or label of the prepared table"
        raise PlanError("plan.bad-column", text, field=name, remedy="check the plan's column names against the schema")
    low, high = schema.columns[name].bounds()
    return (low, high) if high > low else (low - 0.5, low + 0.5)


@dataclass(frozen=True, slots=True)
class LinearModel:
    """A fitted or unfitted GLM. weights: [1 + num_features] in scaled units."""

    family: Family
    features: tuple[str, ...]
    target: str
    scale: Scale
    weights: Floats

    @staticmethod
    def zero(family: Family, schema: TableSchema, features: tuple[str, ...], target: str) -> LinearModel:
        """All weights zero; raises PlanError when a column is absent or the target does not suit the family."""
        low, high = feature_bounds(schema, target)
        if (family == "logistic" and (low, high) != (0, 1)) or (family == "poisson" and low < 0):
            wanted = "values [0, 1]" if family == "logistic" else "a range from 0 up"
            raise PlanError("plan.bad-target", f"{family} regression needs a target with {wanted}", field=target)
        if not features:
            raise PlanError("plan.no-features", "a model needs at least one feature", field="features")
        return LinearModel(family, features, target, Scale.of(schema, features), np.zeros(1 + len(features)))

    def with_weights(self, weights: Floats) -> LinearModel:
        """The same model with other weights."""
        return LinearModel(self.family, self.features, self.target, self.scale, np.asarray(weights, np.float64))

    def design(self, batch: Floats) -> Floats:
        """Raw features [n, k] → [n, 1 + k], scaled, with a leading column of ones."""
        return np.column_stack([np.ones(len(batch)), (batch - self.scale.middle) / self.scale.half])

    def mean(self, eta: Floats) -> Floats:
        """Inverse canonical link of the linear predictor."""
        if self.family == "logistic":
            return 1 / (1 + np.exp(-np.clip(eta, -500, 500)))
        return np.exp(np.minimum(eta, 500)) if self.family == "poisson" else eta

    def loss(self, eta: Floats, y: Floats) -> Floats:
        """Per row: half squared error, log loss, or Poisson negative log-likelihood up to log(y!)."""
        if self.family == "logistic":
            return np.logaddexp(0, eta) - y * eta
        return np.exp(np.minimum(eta, 500)) - y * eta if self.family == "poisson" else (y - eta) ** 2 / 2

    def curvature(self, mean: Floats) -> Floats:
        """Second derivative of the loss by eta, from the mean."""
        if self.family == "logistic":
            return mean * (1 - mean)
        return mean if self.family == "poisson" else np.ones_like(mean)

    def predict(self, table: TableView) -> Floats:
        """Predicted mean of every row: probability, count or value, [num_rows]."""
        parts = [self.mean(self.design(batch) @ self.weights) for batch in table.batches(self.features)]
        return np.concatenate(parts) if parts else np.empty(0)

    def coefficients(self) -> tuple[float, Floats]:
        """(intercept, slopes [num_features]) in the columns' own units."""
        values = self.to_raw() @ self.weights
        return float(values[0]), values[1:]

    def to_raw(self) -> Floats:
        """The matrix T with raw coefficients = T @ weights; covariances go T C Tᵀ."""
        size = 1 + len(self.features)
        matrix = np.zeros((size, size))
        matrix[0, 0] = 1
        matrix[0, 1:] = -self.scale.middle / self.scale.half
        matrix[np.arange(1, size), np.arange(1, size)] = 1 / self.scale.half
        return matrix

    # -- as it travels and is stored

    def spec(self) -> dict[str, Any]:
        """Everything but the weights, as JSON."""
        return {"kind": "linear", "family": self.family, "features": list(self.features), "target": self.target}

    @staticmethod
    def from_spec(spec: Mapping[str, Any], schema: TableSchema, arrays: Mapping[str, NDArray[Any]]) -> LinearModel:
        """Inverse of :meth:`spec` with its weights; raises PlanError when they do not fit the schema."""
        made = LinearModel.zero(spec["family"], schema, tuple(spec["features"]), str(spec["target"]))
        if "weights" not in arrays or arrays["weights"].shape != made.weights.shape:
            raise PlanError("model.shape", "the weights do not fit the model", field="weights")
        return made.with_weights(arrays["weights"])


def xy(model: LinearModel, table: TableView, batch_rows: int = 65_536) -> Any:
    """Batches (design [n, 1 + k], y [n]); raises SchemaError when a cell is missing."""
    for batch in table.batches((*model.features, model.target), batch_rows):
        if np.isnan(batch).any():
            names = (*model.features, model.target)
            gaps = [name for name, bad in zip(names, np.isnan(batch).any(axis=0), strict=True) if bad]
            raise SchemaError(
                "schema.missing",
                "a model's columns have missing cells",
                field=", ".join(gaps),
                remedy="impute them in the recipe, or leave them out",
            )
        yield model.design(batch[:, :-1]), batch[:, -1]
