"""A site's rows in the trees of a forest: how often each counts, and what it adds to sums of labels.

Sources: Breiman 2001, Random Forests; Oza & Russell 2001, Online Bagging and Boosting, §2 (Poisson bootstrap).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.models.linear import feature_bounds
from atoll.models.model import Goal, missing
from atoll.trees.boosted import not_now
from atoll.trees.following import Following
from atoll.trees.growth import Rows
from atoll.trees.objective import ONE, Fixed, Ints, Objective

MOST_TIMES = 8
"""A row counts at most so often in one tree; more would come once in a million rows."""
Times = NDArray[np.uint8]


@dataclass(frozen=True)
class Means(Objective):
    """Means of a target in the leaves of a batch of trees, as an objective without margins. size: trees of the batch.
    classes: K, 1 of a value or of 0 and 1. low: the bottom of the target's range."""

    size: int
    classes: int
    low: float

    @staticmethod
    def of(target: str, schema: TableSchema, size: int) -> Means:
        """Raises PlanError for a target that does not suit."""
        goal = Goal.of(schema, (target,))
        if goal.task == "classes":
            return Means(target, ONE, ONE, ONE, size, goal.outputs, 0.0)
        low, high = feature_bounds(schema, target)
        if goal.task == "binary":
            return Means(target, ONE, ONE, ONE, size, 1, 0.0)
        fixed = Fixed.of((high - low) * MOST_TIMES, schema)
        return Means(target, Fixed(high - low, fixed.unit), ONE, ONE, size, 1, low)

    @property
    def outputs(self) -> int:
        """A tree for each class."""
        return self.size * self.classes

    def sums_of(self, table: TableView) -> Ints:
        """What each row adds to a sum, [n, K]: its label above the bottom, or whether it is of a class. Raises
        SchemaError where a label is missing."""
        if self.classes == 1:
            return self.gradient.integers(self.labels(table) - self.low)[:, None]
        places = table.codes(self.target)
        if (places < 0).any():
            raise missing([self.target])
        return np.asarray(places[:, None] == np.arange(self.classes), np.int64)


class Bagged(Rows):
    """Rows that count several times. times: of each row in each tree, [num_trees, num_rows]; None: once."""

    def __init__(self, codes: NDArray[np.uint8], num_trees: int, times: Times | None) -> None:
        super().__init__(codes, num_trees, None if times is None else times > 0)
        self.times = times

    def histogram(self, tree: int, nodes: Ints, offsets: Ints, counted: Ints, num_nodes: int) -> Ints:
        """(−Σ counted, Σ weight, rows) of the cells of a tree's nodes, int64 [n, cells, 3]."""
        from atoll.models import tree_kernels

        slot = self._slots(tree, nodes, num_nodes)
        weight = np.ones(len(slot), np.int64) if self.times is None else self.times[tree].astype(np.int64)
        return tree_kernels.histogram(self.codes, offsets, slot, -weight * counted, weight, len(nodes))


class Bootstrapped(Following):
    """One site's rows. How often each counts in a tree is drawn for each tree."""

    counted: Ints
    bagged: Bagged

    def began(self) -> None:
        """Codes and labels of training rows."""
        table, means = self.table, self.shape.objective
        self.counted = means.sums_of(table) if isinstance(means, Means) else np.zeros((len(table), 1), np.int64)
        self.codes = self.bins.coded(table)

    def started(self) -> None:
        """All training rows are at the roots of the batch's trees."""
        classes, outputs = self.counted.shape[1], self.shape.objective.outputs
        first, size = len(self.batches) * (outputs // classes), outputs // classes
        drawn = [self._draw(first + tree, len(self.codes)) for tree in range(size)]
        known = [times for times in drawn if times is not None]
        times = np.repeat(np.stack(known), classes, axis=0) if known else None
        self.rows = self.bagged = Bagged(self.codes, outputs, times)

    def finished(self) -> None:
        """Nothing follows from a tree."""

    def histograms(self, nodes: Ints) -> Ints:
        """(−Σ label, Σ weight, rows) of the cells of open *nodes* (tree, node), int64 [n, cells, 3]. Raises
        ProtocolError for others."""
        batch, offsets = self.growing, self.bins.offsets
        asked = set(map(tuple, nodes.tolist()))
        if (
            batch.level >= batch.max_depth
            or len(asked) < len(nodes)
            or not asked <= set(map(tuple, batch.open.tolist()))
        ):
            raise not_now()
        found = np.zeros((len(nodes), int(offsets[-1]), 3), np.int64)
        for tree in np.unique(nodes[:, 0]).tolist():
            here = np.flatnonzero(nodes[:, 0] == tree)
            counted = self.counted[:, tree % self.counted.shape[1]]
            found[here] = self.bagged.histogram(tree, nodes[here, 1], offsets, counted, batch.words.shape[1])
        return found

    def totals(self) -> tuple[Ints, Ints]:
        """(Σ label, Σ weight) of all open nodes, [num_open] each; every row counts once."""
        batch = self.growing
        label, weight = np.zeros(len(batch.open), np.int64), np.zeros(len(batch.open), np.int64)
        for tree in range(len(batch)):
            here = np.flatnonzero(batch.open[:, 0] == tree)
            places = np.full(batch.words.shape[1], -1, np.int64)
            places[batch.open[here, 1]] = here
            at = places[self.rows.node[tree]]
            np.add.at(label, at[at >= 0], self.counted[at >= 0, tree % self.counted.shape[1]])
            np.add.at(weight, at[at >= 0], 1)
        return label, weight


def poisson_times(seed: tuple[int, ...], tree: int, rows: int) -> Times:
    """How often each row counts in a tree."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((*seed, tree))))
    return np.minimum(random.poisson(1.0, rows), MOST_TIMES).astype(np.uint8)


def once(tree: int, rows: int) -> None:
    """Every row once."""
