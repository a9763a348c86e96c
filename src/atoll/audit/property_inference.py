"""Property inference: does a site's data have a property (such as more than 60 % ill) that nobody asked about?

The attacker makes shadow updates from public data with and without the property, trains a classifier on them, and
asks it about the site's update. Sources: Ganju et al. 2018, Property Inference Attacks on Fully Connected Neural
Networks using Permutation Invariant Representations, Section 3; Melis et al. 2019, Exploiting Unintended Feature
Leakage in Collaborative Learning, Section V-B.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from atoll.contract.errors import PlanError

Floats = NDArray[np.float64]
Update = Callable[[NDArray[np.int64]], Floats]
"""Rows of the attacker's own data, by number → the update that a site with them would send, [num_weights]."""


def with_share(y: Floats, share: float, num_rows: int, random: np.random.Generator) -> NDArray[np.int64]:
    """*num_rows* rows, drawn with replacement, of which round(share · num_rows) have label 1."""
    ones, zeros = np.flatnonzero(y > 0.5), np.flatnonzero(y <= 0.5)
    if not len(ones) or not len(zeros):
        raise PlanError("audit.one-kind", "a shadow update needs rows of both labels", field="y",
                        remedy="give public data with both labels")  # fmt: skip
    positive = round(share * num_rows)
    drawn = np.concatenate([random.choice(ones, positive), random.choice(zeros, num_rows - positive)])
    return random.permutation(drawn)


def shadow_updates(
    update: Update, y: Floats, shares: tuple[float, float], num_rows: int, number: int, seed: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """*number* updates [number, num_weights], half with the second share of label 1, and which [number]."""
    random = np.random.default_rng(seed)
    has = np.arange(number) % 2 == 1
    made = [update(with_share(y, shares[int(one)], num_rows, random)) for one in has]
    return np.array(made), has


def infer_property(
    shadows: Floats, has: NDArray[np.bool_], observed: Floats, truth: NDArray[np.bool_], num_components: int = 16
) -> float:
    """AUC with which *observed* updates [n, num_weights] are told apart; 0.5 is chance. They are of other data than
    the shadows."""
    size = min(num_components, shadows.shape[1], len(shadows) - 1)
    steps = StandardScaler(), PCA(size, random_state=0), LogisticRegression(max_iter=1000)
    classifier = make_pipeline(*steps).fit(shadows, has)
    return float(roc_auc_score(truth, classifier.decision_function(observed)))
