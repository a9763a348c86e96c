"""Linear models, and what ``statistics.evaluation`` finds of them on sites' held-out rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from atoll.contract.program import Cohort, build
from atoll.data.table import Table
from atoll.models.linear import LinearModel

NAN = float("nan")
X = {"x": {"range": [-10, 10]}}
BINARY = {**X, "y": {"dtype": "integer", "values": [0, 1], "role": "label"}}
REAL = {**X, "y": {"range": [-50, 50], "role": "label"}}
COUNT = {**X, "y": {"dtype": "integer", "range": [0, 60], "role": "label"}}


def model_of(family: Any, table: Table, weights: Any) -> LinearModel:
    return LinearModel.zero(family, table.schema, ("x",), "y").with_weights(np.array(weights, float))


def evaluate(drive: Any, model: LinearModel, holdouts: dict[str, Table], **params: Any) -> dict[str, Any]:
    schema = next(iter(holdouts.values())).schema
    made = build("statistics.evaluation", {"model": model.spec(), **params})
    training = {name: table.rows(np.zeros(len(table), bool)) for name, table in holdouts.items()}
    return drive(
        made.coordinate(Cohort(tuple(holdouts), schema), {"weights": model.weights}), training, holdouts
    ).result


def binary_sites(federation: Any, seed: int, sizes: list[int], ties: bool) -> dict[str, Table]:
    """Sites with their own label rates; the first may hold one class only."""
    random = np.random.default_rng(seed)
    tables = {}
    for i, n in enumerate(sizes):
        x = random.normal(0, 3, n).clip(-10, 10)
        x = np.round(x) if ties else x
        y = (random.random(n) < 1 / (1 + np.exp(-x + i - 1))).astype(float)
        tables[f"s{i}"] = federation.table({"x": x, "y": y if i else np.ones(n)}, BINARY)
    return tables
