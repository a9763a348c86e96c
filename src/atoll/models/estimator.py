"""A stored model as scikit-learn knows models: to predict, in a Pipeline, of a pandas DataFrame.

    from atoll.models import estimator

    model = estimator.load("out/model")
    model.predict(frame)              # classes, or values in the target's unit
    model.predict_proba(frame)        # [num_rows, num_classes]

*frame* has the columns of the table that the model was trained on, as the recipe leaves it: what a recipe does, and
what it fitted (model.json, "fitted"), comes before. ``fit`` learns nothing: a federated model is trained by a run.

Source: Buitinck et al. 2013, API Design for Machine Learning Software: Experiences from the scikit-learn Project.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.models import stored
from atoll.models.importance import importance
from atoll.models.model import Floats, Predictor
from atoll.models.rows import Rows
from atoll.models.trees import Trees


def load(folder: str | Path, models: tuple[str, ...] = ()) -> FederatedClassifier | FederatedRegressor:
    """The stored model, ready to predict. models: networks of other packages that may be imported for it. Raises
    PlanError and PolicyError as :func:`atoll.models.stored.load`."""
    task = stored.load(folder, models)[0].task
    return (FederatedClassifier if task in ("binary", "classes") else FederatedRegressor)(str(folder), models)


def viewed(schema: TableSchema, columns: Mapping[str, Any], num_rows: int) -> Rows:
    """Arrays, or a DataFrame's columns, as a table; raises SchemaError for a column that is not there."""

    def column(name: str) -> NDArray[Any]:
        try:
            return as_column(schema.columns[name], columns[name])
        except KeyError:
            raise SchemaError(
                "schema.no-column", f"there is no column {name!r}", field=name,
                remedy="give the columns that feature_names_in_ lists",
            ) from None  # fmt: skip

    return Rows(schema, num_rows, column)


def as_column(column: Column, values: Any) -> NDArray[Any]:
    """A column's cells as models take them: float64, images uint8, dates datetime64, else objects with None."""
    if column.dtype == "image":
        cells = values if isinstance(values, np.ndarray) and values.dtype != object else list(values)
        return np.asarray(cells, np.uint8).reshape(-1, *(column.shape or ()))
    found = np.asarray(values)
    if column.numeric:
        return found.astype(np.float64)
    if column.dtype in ("date", "datetime"):
        return found.astype("datetime64[D]" if column.dtype == "date" else "datetime64[us]")
    return np.array([cell if isinstance(cell, str) else None for cell in found.tolist()], object)


class _Stored(BaseEstimator):  # type: ignore[misc]
    """What both kinds have. The folder is read when it is first needed, so that copies (``clone``) are cheap."""

    def __init__(self, folder: str, models: tuple[str, ...] = ()) -> None:
        self.folder, self.models = folder, models

    @cached_property
    def _found(self) -> tuple[Predictor, TableSchema]:
        return stored.load(self.folder, self.models)[:2]

    @cached_property
    def feature_names_in_(self) -> NDArray[Any]:
        """The columns that the model reads, in the order in which a plain matrix has them."""
        model, schema = self._found
        used: dict[str, None] = {}

        def note(name: str) -> NDArray[Any]:
            used[name] = None
            column = schema.columns[name]
            return as_column(column, np.empty((0, *(column.shape or ())), object))

        model.predict(Rows(schema, 0, note))
        return np.array(list(used), object)

    @property
    def n_features_in_(self) -> int:
        """How many they are."""
        return len(self.feature_names_in_)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Nothing: the model is as its run has left it."""
        return self

    def _predicted(self, X: Any) -> Floats:
        return self._found[0].predict(self._table(X))

    def _trees(self) -> Trees:
        model = self._found[0]
        if not isinstance(model, Trees):
            raise PlanError("model.not-trees", "only a model of trees tells that", field="model.kind",
                            remedy="train trees: trees.boosted, trees.forest")  # fmt: skip
        return model

    @property
    def feature_importances_(self) -> Floats:
        """Of trees, the share of the training loss that each feature's splits took off, [n_features_in_]; of their
        number, where no gain is known. Other kinds do not have it."""
        if not isinstance(self._found[0], Trees):
            raise AttributeError("feature_importances_ is of trees")
        found = {one["feature"]: one for one in importance(self._trees())}
        by = "gain" if sum(one["gain"] for one in found.values()) > 0 else "splits"
        told = [max(found[name][by], 0.0) if name in found else 0.0 for name in self.feature_names_in_]
        return np.array(told) / (sum(told) or 1.0)

    def shap_values(self, X: Any) -> tuple[Floats, Any]:
        """Of trees, (what each feature adds to a row's margin, [num_rows, n_features_in_]; what is expected of a row of
        which nothing is known). Of classes, [num_rows, num_classes, n_features_in_] and [num_classes]. The margin is
        without an exposure, which adds 0. Raises PlanError for other kinds."""
        from atoll.models.shap import shap_values

        model = self._trees()
        values, expected = shap_values(model, model.inputs(self._table(X)))
        features = (*model.settings.features, model.exposure)
        values = np.pad(values, ((0, 0), (0, 0), (0, 1)))
        places = [features.index(name) for name in self.feature_names_in_]
        if model.task == "classes":
            return values[:, :, places], expected
        return values[:, 0, places], float(expected[0])

    def _table(self, X: Any) -> Rows:
        schema = self._found[1]
        if isinstance(X, Mapping) or hasattr(X, "columns"):
            columns: Mapping[str, Any] = X
            num_rows = len(next(iter(X.values()))) if isinstance(X, Mapping) else len(X)
        else:
            matrix = np.asarray(X)
            if matrix.ndim != 2 or matrix.shape[1] != self.n_features_in_:
                raise ValueError(f"X must be a DataFrame, or a matrix of {self.n_features_in_} columns")
            columns, num_rows = dict(zip(self.feature_names_in_, matrix.T, strict=True)), len(matrix)
        return viewed(schema, columns, num_rows)


class FederatedClassifier(ClassifierMixin, _Stored):  # type: ignore[misc]
    """Of a target with a list of values."""

    @cached_property
    def classes_(self) -> NDArray[Any]:
        """The target's values: 0 and 1, or in the schema's order."""
        model, schema = self._found
        values = schema.columns[model.targets[0]].values or ()
        return np.array([0, 1] if model.task == "binary" else values)

    def predict_proba(self, X: Any) -> Floats:
        """Probabilities, [num_rows, num_classes]."""
        found = self._predicted(X)
        return np.column_stack([1 - found, found]) if found.ndim == 1 else found

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row, [num_rows]."""
        found = self._predicted(X)
        places = (found >= 0.5).astype(int) if found.ndim == 1 else found.argmax(1)
        found_classes: NDArray[Any] = self.classes_[places]
        return found_classes


class FederatedRegressor(RegressorMixin, _Stored):  # type: ignore[misc]
    """Of values and counts."""

    def predict(self, X: Any) -> Floats:
        """Expected values in the target's unit, [num_rows] or [num_rows, num_targets]."""
        return self._predicted(X)
