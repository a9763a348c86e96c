"""Where a row of neighbouring cells may be cut, so that no part holds a small group.

Counts along an axis (time, values) are told as cumulative counts at cuts. If every part between neighbouring
cuts holds nobody or at least k people of every class, so does every difference of what was told; other cells are told
only together with their neighbours. That is secondary suppression by merging (Hundepool et al. 2012, §4.4 and
"global recoding", §3.3.1): fewer cells, and none with a gap. The first and the last part hold at least k people of all
classes together, never nobody: a cut in an empty tail would tell where the smallest or the largest value is. Every
site tries the cuts in the same order, each half before any quarter, so that sites mostly agree, and what all of them
told can be added.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def halving(size: int) -> list[int]:
    """0 … size − 1, the middle first: every half is cut before any quarter."""
    return [i for s in reversed(range(size.bit_length())) for i in range(2**s - 1, size, 2 ** (s + 1))]


def kept(
    reached: NDArray[np.integer],
    total: NDArray[np.integer],
    order: Iterable[int],
    smallest: int,
    *,
    start: int = -1,
    ordered: bool = True,
) -> list[int]:
    """Of the cuts in *order*, in turn, those that leave nobody or *smallest* people of each class beside them, sorted.

    reached: people of each class up to each cut, [cuts, classes]; total: in all, [classes]. start: the cut that the
    axis starts at, where what lies before it is a class of its own (missing cells). ordered: the axis has a smallest
    and a largest value, so that its first and last part hold *smallest* people; not so of names.
    """
    if smallest <= 1:
        return sorted(set(order))
    found: list[int] = []
    ends = [np.zeros_like(total), total]
    for place in order:
        at = bisect_left(found, place)
        left, right = reached[place] - ends[at], ends[at + 1] - reached[place]
        parts = np.concatenate([left, right])
        allowed = found[at : at + 1] != [place] and ((parts == 0) | (parts >= smallest)).all()
        if ordered and place != start:
            first, last = at == 0 or found[at - 1] == start, at == len(found)
            lowest = (reached[place] - (reached[start] if start >= 0 else 0)).sum()
            allowed &= not (first and lowest < smallest) and not (last and right.sum() < smallest)
        if allowed:
            found.insert(at, place)
            ends.insert(at + 1, reached[place])
    return found
