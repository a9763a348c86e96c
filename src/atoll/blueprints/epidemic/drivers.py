"""What moves a region's forecasts: Σ |Shapley value| of each feature over the rows of a day.

Trees: exact values by :mod:`atoll.models.shap`. Linear models: w_j · (x_j − mean of x_j over the *background* rows), on
the link's scale, which is the Shapley value of a linear model whose features are taken as independent (Lundberg & Lee
2017, A Unified Approach to Interpreting Model Predictions, Corollary 1). Other kinds have none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.models.linear import LinearModel
from atoll.models.model import Predictor
from atoll.models.rows import Rows
from atoll.models.trees import Trees

Floats = NDArray[np.float64]
MOST = 1e9
"""A feature's sum over a region's rows counts as no more."""


def importances(model: Predictor, rows: Rows, background: Rows) -> Floats | None:
    """Σ over *rows* of each feature's |Shapley value|, [num_features]; None for kinds without them."""
    if isinstance(model, Trees):
        from atoll.models.shap import shap_values

        values, _ = shap_values(model, model.inputs(rows))
        total = np.abs(values).sum(axis=(0, 1))
    elif isinstance(model, LinearModel):
        x, before = (np.column_stack([part[name] for name in model.features]) for part in (rows, background))
        known = ~np.isnan(before)
        mean = np.where(known, before, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        gaps = np.where(np.isnan(x), 0.0, np.abs(x - mean))
        total = (gaps / model.scale.half * np.abs(model.weights[1:])).sum(axis=0)
    else:
        return None
    return np.asarray(np.minimum(total, MOST))
