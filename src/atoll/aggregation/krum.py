"""Krum and multi-Krum: the updates whose nearest neighbours are nearest.

Source: Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (NeurIPS), §3 and
§4; m = n − f − 2: El Mhamdi, Guerraoui & Rouault 2020, AggregaThor, §2. Withstands f attackers among at least 2f + 3.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from atoll.aggregation.rule import Asked, Floats, Options, Rule, register


class Selected(Options):
    """select: how many updates' mean is taken; null: all but the attackers and two."""

    select: int | None = Field(default=None, ge=1)


def squared_distances(changes: Floats) -> Floats:
    """Between all pairs, [num_updates, num_updates], by the Gram matrix: right to about 1e-16 of the squared norms."""
    gram = changes @ changes.T
    norms = np.diag(gram)
    found = np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)
    found[~np.isfinite(found)] = np.inf
    np.fill_diagonal(found, 0)
    return found


def scores(distances: Floats, attackers: int) -> Floats:
    """Each update's sum of squared distances to its n − f − 2 nearest others, at least one, [n]. distances: [n, n]."""
    number = len(distances)
    others = np.sort(np.where(np.eye(number, dtype=bool), np.inf, distances), axis=1)
    return np.asarray(others[:, : max(1, number - attackers - 2)].sum(1))


def best(changes: Floats, attackers: int, count: int) -> tuple[Floats, Floats]:
    """The mean of the *count* updates of the least score, [size], and each one's share in it, [num_updates]."""
    order = np.argsort(scores(squared_distances(changes), attackers), kind="stable")[:count]
    shares = np.zeros(len(changes))
    shares[order] = 1 / len(order)
    return changes[np.sort(order)].mean(0), shares


def krum(changes: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """The one update of the least score."""
    return best(changes, asked.attackers, 1)


def multi_krum(changes: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """The mean of the updates of the least scores."""
    most = max(1, len(changes) - asked.attackers - 2)
    return best(changes, asked.attackers, min(asked.options.select or most, most))


def least(attackers: int) -> int:
    """Proposition 4.2: 2f + 2 < n."""
    return 2 * attackers + 3


register(Rule("krum", krum, least))
register(Rule("multi_krum", multi_krum, least, Selected))
