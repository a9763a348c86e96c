"""Coordinate-wise trimmed mean and median.

Source: Yin et al. 2018, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (ICML), Definitions 1
and 2. Withstands f attackers among at least 2f + 1: each coordinate of the result lies between honest ones.
"""

from __future__ import annotations

import numpy as np

from atoll.aggregation.rule import Asked, Floats, Rule, register

PIECE = 1 << 14
"""Coordinates that are sorted at a time."""


def trimmed(changes: Floats, cut: int) -> tuple[Floats, Floats]:
    """The mean of each coordinate without its *cut* least and *cut* largest values, [size]; and the share of the kept
    values that are each update's, [num_updates]. changes: [num_updates, size]."""
    number, size = changes.shape
    value, kept = np.empty(size), np.zeros(number)
    for start in range(0, size, PIECE):
        piece = np.ascontiguousarray(changes[:, start : start + PIECE].T)
        ordered = np.partition(piece, (cut, number - 1 - cut), axis=1)
        low, high = ordered[:, [cut]], ordered[:, [number - 1 - cut]]
        value[start : start + PIECE] = ordered[:, cut : number - cut].mean(1)
        kept += ((piece >= low) & (piece <= high)).sum(0)
    return value, kept / max(float(kept.sum()), 1.0)


def trimmed_mean(changes: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """Definition 2, with as many cut at each end as there may be attackers."""
    return trimmed(changes, asked.attackers)


def median(changes: Floats, _: Asked) -> tuple[Floats, Floats]:
    """Definition 1: everything is cut but the middle value, or the middle two."""
    return trimmed(changes, (len(changes) - 1) // 2)


def majority(attackers: int) -> int:
    """More honest updates than others."""
    return 2 * attackers + 1


register(Rule("trimmed_mean", trimmed_mean, majority))
register(Rule("median", median, majority))
