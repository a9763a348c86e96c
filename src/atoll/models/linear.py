"""Generalised linear models: linear, logistic and Poisson, with their losses and derivatives.

Features are mapped to [-1, 1] by the *schema's* ranges, which are public, so that every
bound is known before data is read. Weights are [intercept, one per feature] in that
scale; :meth:`LinearModel.coefficients` gives them in the columns' own units.

Source: McCullagh & Nelder 1989, Generalized Linear Models, ch. 2 (canonical links).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array, Json
from atoll.models import model as port
from atoll.models.model import Examples, Family, Floats, ModelTask, model

TASK: dict[Family, ModelTask] = {"linear": "regression", "logistic": "binary", "poisson": "count"}


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


def scaled_features(table: TableView, names: tuple[str, ...], scale: Scale) -> NDArray[np.float32]:
    """Columns in [-1, 1], [num_rows, num_features]; raises SchemaError where cells are missing."""
    columns = np.column_stack([np.asarray(table[name], np.float64) for name in names])
    if gaps := [names[i] for i in np.flatnonzero(np.isnan(columns).any(axis=0))]:
        raise port.missing(gaps)
    found: NDArray[np.float32] = ((columns - scale.middle) / scale.half).astype(np.float32)
    return found


def feature_bounds(schema: TableSchema, name: str) -> tuple[float, float]:
    """[lowest, highest] of a numeric column; raises PlanError if it is absent or has none."""
    if name not in schema.numeric_columns():
        text = f"{name!r} is not a numeric feature or label of the prepared table"
        raise PlanError("plan.bad-column", text, field=name, remedy="check the plan's column names against the schema")
    low, high = schema.columns[name].bounds()
    return (low, high) if high > low else (low - 0.5, low + 0.5)


class LinearSpec(port.Settings):
    """A family, and the columns that it is of."""

    kind: Literal["linear"] = "linear"
    family: Family
    features: tuple[str, ...]


@model
@dataclass(frozen=True, slots=True)
class LinearModel:
    """A fitted or unfitted GLM. weights: [1 + num_features] in scaled units."""

    Spec: ClassVar[type[LinearSpec]] = LinearSpec

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
            raise PlanError(
                "plan.bad-target", f"{family} regression needs a target with {wanted}", field=target,
                remedy="name another target, make one by the recipe (step threshold), or choose another family",
            )  # fmt: skip
        if not features:
            raise PlanError("plan.no-features", "a model needs at least one feature", field="features")
        return LinearModel(family, features, target, Scale.of(schema, features), np.zeros(1 + len(features)))

    @staticmethod
    def of(spec: LinearSpec, schema: TableSchema) -> LinearModel:
        """As :meth:`zero`."""
        if not isinstance(spec.target, str):
            raise PlanError("plan.bad-target", "a linear model has one target", field="target")
        if spec.base is not None:
            raise PlanError("model.base-unfit", "a linear model has no base", field="model.base", remedy="leave it out")
        return LinearModel.zero(spec.family, schema, spec.features, spec.target)

    @property
    def targets(self) -> tuple[str, ...]:
        """The label's column."""
        return (self.target,)

    @property
    def dtype(self) -> np.dtype[np.float64]:
        """Double precision."""
        return np.dtype(np.float64)

    @property
    def layers(self) -> dict[str, slice]:
        """The slopes; and the intercept, which is what a site can have of its own."""
        return {"slopes": slice(1, len(self.weights)), "head": slice(0, 1)}

    @property
    def running(self) -> slice:
        """None."""
        return slice(0, 0)

    @property
    def normalisations(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def task(self) -> ModelTask:
        """What it predicts."""
        return TASK[self.family]

    def initial(self, seed: int) -> Floats:
        """Zero: the loss is convex."""
        return np.zeros_like(self.weights)

    def with_weights(self, weights: Floats) -> Self:
        """The same model with other weights."""
        return replace(self, weights=np.asarray(weights, np.float64))

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

    # -- learning

    def examples(self, table: TableView) -> Examples:
        """The design matrix [num_rows, 1 + num_features] and the labels; raises SchemaError when a cell is missing."""
        parts = list(xy(self, table)) or [(np.empty((0, len(self.weights))), np.empty(0))]
        design, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Examples((design,), y)

    def loss_and_gradient(self, weights: Floats, batch: Examples) -> tuple[float, Floats]:
        """See the port: the gradient is mean of (predicted mean − y) · x."""
        (x,), y = batch.inputs, batch.labels
        eta = x @ weights
        return float(self.loss(eta, y).mean()), x.T @ (self.mean(eta) - y) / len(y)

    def clipped_gradient_sum(self, weights: Floats, batch: Examples, clip_norm_l2: float) -> tuple[Floats, int, float]:
        """See the port. An example's gradient (mean − y) · x has the norm |mean − y| · ‖x‖, so none is ever formed
        (Goodfellow 2015, Efficient Per-Example Gradient Computations)."""
        (x,), y = batch.inputs, batch.labels
        eta = x @ weights
        error = self.mean(eta) - y
        norms = np.abs(error) * np.sqrt(np.einsum("ij,ij->i", x, x))
        known = np.isfinite(norms)  # a row that overflows counts as nothing: a failure would tell of it
        scale = clip_norm_l2 / np.maximum(np.where(known, norms, 0), clip_norm_l2)
        clipped = x.T @ (np.where(known, error, 0) * scale)
        return clipped, int((~known | (norms > clip_norm_l2)).sum()), float(self.loss(eta, y).sum())

    # -- as it travels and is stored

    def spec(self) -> dict[str, Json]:
        """Everything but the weights, as JSON."""
        return {"kind": "linear", "family": self.family, "features": list(self.features), "target": self.target}

    def arrays(self) -> dict[str, Array]:
        """The scaled weights, and the scale."""
        return {"weights": self.weights, "middle": self.scale.middle, "half": self.scale.half}


def xy(model: LinearModel, table: TableView, batch_rows: int = 65_536) -> Iterator[tuple[Floats, Floats]]:
    """Batches (design [n, 1 + k], y [n]); raises SchemaError when a cell is missing."""
    names = (*model.features, model.target)
    for batch in table.batches(names, batch_rows):
        gaps = np.isnan(batch).any(axis=0)
        if gaps.any():
            raise port.missing([name for name, bad in zip(names, gaps, strict=True) if bad])
        yield model.design(batch[:, :-1]), batch[:, -1]


def named(model: port.Predictor) -> dict[str, dict[str, float]]:
    """{"coefficients": {"intercept": …, feature: …}} of a linear model; nothing of another."""
    if not isinstance(model, LinearModel):
        return {}
    intercept, slopes = model.coefficients()
    return {"coefficients": {"intercept": intercept, **dict(zip(model.features, slopes.tolist(), strict=True))}}
