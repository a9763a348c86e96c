"""Statistics of windows over rows in order, on arrays.

What windows hold is added up pairwise, over a binary tree of the rows, and never subtracted from a running sum: no
window's digits depend on rows outside it. Variances are merged as Chan, Golub & LeVeque 1983 do. O(log w)
array operations for windows of at most w rows; memory for one block of rows and its windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
State = tuple[Floats, ...]
"""What is known of some rows; one array a number."""

BLOCK = 1 << 18
"""Rows whose windows are looked at together."""


def blocks(size: int) -> Iterator[slice]:
    """All of *size* rows, BLOCK at a time."""
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def since(times: Places, start: Places, length: int) -> Places:
    """For each row the first row of its stream that is later than *length* before it, [num_rows].

    times: ascending within each stream, at least 0, [num_rows]; start: the first row of each row's stream.
    """
    found = np.empty_like(start)
    seed = 0  # in a stream, what a row's window begins with only moves on
    for part in blocks(len(times)):
        low, high = np.maximum(start[part], seed), np.arange(part.start, part.stop, dtype=start.dtype)
        oldest = times[part] - length
        while (wide := low < high).any():
            middle = (low + high) // 2
            early = wide & (times[middle] <= oldest)
            low = np.where(early, middle + 1, low)
            high = np.where(wide & ~early, middle, high)
        found[part], seed = low, low[-1]
    return found


def counted(values: Floats, first: Places, end: Places) -> Places:
    """How many of values[first:end] are present (not NaN), for each window (at least one), [len(first)]."""
    base, until = int(first.min()), int(end.max())
    before = np.zeros(until - base + 1, np.int64)
    np.cumsum(~np.isnan(values[base:until]), out=before[1:])
    return before[end - base] - before[first - base]


def rolled(values: Floats, first: Places, end: Places, how: str) -> Floats:
    """The *how* (sum, std, min, max) of the present values[first:end], for each window (at least one), [len(first)].

    Without present values: 0, 0, inf, −inf; the std (n − 1) of one is 0.
    """
    base, until = int(first.min()), int(end.max())
    cells = values[base:until]
    missing = np.isnan(cells)
    empty, merge = _MERGES[how]
    leaves: State = (np.where(missing, empty[-1], cells),)
    if how == "std":
        leaves = ((~missing).astype(np.float64), leaves[0], np.zeros(len(cells)))
    found = _folded(leaves, first - base, end - base, empty, merge)
    return np.sqrt(found[2] / np.maximum(found[0] - 1, 1)) if how == "std" else found[0]


def _folded(
    nodes: State, left: Places, right: Places, empty: tuple[float, ...], merge: Callable[[State, State], State]
) -> State:
    """*merge* over nodes[left:right], for each pair."""
    found = tuple(np.full(len(left), cell) for cell in empty)
    while (some := left < right).any():
        odd = some & (left & 1 == 1)
        _put(found, odd, merge(_at(found, odd), _at(nodes, left[odd])))
        left = (left + odd) >> 1
        odd = some & (right & 1 == 1)
        _put(found, odd, merge(_at(found, odd), _at(nodes, right[odd] - 1)))
        right = right >> 1
        if len(nodes[0]) % 2:
            nodes = tuple(np.append(node, cell) for node, cell in zip(nodes, empty, strict=True))
        nodes = merge(_at(nodes, slice(0, None, 2)), _at(nodes, slice(1, None, 2)))
    return found


def _at(state: State, place: NDArray[np.bool_] | Places | slice) -> State:
    return tuple(numbers[place] for numbers in state)


def _put(state: State, place: NDArray[np.bool_], new: State) -> None:
    for numbers, cells in zip(state, new, strict=True):
        numbers[place] = cells


def _one_by_one(function: np.ufunc) -> Callable[[State, State], State]:
    return lambda a, b: tuple(function(x, y) for x, y in zip(a, b, strict=True))


def _moments(a: State, b: State) -> State:
    """(count, mean, sum of squared deviations) of two sets together."""
    (n, mean, squares), (m, other, more) = a, b
    apart, size = other - mean, n + m
    share = m / np.maximum(size, 1)
    return size, mean + apart * share, squares + more + apart * apart * n * share


_MERGES: dict[str, tuple[tuple[float, ...], Callable[[State, State], State]]] = {
    "sum": ((0.0,), _one_by_one(np.add)),
    "std": ((0.0, 0.0, 0.0), _moments),
    "min": ((np.inf,), _one_by_one(np.minimum)),
    "max": ((-np.inf,), _one_by_one(np.maximum)),
}
