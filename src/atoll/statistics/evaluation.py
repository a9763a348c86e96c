"""Evaluation of a model on every site's held-out rows, by Sum; used by every learner.

Parties: sites and coordinator. Messages: the model goes out; round "scores" is one Sum,
round "own" (asked only where the plan's sites may share it) gathers each site's own
metrics. The coordinator learns the cohort's score histograms and loss sums (each site's
under ``plain``); a site whose policy does not share "metrics" is simply absent from
"own", and how many rows it held out is told only where it shares "rows". Dropout: the
survivors' metrics. Cost: 2 rounds, 16 KiB a site.

Log loss, accuracy, F1 and squared errors are exact sums. AUC and KS come from a
histogram of scores with *bins* bins: AUC counts pairs within a bin as ties (half), so it
is off by at most ``auc_error`` = Σ_b P_b·N_b / (2·P·N); KS is a lower bound.
Sources: Hanley & McNeil 1982 (AUC as a rank statistic); Brier 1950.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import rankdata

from atoll.contract.errors import PolicyError, SchemaError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Gather, Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.wire import Array, Json
from atoll.models.linear import TASK, LinearModel, feature_bounds

Floats = NDArray[np.float64]
LOSS_CAP = 50.0
"""Log loss of one row is capped here (a probability of 2e-22), so that the sum is bounded."""
OWN = ("rows", "auc", "ks", "accuracy", "f1", "log_loss", "brier", "mae", "rmse", "r2")


def binary_metrics(y: Floats, p: Floats) -> dict[str, float]:
    """Exact metrics of predicted probabilities *p* for labels *y*, each [num_rows]; NaN where undefined."""
    positives, n = float(y.sum()), len(y)
    negatives = n - positives
    if n == 0:
        return dict.fromkeys(("auc", "ks", "accuracy", "f1", "log_loss", "brier"), math.nan)
    auc = ks = math.nan
    if positives and negatives:
        auc = float((rankdata(p)[y == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))
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
        "log_loss": float(_log_loss(y, p).mean()),
        "brier": float(((p - y) ** 2).mean()),
    }


def _log_loss(y: Floats, p: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.minimum(-np.log(np.where(y == 1, p, 1 - p)), LOSS_CAP)


def error_metrics(n: float, absolute: float, squared: float, y_sum: float, y_squares: float) -> dict[str, float]:
    """MAE, RMSE and R² from sums of errors and of the target."""
    if not n:
        return dict.fromkeys(("mae", "rmse", "r2"), math.nan)
    spread = y_squares - y_sum**2 / n
    return {
        "mae": absolute / n,
        "rmse": math.sqrt(squared / n),
        "r2": 1 - squared / spread if spread > 1e-12 * y_squares else math.nan,
    }


@program("statistics.evaluation", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Evaluation:
    """AUC, KS, F1, accuracy, log-loss, calibration (or MAE, RMSE, R²) on held-out rows, by Sum."""

    class Params(ProgramParams):
        """model: a model's spec (its weights are sent as arrays). bins: of the score histogram.
        own: also ask each site for its own metrics, where its policy shares them."""

        model: dict[str, Json]
        bins: int = Field(default=1024, ge=10, le=65_536)
        own: bool = True

    def __init__(self, params: Params) -> None:
        self.params = params
        self.binary = TASK[str(params.model.get("family", "linear"))] == "binary"

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """*start* holds the model's arrays. Returns {"pooled": metrics, "own": {site: metrics}, "curves": …}."""
        send, rows, bins = dict(start or {}), cohort.schema.max_rows, self.params.bins
        if self.binary:
            fields = {
                "positives": count(bins, bound=rows),
                "negatives": count(bins, bound=rows),
                "log_loss": real(bound=rows * LOSS_CAP, step=1e-9),
                "brier": real(bound=rows, step=1e-9),
                "score": real(bins, bound=rows, step=1e-9),
                "correct": count(3, bound=rows),
            }
        else:
            low, high = feature_bounds(cohort.schema, str(self.params.model["target"]))
            reach = 1e3 * max(abs(low), abs(high), 1.0)  # predictions beyond a thousandfold are clipped
            fields = {"errors": real(5, bound=rows * reach**2, step=1e-9)}
        total = yield Round("scores", Sum(), {"rows": count(bound=rows), **fields}, send)
        pooled, curves = self._binary(total) if self.binary else self._errors(total)
        own: dict[str, dict[str, float]] = {}
        if self.params.own:
            gathered = yield Round("own", Gather(), {n: real() for n in OWN}, send, optional=True)
            for site in gathered:
                values = {n: float(v) for n, v in gathered[site].items()}
                own[site] = {n: v for n, v in values.items() if n in pooled or (n == "rows" and not math.isnan(v))}
        return {"pooled": pooled, "own": own, "curves": curves}

    def _binary(self, total: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, Any]]:
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

    def _errors(self, total: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, Any]]:
        return error_metrics(*(float(v) for v in total["errors"])), {}

    def _scored(self, site: SiteView, task: Task) -> tuple[Floats, Floats]:
        model = LinearModel.from_spec(self.params.model, site.holdout.schema, task.arrays)
        y, p = site.holdout[model.target], model.predict(site.holdout)
        if np.isnan(y).any() or np.isnan(p).any():
            raise SchemaError(
                "schema.missing",
                "held-out rows have missing labels or features",
                field=model.target,
                remedy="impute features in the recipe, and remove rows without a label",
            )
        return y, p

    @handler("scores", groups=("rows",))
    def scores(self, site: SiteView, task: Task) -> Reply:
        """At the site: histograms of scores by label, and loss sums, over held-out rows."""
        y, p = self._scored(site, task)
        if not self.binary:
            return {"rows": len(y), "errors": np.array(_error_sums(y, p))}
        place = np.minimum((p * self.params.bins).astype(np.int64), self.params.bins - 1)
        called = p >= 0.5
        return {
            "rows": len(y),
            "positives": np.bincount(place[y == 1], minlength=self.params.bins),
            "negatives": np.bincount(place[y == 0], minlength=self.params.bins),
            "log_loss": _log_loss(y, p).sum(),
            "brier": ((p - y) ** 2).sum(),
            "score": np.bincount(place, weights=p, minlength=self.params.bins),
            "correct": np.array([(called & (y == 1)).sum(), called.sum(), (called == (y == 1)).sum()]),
        }

    @handler("own", reduce="gather")
    def own(self, site: SiteView, task: Task) -> Reply:
        """At the site: its own exact metrics; withheld unless its policy shares "metrics"."""
        if not site.shares("metrics"):
            raise PolicyError("policy.withheld", "the site does not share its own metrics", field="share")
        y, p = self._scored(site, task)
        found = binary_metrics(y, p) if self.binary else error_metrics(*_error_sums(y, p))
        if site.shares("rows"):
            found["rows"] = float(len(y))
        return {name: found.get(name, math.nan) for name in OWN}


def _error_sums(y: Floats, p: Floats) -> tuple[float, float, float, float, float]:
    error = p - y
    return float(len(y)), float(np.abs(error).sum()), float((error**2).sum()), float(y.sum()), float((y**2).sum())
