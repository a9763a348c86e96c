"""Rows of sites with a signal in numbers and a category, and a label of every sort."""

from __future__ import annotations

from typing import Any

import numpy as np

COLUMNS: dict[str, Any] = {
    "a": {"range": [-5, 5]},
    "b": {"range": [0, 1000]},
    "kind": {"dtype": "text", "values": ["x", "y", "z"]},
    "binary": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "class": {"dtype": "text", "values": ["p", "q", "r"], "role": "label"},
    "value": {"range": [-80, 80], "role": "label"},
    "time": {"dtype": "integer", "range": [1, 30], "role": "label"},
}


def rows(seed: int, n: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    a, b, kind = random.normal(0, 1, n), random.uniform(0, 900, n), random.choice(["x", "y", "z"], n).astype(object)
    eta = np.sin(2 * a) + b / 500 + np.where(kind == "x", 1.0, 0.0)
    return {
        "a": np.where(random.random(n) < 0.1, np.nan, a.clip(-5, 5)), "b": b, "kind": kind,
        "binary": (eta + random.normal(0, 0.5, n) > 1).astype(float),
        "class": np.array(["p", "q", "r"], object)[np.digitize(eta + random.normal(0, 0.5, n), [1, 2])],
        "value": 10 * eta + random.normal(0, 2, n),
        "time": np.ceil(random.exponential(10 / (1 + np.exp(eta)), n)).clip(1, 30),
    }  # fmt: skip
