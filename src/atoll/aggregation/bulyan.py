"""Bulyan: a selection by repeated Krum, then of each coordinate the mean of the values nearest to its median.

Source: El Mhamdi, Guerraoui & Rouault 2018, The Hidden Vulnerability of Distributed Learning in Byzantium (ICML), §4.
Withstands f attackers among at least 4f + 3, also those that hide a large change of one coordinate in a high dimension.
"""

from __future__ import annotations

import numpy as np

from atoll.aggregation.krum import scores, squared_distances
from atoll.aggregation.rule import Asked, Floats, Rule, register
from atoll.aggregation.trimmed_mean import PIECE


def selected(changes: Floats, attackers: int) -> list[int]:
    """The places of n − 2f updates, each Krum's choice of those that were left."""
    distances, left = squared_distances(changes), list(range(len(changes)))
    chosen: list[int] = []
    while len(chosen) < len(changes) - 2 * attackers:
        among = distances[np.ix_(left, left)]
        order = np.lexsort((among.sum(1), scores(among, attackers)))  # of the last few, pairs have the same score
        chosen.append(left.pop(int(order[0])))
    return chosen


def bulyan(changes: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """β = θ − 2f values of θ = n − 2f: in order, they stand side by side."""
    chosen = np.sort(selected(changes, asked.attackers))
    count = len(chosen) - 2 * asked.attackers
    value, kept = np.empty(changes.shape[1]), np.zeros(len(changes))
    for start in range(0, len(value), PIECE):
        piece = np.ascontiguousarray(changes[chosen, start : start + PIECE].T)
        ordered = np.sort(piece, axis=1)
        middle = np.median(ordered, axis=1)
        starts = np.arange(len(chosen) - count + 1)
        reach = np.maximum(middle[:, None] - ordered[:, starts], ordered[:, starts + count - 1] - middle[:, None])
        near = np.take_along_axis(ordered, reach.argmin(1)[:, None] + np.arange(count), axis=1)
        value[start : start + PIECE] = near.mean(1)
        kept[chosen] += ((piece >= near[:, :1]) & (piece <= near[:, -1:])).sum(0)
    return value, kept / max(float(kept.sum()), 1.0)


def least(attackers: int) -> int:
    """Their condition: n ≥ 4f + 3."""
    return 4 * attackers + 3


register(Rule("bulyan", bulyan, least))
