"""Inputs of the report as runs leave them: a rehearsal's model study, and a study of statistics only."""

from __future__ import annotations

import math
from typing import Any

import pytest

SITES = {"north": 142, "harbour": 199, "university": None}
UNITS = {"age": "year", "trestbps": "mmHg", "chol": "mg/dl"}


def _binary(auc: float, **more: float) -> dict[str, float]:
    rest = {"ks": auc - 0.3, "accuracy": auc - 0.09, "f1": auc - 0.06, "log_loss": 1.3 - auc, "brier": 0.9 - 0.87 * auc}
    return {"auc": auc, **rest, **more}


def _column(low: float, high: float, rows: int, missing: int) -> dict[str, Any]:
    bins = 24
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    histogram = [round(rows / 6 * math.exp(-(((i - 10) / 4) ** 2))) for i in range(bins)]
    middle, spread = low + 0.44 * (high - low), 0.12 * (high - low)
    moments = {"mean": middle, "variance": spread**2, "std": spread, "low": edges[3], "high": edges[19]}
    return {
        "rows": rows, "count": rows - missing, "missing": missing, **moments, "edges": edges, "histogram": histogram,
    }  # fmt: skip


@pytest.fixture
def model_study() -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, details) of a logistic regression in the sandbox, with statistics beside it."""
    table = [
        {"name": name, "coefficient": c, "std_error": e, "z": c / e, "p_value": math.erfc(abs(c / e) / math.sqrt(2))}
        for name, c, e in (
            ("intercept", -5.33, 1.6), ("age", 0.0185, 0.0133), ("sex", 1.48, 0.28), ("chol", 0.00286, 0.00206),
            ("trestbps", 0.0187, 0.00655), ("exang", 0.86, 0.264),
        )
    ]  # fmt: skip
    pooled = _binary(0.874, auc_error=0.00028)
    result = {
        "study": "heart-disease", "program": "horizontal.glm", "plan_hash": "c6cab4" * 10 + "33fa",
        "run": "5ee32b92" * 4, "transport": "local", "protection": "plain", "seed": 7, "rounds": 10, "seconds": 83.2,
        "sites": {name: {"rows": rows} for name, rows in SITES.items()},
        "wire": {"to_sites_bytes": 82_984, "from_sites_bytes": 161_856},
        "metrics": {
            "federated": dict(pooled),
            "pooled": pooled,
            "per_site": {
                "north": {"federated": _binary(0.896, rows=43.0), "local": _binary(0.882, rows=43.0)},
                "harbour": {"federated": _binary(0.907, rows=60.0), "local": _binary(0.918, rows=60.0)},
                "university": {"federated": _binary(0.761, rows=68.0), "local": {}},
            },
            "notes": {"university": "every label is the same"},
        },
        "privacy": {"protection": "plain", "unit": None, "epsilon": None, "statement": "The coordinator saw shares."},
        "model": {"coefficients": {row["name"]: row["coefficient"] for row in table}, "table": table,
                  "converged_rounds": 6},
        "statistics": {"rows": 569, "columns": {
            "age": _column(20, 100, 569, 0), "trestbps": _column(60, 250, 569, 12), "chol": _column(50, 700, 569, 9),
        }},
        "fitted": {"0": {}, "1": {"trestbps": 132.487, "chol": 248.301}},
    }  # fmt: skip
    released = [
        {"program": "horizontal.glm", "handler": "labels", "what": "n (1 number), y (2 numbers)", "bytes": 24,
         "times": 1},
        {"program": "horizontal.glm", "handler": "newton", "what": "gradient (6 numbers), hessian (21 numbers)",
         "bytes": 3_840, "times": 6},
    ]  # fmt: skip
    rates = [i / 50 for i in range(51)]
    details = {
        "history": [{"step": i, "loss": 0.43 + 0.26 * 4.0**-i} for i in range(6)],
        "curves": {
            "roc": {"false_positive_rate": rates, "true_positive_rate": [rate**0.2 for rate in rates]},
            "calibration": [{"rows": 20 + 300 * p, "predicted": p, "observed": p**1.1} for p in rates[5::10]],
        },
        "units": dict(UNITS),
        "purpose": "research",
        "rounds": [{"number": i, "name": f"glm/{'newton' if i else 'labels'}", "seconds": 0.02} for i in range(7)],
        "releases": {site: [dict(one) for one in released] for site in SITES},
        "created": "2025-03-12T14:05:00+00:00",
        "versions": {"atoll": "0.1.0", "python": "3.11.7"},
    }  # fmt: skip
    return result, details


@pytest.fixture
def statistics_study(model_study: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, details) of a study without a model."""
    result, details = model_study
    result = {key: value for key, value in result.items() if key != "model"}
    result |= {"study": "ages", "program": "statistics.describe", "metrics": {"federated": {}, "per_site": {}}}
    return result, {**details, "history": [], "curves": {}}
