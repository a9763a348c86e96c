"""Rows of sites for boosting: numbers, codes and missing cells, and a label of every sort."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from atoll.contract.program import Cohort, build
from atoll.data.table import Table

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [-5, 5]},
    "b": {"range": [0, 1000]},
    "n": {"dtype": "integer", "values": list(range(10))},
    "kind": {"dtype": "text", "values": ["x", "y", "z", "w"]},
    "binary": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "class": {"dtype": "text", "values": ["p", "q", "r"], "role": "label"},
    "count": {"dtype": "integer", "range": [0, 40], "role": "label"},
    "value": {"range": [-80, 80], "role": "label"},
    "time": {"dtype": "integer", "range": [1, 30], "role": "label"},
    "weight": {"range": [0, 4]},
    "years": {"range": [0, 10]},
}
FEATURES = ["a", "b", "n", "kind"]
SIZES = (150, 40, 90)


def rows(seed: int, n: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    a, b = random.normal(0, 1, n).clip(-5, 5), random.uniform(0, 900, n)
    number, kind = random.integers(0, 10, n).astype(float), random.choice(["x", "y", "z", "w"], n).astype(object)
    eta = np.sin(2 * a) + b / 500 + 0.1 * number + np.where(kind == "x", 1.0, 0.0) - np.where(kind == "z", 1.0, 0.0)
    found = {
        "a": np.where(random.random(n) < 0.1, np.nan, a), "b": b, "n": number, "kind": kind,
        "binary": (random.random(n) < 1 / (1 + np.exp(1.5 - eta))).astype(float),
        "class": np.array(["p", "q", "r"], object)[np.digitize(eta + random.normal(0, 0.5, n), [1, 2])],
        "count": random.poisson(np.exp(eta / 2)).clip(0, 40).astype(float),
        "value": (10 * eta + random.normal(0, 2, n)).clip(-80, 80),
        "time": np.ceil(random.exponential(10 / (1 + np.exp(eta)), n)).clip(1, 30),
    }  # fmt: skip
    found["kind"][random.random(n) < 0.05] = None
    found |= {"weight": random.uniform(0, 4, n).round(3), "years": random.uniform(0.2, 10, n)}
    return found


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def tables_of(
    federation: Any, sizes: tuple[int, ...] = SIZES, **schema: Any
) -> tuple[dict[str, Table], dict[str, Table]]:
    """(of three sites, of one that has all their rows)."""
    parts = [rows(seed, n) for seed, n in enumerate(sizes)]
    apart = {f"s{i}": federation.table(part, COLUMNS, **schema) for i, part in enumerate(parts)}
    return apart, {"all": federation.table(pooled(parts), COLUMNS, **schema)}


def params_of(target: str, **more: Any) -> dict[str, Any]:
    basis = {"features": FEATURES, "trees": 4, "max_depth": 3, "max_bins": 16, "binning": "even", "min_rows": 5}
    return {"target": target, **basis, **more}


def steps(params: Mapping[str, Any], tables: Mapping[str, Table], start: Any = None, **cohort: Any) -> Any:
    schema = next(iter(tables.values())).schema
    return build("trees.boosted", params).coordinate(Cohort(tuple(tables), schema, **{"seed": 7, **cohort}), start)


def halves(tables: Mapping[str, Table]) -> tuple[dict[str, Table], dict[str, Table]]:
    odd = {name: np.arange(len(table)) % 3 == 1 for name, table in tables.items()}
    return {n: t.rows(~odd[n]) for n, t in tables.items()}, {n: t.rows(odd[n]) for n, t in tables.items()}
