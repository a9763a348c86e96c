"""The sandbox compares a federation with the pooled table, which may have more rows than any one site may."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atoll.contract.plan import Plan
from atoll.data.sources import SourceSpec
from atoll.runtime.sandbox import run_sandbox


def test_the_pooled_table_may_be_larger_than_a_sites(tmp_path: Path) -> None:
    """One full batch a round: federated and pooled are the same descent."""
    random, sources = np.random.default_rng(6), {}
    for name in ("a", "b", "c"):
        x = random.uniform(-1, 1, 50)
        y = (random.random(50) < 1 / (1 + np.exp(-3 * x))).astype(int)
        lines = ["x,y", *(f"{a!r},{b}" for a, b in zip(x.tolist(), y.tolist(), strict=True))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        sources[name] = SourceSpec(path=f"{name}.csv")
    label = {"dtype": "integer", "values": [0, 1], "role": "label"}
    plan = {
        "atoll": 1, "name": "small", "program": "horizontal.fedavg", "protection": "plain",
        "schema": {"name": "small", "max_rows": 60, "columns": {"x": {"range": [-1, 1]}, "y": label}},
        "params": {"family": "logistic", "target": "y", "features": ["x"], "rounds": 20, "batch_size": 1000},
        "run": {"holdout": 0.2, "seed": 4},
    }  # fmt: skip
    metrics = run_sandbox(Plan.from_json(plan), sources, tmp_path, tmp_path / "out")[0]["metrics"]
    assert metrics["pooled"]["log_loss"] == pytest.approx(metrics["federated"]["log_loss"], rel=1e-9)
