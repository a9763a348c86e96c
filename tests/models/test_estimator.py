"""scikit-learn's interface to a model of trees: importances and SHAP values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from atoll.contract.errors import PlanError
from atoll.models import estimator, shap, stored
from atoll.models.model import make

from .random_trees import (
    FEATURES,
    SCHEMA,
    drawn,
    kept,
    rows,
)


@pytest.mark.parametrize("link", ["identity", "logistic", "softmax"])
def test_the_estimator_tells_importances_and_shap_values(link: str, tmp_path: Path) -> None:
    model = drawn(link, 5, 3, 2)
    table = rows(40, 2, model)
    loaded: Any = estimator.load(kept(model, tmp_path))
    data = pd.DataFrame({name: list(table[name]) for name in reversed(FEATURES)})
    assert set(loaded.feature_names_in_) == set(FEATURES)
    assert len(loaded.feature_importances_) == loaded.n_features_in_
    assert loaded.feature_importances_.sum() == pytest.approx(1)
    gains = dict.fromkeys(loaded.feature_names_in_.tolist(), 0.0)
    for tree in model.words:
        for node in tree[tree[:, 0] >= 0]:
            gains[FEATURES[int(node[0])]] += node[3]
    assert np.argmax(loaded.feature_importances_) == np.argmax(list(gains.values()))
    values, expected = loaded.shap_values(data)
    order = [FEATURES.index(name) for name in loaded.feature_names_in_]
    wanted, base = shap.shap_values(model, model.inputs(table))
    assert np.array_equal(values, wanted[:, 0][:, order] if link != "softmax" else wanted[:, :, order])
    assert np.array_equal(expected, base[0] if link != "softmax" else base)
    assert values.sum(axis=-1) + expected == pytest.approx(
        model.margins(model.inputs(table))[:, 0] if link != "softmax" else model.margins(model.inputs(table))
    )


def test_other_kinds_have_neither(tmp_path: Path) -> None:
    linear = make({"kind": "linear", "family": "linear", "features": ["a"], "target": "value"}, SCHEMA)
    told = {"spec": linear.spec(), "layers": ["weights"]}
    stored.save(tmp_path, {"model": told, "schema": SCHEMA.model_dump(mode="json")}, linear.arrays())
    loaded: Any = estimator.load(tmp_path)
    assert not hasattr(loaded, "feature_importances_")
    with pytest.raises(PlanError) as caught:
        loaded.shap_values({"a": [1.0]})
    assert caught.value.code == "model.not-trees"
