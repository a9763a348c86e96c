"""Boosted trees of one party's own rows: the growth that many sites share, driven without any message.

What :mod:`atoll.trees.bagged` grows at each site; and what a test compares the federated trees with, as pooled rows.

Source: Chen & Guestrin 2016, XGBoost (KDD), §2.2 and §3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atoll.trees.binning import Bins
from atoll.trees.grown import leaf_places, renew
from atoll.trees.growth import Batch, Growing, Rows
from atoll.trees.objective import Floats, Ints, Objective

if TYPE_CHECKING:  # numba takes long to load
    from atoll.models.tree_splits import Rules


@dataclass(frozen=True)
class Alone:
    """Trees that one party grows. trees: of each output. smallest: neither the base margin nor a leaf tells of
    fewer rows (see the objective)."""

    objective: Objective
    bins: Bins
    rules: Rules
    trees: int
    max_depth: int
    learning_rate: float
    smallest: int = 1

    def grow(
        self, codes: NDArray[np.uint8], labels: Floats, progress: Callable[[float, float], None] = lambda _, __: None
    ) -> tuple[Floats, Floats]:
        """(base margins [K], words [trees · K, num_nodes, 5]). progress(done, total): called before every step."""
        objective = self.objective
        base = objective.base(objective.begin_sums(labels), self.smallest)
        margin = np.tile(base, (len(codes), 1))
        words = []
        for step in range(self.trees):
            progress(step, self.trees)
            shared = objective.shared(objective.share_sums(margin, labels)) if objective.shares else np.empty(0)
            g, h = objective.gradients(margin, labels, shared)
            batch = Batch(objective.outputs, self.max_depth, self.bins)
            rows = Rows(codes, objective.outputs)
            grow(Growing(batch, self.rules, self.learning_rate, furthest=objective.max_step), rows, g, h)
            self._renew(batch, rows, margin, labels)
            for k in range(objective.outputs):
                margin[:, k] += batch.values(k)[rows.node[k]]
            words.append(batch.words)
        return base, np.concatenate(words)

    def _renew(self, batch: Batch, rows: Rows, margin: Floats, labels: Floats) -> None:
        """Give leaves the values that the objective makes of their rows, where it does."""
        places, most = leaf_places(batch)
        if self.objective.renews(most):
            leaf = np.stack([places[k][rows.node[k]] for k in range(len(batch))], axis=1)
            found = self.objective.renewed(self.objective.renew_sums(margin, labels, leaf, most), self.smallest)
            renew(batch, (self.learning_rate * found).astype(np.float32).astype(np.float64).ravel())


def grow(growing: Growing, rows: Rows, g: Ints, h: Ints) -> None:
    """Grow a batch on *rows*. g, h: [num_rows, num_trees]."""
    batch = growing.batch
    while not growing.done:
        while len(places := growing.wanted()):
            growing.told(places, rows.sums(batch.bins.offsets, batch.open[places], g, h, batch.words.shape[1]))
        growing.decide()
        rows.descend(batch)
