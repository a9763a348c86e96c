"""Ranks of values that only histograms tell: mid-ranks of bins, where to draw bins, and how far ranks may be off.

For ``statistics.correlation`` (Spearman), which says what follows from it. Source: Kendall & Gibbons 1990, ch. 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.contract.schema import Column

Floats = NDArray[np.float64]


def edges(column: Column, size: int, before: tuple[Floats, Floats] | None) -> Floats:
    """Lower edges of *size* bins: one a code, else even over the range, or over the rows that the bins *before*
    (edges, counts) hold. The range's ends and zero, where values pile up, have bins of their own."""
    if column.values is not None:
        edges = np.unique(np.array(column.values, np.float64))
    else:
        low, high = column.bounds()
        own = np.array([x for x in (low, 0.0, high) if low <= x <= high])
        whole = column.dtype == "integer"
        own = np.concatenate([own, np.floor(own) + 1 if whole else np.nextafter(own, np.inf)])
        if before is None:
            edges = np.linspace(low, high, size - 6)
            if whole and high - low <= size - 7:
                edges = np.arange(math.floor(low), math.floor(high) + 1.0)
        else:
            reached = np.append(0, np.cumsum(before[1]))
            edges = np.interp(np.linspace(0, reached[-1], size - 6), reached, np.append(before[0], high))
        edges = np.unique(np.concatenate([np.floor(edges) if whole else edges, np.floor(own) if whole else own]))
    return np.concatenate([edges, np.full(size - len(edges), edges[-1])])


def single(column: Column, edges: Floats) -> NDArray[np.bool_]:
    """Which bins can hold one value only (or none), [size]."""
    if column.values is not None:
        return np.ones(len(edges), bool)
    following = edges + 1 if column.dtype == "integer" else np.nextafter(edges, np.inf)
    return np.append(edges[1:], edges[-1]) <= following


def within(counts: Floats, single: NDArray[np.bool_], slack: int) -> float:
    """Most that Σ(c³ − c)/12 can be over bins that may hold different values, when up to *slack* rows crossed
    each edge: it is convex in the counts, so the bins that can be largest are full."""
    most = np.sort(counts[~single] + 2 * slack)[::-1]
    filled = np.diff(np.minimum(np.cumsum(most), counts.sum()), prepend=0)
    return float((filled * np.maximum(most**2 - 1, 0)).sum() / 12)


def scores(counts: Floats) -> tuple[Floats, Floats]:
    """(the bins' mid-ranks, centred and in units of their standard deviation, [columns, bins]; that unit [columns])."""
    n = counts.sum(axis=1, keepdims=True)
    ranks = np.cumsum(counts, axis=1) - (counts - 1) / 2 - (n + 1) / 2
    unit = np.sqrt((counts * ranks**2).sum(axis=1) / np.maximum(n[:, 0], 1))
    unit = np.where(unit > 0, unit, 1.0)
    return ranks / unit[:, None], unit


def shared(scores: Floats, own: Floats, smallest: int) -> tuple[Floats, float]:
    """(the bins' scores when at least *smallest* of the rows, *own* in each bin, have the same; a bound for Σ of
    the squares that they differ by), of ascending *scores* [size]."""
    if smallest <= 1:
        return scores, 0.0
    ends, pending = [], 0.0
    for i, rows in enumerate(own.tolist()):
        pending += rows
        if pending >= smallest:
            ends.append(i)
            pending = 0.0
    last = np.array([*ends[:-1], len(own) - 1])
    group = np.searchsorted(last, np.arange(len(own)))
    n = np.bincount(group, own)
    mean = np.bincount(group, own * scores) / np.maximum(n, 1)
    span = scores[last] - scores[np.append(0, last[:-1] + 1)]
    mixed = np.bincount(group, own > 0) > 1
    return mean[group], float((n * mixed * span**2).sum() / 4)


def bins(edges: Floats, values: Floats) -> NDArray[np.int64]:
    """The bin of each value; what lies below the first edge is in the first bin."""
    return np.maximum(np.searchsorted(edges, values, "right") - 1, 0)


def looked_up(batch: Floats, edges: Floats, scores: Sequence[Floats]) -> Floats:
    found = np.empty(batch.shape)
    for i in range(batch.shape[1]):
        found[:, i] = scores[i][bins(edges[i], batch[:, i])]
    found[np.isnan(batch)] = np.nan
    return found


def cut(
    below: NDArray[np.int64], total: int, forced: NDArray[np.bool_], smallest: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(the rows below each edge as they are told; which edges are cuts), of the true rows *below* each.

    Between neighbouring cuts are no rows or at least *smallest*; *forced* edges are cuts already.
    """
    if smallest <= 1:
        return below, np.ones(len(below), bool)
    cut, last = forced.copy(), 0
    ahead = np.append(np.where(forced, below, total), total)
    ahead = np.minimum.accumulate(ahead[::-1])[::-1]
    for i, rows in enumerate(below.tolist()):
        parts = (rows - last, int(ahead[i]) - rows)
        if forced[i] or all(part == 0 or part >= smallest for part in parts):
            cut[i], last = True, rows
    before = np.maximum.accumulate(np.where(cut, below, 0))
    after = np.minimum.accumulate(np.where(cut, below, total)[::-1])[::-1]
    return np.where(cut, below, np.where(below - before < smallest, before, after)), cut
