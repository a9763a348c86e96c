"""Norm clipping and centred clipping: no update moves the mean by more than a radius, which follows the sites' median.

Sources: Sun et al. 2019, Can You Really Backdoor Federated Learning?, §4 (norms); Karimireddy, He & Jaggi 2021,
Learning from History for Byzantine Robust Optimization (ICML), §5.2 (centred: vₗ₊₁ = vₗ + mean of clip(xᵢ − vₗ)).
Of f attackers among at least 2f + 1, each moves the result by at most a radius / n and iteration, and the radius is one
of the honest updates' own: a bound, and not yet a defence against many that agree.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from atoll.aggregation.rule import Asked, Floats, Options, Rule, register
from atoll.aggregation.trimmed_mean import majority, trimmed


class Radius(Options):
    """radius: of an update; null: the median of all updates' distances."""

    radius: float | None = Field(default=None, gt=0)


class Centred(Radius):
    """iterations: steps from the coordinates' median."""

    iterations: int = Field(default=3, ge=1)


def clipped(changes: Floats, centre: Floats, radius: float | None) -> tuple[Floats, Floats]:
    """centre + the mean of (change − centre), each within *radius*, [size]; and each one's share in it, [num_updates].
    Updates are taken one by one: a million weights of a hundred sites need no second copy."""
    norms = np.array([np.linalg.norm(change - centre) for change in changes])
    radius = float(np.median(norms)) if radius is None else radius
    shares = np.where(norms <= radius, 1.0, radius / np.where(norms > 0, norms, 1)) / len(changes)
    moved = centre.copy()
    for share, change in zip(shares, changes, strict=True):
        moved += share * (change - centre)
    return moved, shares


def norm_clipping(changes: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """About no change at all."""
    return clipped(changes, np.zeros(changes.shape[1]), asked.options.radius)


def centred_clipping(changes: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """About what the step before found, and first about the coordinates' median."""
    centre = trimmed(changes, (len(changes) - 1) // 2)[0]
    shares = np.zeros(len(changes))
    for _ in range(asked.options.iterations):
        centre, shares = clipped(changes, centre, asked.options.radius)
    return centre, shares


register(Rule("norm_clipping", norm_clipping, majority, Radius))
register(Rule("centred_clipping", centred_clipping, majority, Centred))
