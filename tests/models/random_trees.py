"""Models of random trees, rows at their thresholds, and XGBoost beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import stored, tree_kernels
from atoll.models.trees import UNUSED, Trees, TreesSpec

xgboost = pytest.importorskip("xgboost")

SCHEMA = TableSchema(
    name="test",
    columns={
        "a": Column(range=(-5, 5)),
        "b": Column(range=(0, 1e6)),
        "size": Column(dtype="text", values=("small", "large", "Huge")),
        "grade": Column(dtype="integer", values=(7, 3, 11, 5)),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
        "value": Column(range=(-1000, 1000), role="label"),
        "cases": Column(dtype="integer", range=(0, 500), role="label"),
        "kind": Column(dtype="text", values=("x", "y", "z"), role="label"),
    },
)
FEATURES = ["a", "size", "b", "grade"]
TARGETS = {"identity": "value", "logistic": "y", "softmax": "kind", "exp": "cases", "probability": "y"}
OUTPUTS = {"softmax": 3}
OF_LINK = {
    "identity": ["squared", "quantile"], "logistic": ["logistic"], "softmax": ["softmax"], "exp": ["poisson", "cox"],
    "probability": ["squared"],
}  # fmt: skip


def unfitted(link: str, num_trees: int, max_depth: int, features: list[str] = FEATURES) -> Trees:
    categorical = [name for name in features if name in ("size", "grade")]
    spec = {"kind": "trees", "features": features, "categorical": categorical, "target": TARGETS[link], "link": link,
            "num_trees": num_trees, "max_depth": max_depth}  # fmt: skip
    return Trees.of(TreesSpec.model_validate(spec), SCHEMA)


def drawn(link: str, num_trees: int, max_depth: int, seed: int, features: list[str] = FEATURES) -> Trees:
    """A model of random trees, some of them lopsided, some not in use."""
    model, random = unfitted(link, num_trees, max_depth, features), np.random.default_rng(seed)
    words, inner = np.array(model.words), model.settings.num_nodes // 2
    ranges = {"a": (-5, 5), "b": (0, 1e6)}
    for tree in words:
        if random.random() < 0.1:
            continue
        tree[:, 0] = UNUSED
        tree[0, 0] = -1
        for at in range(len(tree)):
            if tree[at, 0] == UNUSED:
                continue
            cover = random.uniform(1, 1000) if at == 0 else tree[at, 4]
            if at < inner and random.random() < 0.8:
                place = int(random.integers(len(features)))
                name = features[place]
                codes = len(SCHEMA.columns[name].values or ())
                split = float(random.integers(1, 2**codes)) if codes else np.float32(random.uniform(*ranges[name]))
                tree[at] = place, split, random.integers(2), random.exponential(), cover
                share = random.uniform(0.05, 0.95)
                tree[2 * at + 1, [0, 4]] = -1, cover * share
                tree[2 * at + 2, [0, 4]] = -1, cover * (1 - share)
            else:
                tree[at] = -1, np.float32(random.normal() * 0.3), 0, 0, cover
    base = random.normal(0, 2, model.outputs)
    return model.with_weights(np.concatenate([base, words.ravel()]))


def rows(n: int, seed: int, model: Trees | None = None) -> Table:
    """Rows with missing cells; many of them at a threshold of *model*, just below it, or rounded to it in float32."""
    random = np.random.default_rng(seed)
    found: dict[str, Any] = {
        "a": random.uniform(-5, 5, n),
        "b": random.uniform(0, 1e6, n),
        "size": random.choice(np.array(["small", "large", "Huge", None], object), n),
        "grade": random.choice([7.0, 3, 11, 5, np.nan], n),
    }
    for name in ("a", "b"):
        if model is not None and name in model.settings.features:
            at = model.nodes.feature == model.settings.features.index(name)
            cuts = model.nodes.threshold[at].astype(np.float64)
            if len(cuts):
                near = random.choice(cuts, n)
                below = np.nextafter(near.astype(np.float32), np.float32(-np.inf)).astype(np.float64)
                how = random.integers(0, 5, n)
                found[name] = np.select(
                    [how == 0, how == 1, how == 2, how == 3],
                    [near, below, near - abs(near) * 1e-9, near + abs(near) * 1e-9],
                    found[name],
                )
        found[name][random.random(n) < 0.1] = np.nan
    return Table(SCHEMA, found)


def frame(table: Table, features: list[str], *, shuffled: bool = False) -> pd.DataFrame:
    """The table as XGBoost takes one; shuffled: its categories in another order than the schema's."""
    columns: dict[str, Any] = {}
    for name in features:
        values = SCHEMA.columns[name].values
        if values is None:
            columns[name] = table[name]
            continue
        codes = table.codes(name)
        known = pd.Categorical.from_codes(codes, categories=list(values))
        columns[name] = known.reorder_categories(sorted(values)) if shuffled else known
    return pd.DataFrame(columns)


def booster(content: bytes, folder: Path) -> Any:
    path = folder / "model.json"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = xgboost.Booster(params={"nthread": 1})
        made.load_model(path)
    return made


def matrix(table: Table, features: list[str], **more: Any) -> Any:
    return xgboost.DMatrix(frame(table, features, **more), enable_categorical=True, nthread=1)


def size(model: Trees) -> float:
    """How large the numbers are that float32 adds."""
    return float(1 + np.abs(model.base).max() + np.abs(model.nodes.value).max(axis=1).sum())


def assert_alike(model: Trees, found: Any, table: Table) -> None:
    """Every row comes to the same leaf, and what is predicted differs by float32's rounding."""
    features = list(model.settings.features)
    inputs = model.inputs(table)
    ours = tree_kernels.leaf_of(inputs, *model.nodes[:4])
    for shuffled in (False, True):
        data = matrix(table, features, shuffled=shuffled)
        theirs = found.predict(data, pred_leaf=True, strict_shape=True).reshape(len(table), -1)
        for t, tree in enumerate(model.words):
            number = np.cumsum(tree[:, 0] != UNUSED) - 1
            assert (number[ours[:, t]] == theirs[:, t]).all()
    margins = found.predict(data, output_margin=True).reshape(len(table), -1)
    assert np.abs(margins - model.margins(inputs)).max() <= 1e-6 * size(model)
    told = found.predict(data)
    told = np.clip(told, 0, 1) if model.settings.link == "probability" else told
    assert told == pytest.approx(model.predict(table), rel=2e-6 * size(model), abs=1e-6 * size(model))


def kept(model: Trees, folder: Path, **more: Any) -> Path:
    told = {"spec": model.spec(), "layers": ["weights"], **more}
    stored.save(folder, {"model": told, "schema": SCHEMA.model_dump(mode="json")}, model.arrays())
    return folder
