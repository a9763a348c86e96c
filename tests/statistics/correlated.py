"""Columns that depend on each other, and their correlations by the program and by the pooled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from atoll.contract.disclosure import Rule
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "wide": {"range": [-1e6, 1e6]},
    "percent": {"range": [0, 100]},
    "count": {"dtype": "integer", "range": [0, 50]},
    "code": {"dtype": "integer", "values": [1, 2, 5]},
    "tight": {"range": [999_999, 1_000_001]},
    "loose": {"range": [0, 1e7]},
    "zeros": {"range": [0, 1000]},
    "big": {"dtype": "integer", "range": [0, 1_000_000]},
    "single": {"range": [0, 10]},
    "empty": {"range": [0, 1]},
    "text": {"dtype": "text"},
}
VARYING = ["wide", "percent", "count", "code", "tight", "loose", "zeros", "big"]
NUMBERS = [*VARYING, "single", "empty"]


def site(federation: Any, random: np.random.Generator, n: int, shift: float = 0.5, holes: float = 0.1) -> Any:
    u = random.normal(size=n) + shift
    data = {
        "wide": np.clip(u * 100 + random.standard_cauchy(n) * 20, -1e6, 1e6),
        "percent": np.clip(40 + 20 * u + random.normal(0, 10, n), 0, 100),
        "count": np.clip(np.round(8 - 4 * u + random.normal(0, 1, n)), 0, 50),
        "code": random.choice([1.0, 2.0, 5.0], n),
        "tight": 1e6 + 1e-3 * u + random.normal(0, 1e-3, n),
        "loose": 1e6 + random.normal(0, 1e-3, n),
        "zeros": np.maximum(30 * u, 0),
        "big": np.round(np.clip(3000 + 900 * u + random.normal(0, 400, n), 0, 1e6)),
        "single": np.full(n, 3.7),
        "empty": np.full(n, NAN),
    }
    for name in VARYING:
        data[name][random.random(n) < holes] = NAN
    return federation.table({**data, "text": [None] * n}, COLUMNS)


def correlation(drive: Any, tables: dict[str, Any], rule: Rule | None = None, **params: Any) -> dict[str, Any]:
    rule = rule or Rule()
    cohort = Cohort(tuple(tables), next(iter(tables.values())).schema, 0, rule.min_group_size)
    return drive(build("statistics.correlation", params).coordinate(cohort), tables, rule=rule).result["correlation"]


def pooled(tables: dict[str, Any], names: list[str], missing: str) -> pd.DataFrame:
    whole = concatenate(list(tables.values()))
    frame = pd.DataFrame({name: whole[name] for name in names})
    return frame.dropna() if missing == "listwise" else frame


def wanted(frame: pd.DataFrame) -> np.ndarray:
    """Pearson over each pair's rows in long doubles: pandas itself is 1e-8 off where spreads are small."""
    rows, p = frame.to_numpy(np.longdouble), frame.shape[1]
    found = np.full((p, p), np.nan)
    for i in range(p):
        for j in range(p):
            both = rows[~np.isnan(rows[:, i] + rows[:, j])]
            if len(both) > 1:
                u, v = both[:, i] - both[:, i].mean(), both[:, j] - both[:, j].mean()
                if np.ptp(both[:, i]) > 0 and np.ptp(both[:, j]) > 0:
                    found[i, j] = float((u * v).sum() / np.sqrt((u * u).sum() * (v * v).sum()))
    return found


def matrix(found: dict[str, Any], which: str = "matrix") -> np.ndarray:
    return np.array(found[which], float)
