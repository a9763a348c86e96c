"""Membership inference: was this record among those a model was trained on?

``loss_threshold``: members have smaller losses (Yeom et al. 2018, Privacy Risk in Machine Learning, Section 3.2).
``lira``: the likelihood ratio of a record's logit-scaled confidence under shadow models trained with it and without it
(Carlini et al. 2022, Membership Inference Attacks From First Principles, Algorithm 1, parallel form: each shadow model
is trained on a random half, so that every record is in about half of them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from atoll.contract.errors import PlanError

Floats = NDArray[np.float64]
Predict = Callable[[Floats], Floats]
"""Rows [n, ...] → probability of class 1, [n]."""
Train = Callable[[Floats, Floats], Predict]
"""Rows and labels → a trained model."""


@dataclass(frozen=True, slots=True)
class Membership:
    """auc: 0.5 is chance. tpr_at_1_fpr: share of members found while at most 1 % of the others are accused."""

    auc: float
    tpr_at_1_fpr: float

    @staticmethod
    def of(score: Floats, member: NDArray[np.bool_]) -> Membership:
        """From scores that are higher for likelier members, [n]; raises PlanError without both kinds."""
        if member.all() or not member.any():
            raise PlanError("audit.one-kind", "a membership test needs members and others", field="member",
                            remedy="hold out some rows that the model was not trained on")  # fmt: skip
        fpr, tpr, _ = roc_curve(member, score)
        return Membership(float(roc_auc_score(member, score)), float(tpr[fpr <= 0.01].max()))


def logits(probability: Floats, y: Floats) -> Floats:
    """log(p / (1 − p)) of the probability given to the true label (Carlini et al. 2022, Section IV-C), [n]."""
    p = np.clip(np.where(y > 0.5, probability, 1 - probability), 1e-9, 1 - 1e-9)
    scaled: Floats = np.log(p) - np.log1p(-p)
    return scaled


def loss_threshold(predict: Predict, x: Floats, y: Floats, member: NDArray[np.bool_]) -> Membership:
    """The attack that needs nothing but the model: minus the loss of each row is its score."""
    return Membership.of(-np.logaddexp(0, -logits(predict(x), y)), member)


def lira(
    predict: Predict, train: Train, x: Floats, y: Floats, member: NDArray[np.bool_], *,
    num_shadows: int = 64, seed: int = 0,
) -> Membership:  # fmt: skip
    """The strongest known: *num_shadows* models are trained by *train* on random halves of *x* [n, ...].

    Variances are pooled over records (better for few shadows, Carlini et al. 2022, Section VI-B). Raises PlanError for
    fewer than 8 shadow models.
    """
    if num_shadows < 8:
        raise PlanError("audit.few-shadows", "too few shadow models", field="num_shadows", remedy="use at least 8")
    random = np.random.default_rng(seed)
    halves = np.array([random.permutation(len(x)) < len(x) // 2 for _ in range(num_shadows)])
    confidence = np.array([logits(train(x[half], y[half])(x), y) for half in halves])
    inside, outside = (np.where(halves if side else ~halves, confidence, np.nan) for side in (True, False))
    mean_in, mean_out = np.nan_to_num(np.nanmean(inside, axis=0)), np.nan_to_num(np.nanmean(outside, axis=0))
    std_in, std_out = (float(np.sqrt(np.nanmean((v - np.nanmean(v, axis=0)) ** 2))) + 1e-9 for v in (inside, outside))
    seen = logits(predict(x), y)
    return Membership.of(norm.logpdf(seen, mean_in, std_in) - norm.logpdf(seen, mean_out, std_out), member)


def ridge(penalty: float = 1e-3) -> Train:
    """Shadow training in closed form: least squares on labels ±1, read as half of the log-odds (fast, linear)."""

    def train(x: Floats, y: Floats) -> Predict:
        design = np.column_stack([np.ones(len(x)), x.reshape(len(x), -1)])
        kernel = design.T @ design + penalty * len(x) * np.eye(design.shape[1])
        weights = np.linalg.solve(kernel, design.T @ (2 * y - 1))

        def predict(rows: Floats) -> Floats:
            eta = 2 * (weights[0] + rows.reshape(len(rows), -1) @ weights[1:])
            probability: Floats = 1 / (1 + np.exp(-np.clip(eta, -500, 500)))
            return probability

        return predict

    return train
