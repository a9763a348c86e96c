"""Metrics of predicted probabilities from sums: a histogram of scores by label, and summed losses.

Log loss, Brier score, accuracy and F1 are exact. AUC counts pairs within a bin as ties (half), so that it is off by at
most ``auc_error`` = Σ_b P_b·N_b / (2·P·N); KS is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.wire import Array
from atoll.statistics.scores import log_loss

Floats = NDArray[np.float64]


def score_sums(y: Floats, p: Floats, bins: int) -> dict[str, Any]:
    """Of labels *y* and predictions *p*, each [num_rows]. correct: true positives, called positive, called right."""
    called = p >= 0.5
    return {
        "rows": len(y),
        "positives": histogram(p[y == 1], bins),
        "negatives": histogram(p[y == 0], bins),
        "log_loss": log_loss(y, p).sum(),
        "brier": ((p - y) ** 2).sum(),
        "score": np.bincount(_places(p, bins), weights=p, minlength=bins),
        "correct": np.array([(called & (y == 1)).sum(), called.sum(), (called == (y == 1)).sum()]),
    }


def histogram(p: Floats, bins: int) -> NDArray[np.int64]:
    """How many of *p* [num_rows] are in each of *bins* even bins of [0, 1]."""
    return np.bincount(_places(p, bins), minlength=bins)


def _places(p: Floats, bins: int) -> NDArray[np.int64]:
    return np.minimum((p * bins).astype(np.int64), bins - 1)


def from_cells(cells: Array) -> dict[str, Array]:
    """As :func:`score_sums`, of a noisy histogram [2, bins] by label, as if scores were the middles of the bins."""
    negatives, positives = np.maximum(np.asarray(cells, np.float64), 0)
    score = (np.arange(len(positives)) + 0.5) / len(positives)
    called, both = score >= 0.5, positives + negatives
    right = np.where(called, positives, negatives)
    return {
        "positives": positives,
        "negatives": negatives,
        "log_loss": -(positives @ np.log(score) + negatives @ np.log1p(-score)),
        "brier": positives @ (1 - score) ** 2 + negatives @ score**2,
        "score": both * score,
        "correct": np.array([positives[called].sum(), both[called].sum(), right.sum()]),
    }


def score_metrics(total: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, {"calibration": by tenth of the scores, "roc"}) of sums of :func:`score_sums`; NaN where undefined."""
    positives, negatives = (np.asarray(total[k], np.float64) for k in ("positives", "negatives"))
    p, n = float(positives.sum()), float(negatives.sum())
    rows = p + n
    hits, called, correct = (float(v) for v in total["correct"])
    metrics = dict.fromkeys(("auc", "ks", "auc_error"), math.nan)
    if p and n:
        below = np.cumsum(negatives) - negatives
        metrics["auc"] = float((positives * (below + negatives / 2)).sum() / (p * n))
        metrics["auc_error"] = float((positives * negatives).sum() / (2 * p * n))
        metrics["ks"] = float(np.abs(np.cumsum(positives) / p - np.cumsum(negatives) / n).max())
    metrics |= {
        "accuracy": correct / rows if rows else math.nan,
        "f1": 2 * hits / (called + p) if called + p else math.nan,
        "log_loss": float(total["log_loss"]) / rows if rows else math.nan,
        "brier": float(total["brier"]) / rows if rows else math.nan,
    }
    groups = np.array_split(np.arange(len(positives)), 10)
    size = [(positives + negatives)[g].sum() for g in groups]
    calibration = [
        {
            "rows": float(s),
            "predicted": float(np.asarray(total["score"])[g].sum() / s),
            "observed": float(positives[g].sum() / s),
        }
        for g, s in zip(groups, size, strict=True)
        if s
    ]
    roc = {
        "false_positive_rate": np.append(0, np.cumsum(negatives[::-1]) / max(n, 1)).tolist(),
        "true_positive_rate": np.append(0, np.cumsum(positives[::-1]) / max(p, 1)).tolist(),
    }
    return metrics, {"calibration": calibration, "roc": roc}
