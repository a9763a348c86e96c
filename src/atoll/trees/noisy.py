"""What is made of noisy histograms, so that splits can be looked for in them as in exact ones.

All of a node's features tell the same rows, so their totals are one sum seen several times: each is set to their mean,
the difference spread evenly over the feature's cells (the nearest histograms, in least squares, that agree). That is
post-processing, and costs no privacy.

Source: Hay et al. 2010, Boosting the Accuracy of Differentially Private Histograms Through Consistency (VLDB), §4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def mended(g: NDArray[Any], h: NDArray[Any], offsets: Ints) -> Ints:
    """Noisy (Σ g, Σ h) of cells, [num_nodes, cells] each, as histograms (Σ g, Σ h, rows) with one row in each cell,
    int64 [num_nodes, cells, 3]; a node's Σ h is at least 0."""
    found = np.ones((*g.shape, 3), np.int64)
    starts, sizes = offsets[:-1], np.diff(offsets)
    for word, noisy in enumerate((g, h)):
        cells = np.asarray(noisy, np.float64)
        totals = np.add.reduceat(cells, starts, axis=1)
        mean = totals.mean(axis=1, keepdims=True)
        if word == 1:
            mean = np.maximum(mean, 0)
        whole = np.rint(cells + np.repeat((mean - totals) / sizes, sizes, axis=1))
        left = np.rint(mean) - np.add.reduceat(whole, starts, axis=1)
        whole[:, starts] += left
        found[..., word] = whole
    return found
