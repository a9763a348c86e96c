"""Weight of evidence and information value of bins, and which neighbouring parts make the best bins.

With n negatives (label 0) and p positives (label 1) in a bin, N and P in all: WOE = ln((n / N) / (p / P)), and
IV = Σ (n / N − p / P) · WOE over bins (Siddiqi 2006, Credit Risk Scorecards, ch. 6). Where n or p is 0, *smoothing* is
added to both.

Of all ways to merge neighbours into a few bins that are large enough, the one of largest IV is found by dynamic
programming over the last bin (compare Navas-Palencia 2020, arXiv:2001.08025), if asked among those of monotone WOE
only, or first pooling neighbours whose WOE goes the wrong way (pool adjacent violators: Ayer et al. 1955). Names have
no order of their own, and are put in order of WOE (best for a sum of convex functions: Chou 1991).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def woe_iv(counts: Ints, labels: Ints, smoothing: float) -> tuple[Floats, Floats]:
    """(WOE, IV) of bins with *counts* [..., 2] of negatives and positives, of *labels* [2] in all; an empty bin has
    NaN and 0."""
    share = np.where((counts == 0).any(axis=-1, keepdims=True), counts + smoothing, counts) / labels
    woe = np.where(counts.any(axis=-1), np.log(share[..., 0] / share[..., 1]), np.nan)
    return woe, np.where(np.isnan(woe), 0.0, (share[..., 0] - share[..., 1]) * woe)


def merged(
    counts: Ints, labels: Ints, *, bins: int, least: float, smoothing: float, nominal: bool, monotone: bool, pool: bool
) -> list[list[int]]:
    """Which parts of *counts* [parts, 2] make up each of at most *bins* bins of at least *least* rows, of largest IV.

    nominal: parts are names, so that any may be neighbours. monotone: WOE must rise, or fall (not so of names); pool:
    and neighbours where it does not are pooled first. Where none will do, one bin.
    """
    order, constrained = np.arange(len(counts)), monotone and not nominal
    if nominal:
        woe, _ = woe_iv(counts, labels, smoothing)
        order = np.argsort(np.where(counts.any(axis=1), woe, np.inf), kind="stable")
    best: tuple[float, list[list[int]]] = (-1.0, [list(range(len(counts)))])
    for direction in (1, -1) if constrained else (0,):
        blocks = [[int(part)] for part in order]
        if pool and constrained:
            blocks = pooled(blocks, counts, labels, smoothing, direction)
        sums = np.array([counts[block].sum(axis=0) for block in blocks])
        iv, ends = segmented(sums, labels, bins, least, smoothing, direction)
        if iv > best[0]:
            groups = [blocks[first:last] for first, last in zip([0, *ends], ends, strict=False)]
            best = iv, [[part for block in group for part in block] for group in groups]
    return best[1]


def pooled(blocks: list[list[int]], counts: Ints, labels: Ints, smoothing: float, direction: int) -> list[list[int]]:
    """Neighbouring *blocks* of parts, merged until their WOE rises (direction 1) or falls (−1)."""
    done: list[tuple[list[int], float]] = []
    for block in blocks:
        woe = float(woe_iv(counts[block].sum(axis=0), labels, smoothing)[0])
        while done and not direction * (woe - done[-1][1]) > 0:  # NaN, of an empty block, is pooled as well
            block = done.pop()[0] + block
            woe = float(woe_iv(counts[block].sum(axis=0), labels, smoothing)[0])
        done.append((block, woe))
    return [block for block, _ in done]


def segmented(
    counts: Ints, labels: Ints, bins: int, least: float, smoothing: float, direction: int = 0
) -> tuple[float, list[int]]:
    """(IV, ends of bins): neighbouring parts of *counts* [parts, 2] in at most *bins* bins of at least *least* rows, of
    largest IV; with a *direction*, WOE must rise (1) or fall (−1). Where none will do, one bin: IV −∞.

    best[i, j]: the largest IV of parts 0 … j − 1 whose last bin is i … j − 1.
    """
    size = len(counts)
    reached = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(counts, axis=0)])
    between = reached[None] - reached[:, None]
    usable = np.triu(np.ones((size + 1, size + 1), bool), 1) & (between.sum(axis=-1) >= least)
    woe, iv = woe_iv(np.where(usable[..., None], between, 1), labels, smoothing)
    gain = np.where(usable, iv, -np.inf)
    best = np.full_like(gain, -np.inf)
    best[0] = gain[0]
    found, ends = (float(best[0, size]) if usable[0, size] else -math.inf), [size]
    steps: list[Ints] = []
    for _ in range(1, min(bins, size)):
        after, came = np.full_like(best, -np.inf), np.zeros(best.shape, np.int64)
        for i in range(1, size):
            if direction:  # of the bins (h, i) that may come before (i, j)
                rising = direction * (woe[i][None, :] - woe[:, i][:, None]) > 0
                before = np.where(rising, best[:, i][:, None], -np.inf)
            else:
                before = np.broadcast_to(best[:, i][:, None], best.shape)
            came[i] = before.argmax(axis=0)
            after[i] = before.max(axis=0) + gain[i]
        steps.append(came)
        best = after
        last = int(best[:, size].argmax())
        if best[last, size] > found:
            found, ends = float(best[last, size]), [size]
            for came in reversed(steps):
                ends.insert(0, last)
                last = int(came[last, ends[1]])
    return found, ends
