"""Geometric median: the point whose distances to all updates have the least sum.

Source: Pillutla, Kakade & Harchaoui 2022, Robust Aggregation for Federated Learning (IEEE TSP), Algorithm 2 (smoothed
Weiszfeld); every update is weighted alike. Withstands f attackers among at least 2f + 1: however far they are, the
result is within 2 (n − f) / (n − 2f) times the honest updates' radius of their centre (Lemma 2.1 of Lopuhaä &
Rousseeuw 1991).

All points on the way are means of the updates, so that a step needs only their inner products.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from atoll.aggregation.krum import squared_distances
from atoll.aggregation.rule import Asked, Floats, Options, Rule, register
from atoll.aggregation.trimmed_mean import majority

FAR = 1e6
"""Updates further than so many median distances are taken to be as far as that, in their direction."""
PRECISION = 1e-12


class Smoothed(Options):
    """iterations: at most so many. smoothing: distances below this share of the median one count as it."""

    iterations: int = Field(default=1000, ge=1)
    smoothing: float = Field(default=1e-6, gt=0)


def geometric_median(changes: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """Weiszfeld's steps from the mean of the half that is nearest to the update in their middle."""
    squares, options, half = squared_distances(changes), asked.options, len(changes) // 2 + 1
    middle = int(np.argmin(np.sort(np.sqrt(squares), axis=1)[:, :half].sum(1)))
    apart = np.sqrt(squares[middle])
    near, scale = np.argsort(apart, kind="stable")[:half], float(np.median(apart))
    if apart.max() > FAR * scale > 0:  # it pulls no less from nearer by, and rounding would drown the others
        factors = np.minimum(1, FAR * scale / np.maximum(apart, scale))[:, None]
        changes = changes[middle] + factors * (changes - changes[middle])
        squares = squared_distances(changes - changes[middle])
    shares = np.zeros(len(changes))
    shares[near] = 1 / half
    floor = max(options.smoothing * scale, np.finfo(float).tiny)
    for _ in range(options.iterations):
        # |x_j − Σ a_i x_i|² = Σ a_i d_ij² − ½ Σ a_i a_k d_ik², as the shares' sum is 1
        towards = squares @ shares
        away = np.sqrt(np.maximum(towards - float(shares @ towards) / 2, 0))
        pull = floor / np.maximum(away, floor)
        before, shares = shares, pull / pull.sum()
        if np.abs(shares - before).max() < PRECISION:
            break
    return shares @ changes, shares


register(Rule("geometric_median", geometric_median, majority, Smoothed))
