"""Metrics of predictions: of probabilities, of classes and of values. Sources: Hanley & McNeil 1982 (AUC as a rank
statistic); Brier 1950."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LOSS_CAP = 50.0
"""Log loss of one row is capped here (a probability of 2e-22), so that the sum is bounded."""


def binary_metrics(y: Floats, p: Floats) -> dict[str, float]:
    """Exact metrics of predicted probabilities *p* for labels *y*, each [num_rows]; NaN where undefined."""
    positives, n = float(y.sum()), len(y)
    negatives = n - positives
    if n == 0:
        return dict.fromkeys(("auc", "ks", "accuracy", "f1", "log_loss", "brier"), math.nan)
    auc = ks = math.nan
    if positives and negatives:
        auc = float((scipy.stats.rankdata(p)[y == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))
        order = np.argsort(p, kind="stable")
        gaps = np.abs(np.cumsum(y[order]) / positives - np.cumsum(1 - y[order]) / negatives)
        last_of_ties = np.append(np.diff(p[order]) > 0, True)
        ks = float(gaps[last_of_ties].max())
    called = p >= 0.5
    hits = float((called & (y == 1)).sum())
    return {
        "auc": auc,
        "ks": ks,
        "accuracy": float((called == (y == 1)).mean()),
        "f1": 2 * hits / float(called.sum() + positives) if called.sum() + positives else math.nan,
        "log_loss": float(log_loss(y, p).mean()),
        "brier": float(((p - y) ** 2).mean()),
    }


def log_loss(y: Floats, p: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.minimum(-np.log(np.where(y == 1, p, 1 - p)), LOSS_CAP)


def error_metrics(
    n: int, absolute: float, squared: float, y: float, y_squares: float, *, unit: float = 1.0
) -> dict[str, float]:
    """MAE, RMSE and R² from sums of errors and of the target about one point, in units of *unit*; NaN if undefined."""
    if n <= 0:
        return dict.fromkeys(("mae", "rmse", "r2"), math.nan)
    spread = y_squares - y**2 / n
    return {
        "mae": absolute / n * unit,
        "rmse": math.sqrt(squared / n) * unit,
        "r2": 1 - squared / spread if spread > 1e-12 * y_squares else math.nan,
    }


def class_metrics(confusion: NDArray[Any], loss: float) -> dict[str, float]:
    """Of counts by true and predicted class, [classes, classes], and the sum of log losses: accuracy, the mean over
    classes that are there of F1 and of recall (balanced accuracy), and log loss; NaN where undefined."""
    confusion = np.maximum(confusion.astype(np.float64), 0)
    rows, hits, true, called = confusion.sum(), np.diag(confusion), confusion.sum(1), confusion.sum(0)
    if not rows:
        return dict.fromkeys(("accuracy", "macro_f1", "balanced_accuracy", "log_loss"), math.nan)
    there = true > 0
    return {
        "accuracy": float(hits.sum() / rows),
        "macro_f1": float((2 * hits[there] / (true + called)[there]).mean()),
        "balanced_accuracy": float((hits[there] / true[there]).mean()),
        "log_loss": float(loss / rows),
    }


def confused(y: Floats, p: Floats) -> NDArray[np.int64]:
    """Counts by true class *y* [num_rows] and the most probable of *p* [num_rows, classes], [classes, classes]."""
    classes = p.shape[1]
    places = y.astype(np.int64) * classes + p.argmax(1)
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def class_losses(y: Floats, p: Floats) -> Floats:
    """Log loss of each row, capped, [num_rows]."""
    with np.errstate(divide="ignore"):
        found: Floats = np.minimum(-np.log(p[np.arange(len(y)), y.astype(np.int64)]), LOSS_CAP)
    return found
