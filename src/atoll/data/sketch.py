"""A sketch of a set of rows: small, and enough to tell whether another set differs by only a few.

CELLS sums modulo 2^64: every row adds a hash of its identity to one cell. Rows that are in one
set and not in the other change at most as many cells as they are, so a difference of fewer
than k rows is never missed (but with probability 2^-64); one of k or a little more may be taken
for less. A row's identity is its entity column's cell, else all its cells, as the source had
them: an edited row is one row less and one more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CELLS = 512
Sketch = NDArray[np.uint64]


def sketch(ids: NDArray[np.uint64]) -> Sketch:
    """The sketch of a multiset of rows, [CELLS]. ids: their identities, [num_rows]."""
    cells = np.zeros(CELLS, np.uint64)
    for start in range(0, len(ids), 1 << 20):
        words = mixed(ids[start : start + (1 << 20)])
        np.add.at(cells, (words >> np.uint64(32)) % np.uint64(CELLS), words)
    return cells


def mixed(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea & Flood 2014), so that like identities are in unlike cells."""
    z = ids + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
