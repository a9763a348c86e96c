"""Level-wise growth of a batch of trees from summed histograms, without any input or output of its own.

A batch is trees that grow at the same time: one for each output of a boosting step, all trees of a forest, or one. Who
drives it (a coordinator over rounds, a site alone, a test) repeats:

    growing = Growing(Batch(num_trees, max_depth, bins), rules, learning_rate)
    while not growing.done:
        while len(places := growing.wanted()):         # open nodes whose sums are needed: growing.batch.open[places]
            growing.told(places, sums, who)            # (Σ g, Σ h, rows) of their cells, int64 [len(places), cells, 3]
        growing.decide()                               # splits or leaves; what is below is open now
    growing.batch.words                                # [num_trees, num_nodes, 5], see models/trees.py

From the second level on only the smaller child of a split is wanted: its sibling is parent less child (Ke et al. 2017,
LightGBM (NeurIPS), §2.1), as long as both sums are of the same sites; else the sibling is wanted too. Children that no
rule lets split are not wanted, and the last level never is: its leaves follow from the sums of the splits above.

:class:`Batch` is what all who follow the growth hold alike, from each level's words; :class:`Rows` are a site's.

Source: Chen & Guestrin 2016, XGBoost (KDD), §2.2 and §3.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atoll.models.trees import COVER, DEFAULT, FEATURE, FURTHEST, GAIN, LEAF, THRESHOLD, UNUSED
from atoll.trees.binning import Bins, split_codes, unsound

if TYPE_CHECKING:  # numba takes long to load
    from atoll.models.tree_splits import Rules, Splits

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
WORDS = 5
Search = Callable[[Ints, Ints, Floats], "Splits"]
"""(sums of candidates [n, cells, 3], their (tree, node) [n, 2], their bounds [n, 2]) → how each splits."""
Value = Callable[[Ints, Floats, int], Floats]
"""(sums of new leaves [n, 3], their bounds [n, 2], their depth) → their values [n]."""


class Batch:
    """Trees as far as they are grown. words: [num_trees, num_nodes, 5]. code, mask: of each node, as kernels take
    splits. open: (tree, node) of all that are neither split nor leaves yet, [num_open, 2], all of one *level*."""

    def __init__(self, num_trees: int, max_depth: int, bins: Bins) -> None:
        self.max_depth, self.bins, self.level = max_depth, bins, 0
        size = 2 ** (max_depth + 1) - 1
        self.words = np.zeros((num_trees, size, WORDS))
        self.words[:, :, FEATURE] = UNUSED
        self.code, self.mask = np.zeros((num_trees, size), np.int32), np.zeros((num_trees, size), np.uint64)
        self.open: Ints = np.column_stack([np.arange(num_trees), np.zeros(num_trees, np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def done(self) -> bool:
        """Whether no node is open."""
        return not len(self.open)

    def apply(self, words: Floats) -> None:
        """Decide all open nodes, [num_open, 5]; children of the split ones are open then. Raises ProtocolError for
        words that make no trees of these bins."""
        if words.shape != (len(self.open), WORDS) or not np.isfinite(words).all():
            raise unsound()
        told = words[:, FEATURE]
        if not ((told >= LEAF) & (told < len(self.bins.features)) & (told == np.floor(told))).all():
            raise unsound()
        feature, value, splits = told.astype(np.int64), words[:, THRESHOLD], told >= 0
        with np.errstate(over="ignore"):
            single = value.astype(np.float32).astype(np.float64) == value
        if (splits.any() and self.level >= self.max_depth) or not (single | splits).all():
            raise unsound()
        default = words[:, DEFAULT]
        if not ((default == 0) | (default == 1)).all() or (words[:, COVER] < 0).any():
            raise unsound()
        code, mask = split_codes(self.bins, feature, value)
        trees, nodes = self.open.T
        self.words[trees, nodes], self.code[trees, nodes], self.mask[trees, nodes] = words, code, mask
        trees, nodes = trees[splits], nodes[splits]
        below = np.column_stack([2 * nodes + 1, 2 * nodes + 2]).reshape(-1)
        self.open = np.column_stack([np.repeat(trees, 2), below]).astype(np.int64)
        self.level += 1

    def descend(self, tree: int, codes: NDArray[np.uint8], node: NDArray[np.int32]) -> NDArray[np.int32]:
        """Where rows of *codes* at *node* [num_rows] of a tree are one level down; at leaves they stay."""
        from atoll.models import tree_kernels

        feature = self.words[tree, :, FEATURE].astype(np.int32)
        return tree_kernels.route(
            codes, node, feature, self.code[tree], self.mask[tree], self.words[tree, :, DEFAULT] == 1
        )

    def values(self, tree: int) -> Floats:
        """Of a tree's leaves, by node; 0 elsewhere."""
        words = self.words[tree]
        return np.where(words[:, FEATURE] == LEAF, words[:, THRESHOLD], 0.0)


class Growing:
    """A batch, and the sums that its next level is decided by."""

    def __init__(
        self, batch: Batch, rules: Rules, learning_rate: float = 1.0, *, monotone: NDArray[np.int8] | None = None,
        allowed: Callable[[Ints], NDArray[np.bool_]] | None = None, furthest: float = np.inf, subtract: bool = True,
        search: Search | None = None, value: Value | None = None,
    ) -> None:  # fmt: skip
        """learning_rate: of leaves' values. monotone: by feature, +1, −1 or 0. allowed: of (tree, node) [n, 2], the
        features that each may split by, [n, num_features]. furthest: no leaf's weight is beyond it, either way.
        subtract: false where sums are noisy: then all open nodes are wanted. search, value: in place of the best split
        and of XGBoost's leaf."""
        self.batch, self.rules, self.learning_rate, self.monotone = batch, rules, learning_rate, monotone
        self.allowed, self.subtract = allowed, subtract
        self._search, self._value = search or self._best, value or self._weights
        self.sums = np.zeros((len(batch.open), 3), np.int64)
        self.bounds = np.tile([-float(furthest), float(furthest)], (len(batch.open), 1))
        self._hist: dict[int, Ints] = {}
        self._who: dict[int, Hashable] = {}
        self._above: list[tuple[Ints, Hashable] | None] = []  # of each pair of siblings

    @property
    def done(self) -> bool:
        """Whether the trees are grown."""
        return self.batch.done

    @cached_property
    def cells(self) -> int:
        """Of one node, over all features."""
        return int(self.batch.bins.offsets[-1])

    def wanted(self) -> Ints:
        """Places in ``batch.open`` of nodes whose sums are to be asked now; none when the level can be decided."""
        batch = self.batch
        if batch.level >= batch.max_depth:
            return np.zeros(0, np.int64)
        everyone = range(len(batch.open))
        if batch.level == 0 or not self.subtract:
            return np.array([place for place in everyone if place not in self._hist], np.int64)
        may, places = self._may_split(), []
        for pair in range(len(self._above)):
            left, right = 2 * pair, 2 * pair + 1
            if not (may[left] or may[right]):
                continue
            known = [place for place in (left, right) if place in self._hist]
            if not known:
                places.append(left if self.sums[left, 2] <= self.sums[right, 2] else right)
            elif len(known) == 1 and may[left + right - known[0]]:  # the sums were of other sites than the parent's
                places.append(left + right - known[0])
        return np.array(places, np.int64)

    def told(self, places: Ints, sums: Ints, who: Hashable = None) -> None:
        """The sums of nodes that were wanted, [len(places), cells, 3], and of which sites they are."""
        first = self.batch.bins.offsets[:2]
        for place, hist in zip(places.tolist(), sums, strict=True):
            self._hist[place], self._who[place] = hist, who
            self.sums[place] = hist[first[0] : first[1]].sum(axis=0)
            if not self._above or not self.subtract:
                continue
            above, other = self._above[place // 2], place ^ 1
            if above is not None and above[1] == who and other not in self._hist:
                self._hist[other], self._who[other] = above[0] - hist, who
                self.sums[other] = self._hist[other][first[0] : first[1]].sum(axis=0)

    def decide(self) -> Floats:
        """Split the open nodes or make them leaves; returns their words, [num_open, 5]. What noise may make of sums is
        no error: a node without a split is a leaf."""
        batch = self.batch
        words = np.zeros((len(batch.open), WORDS))
        words[:, FEATURE] = LEAF
        words[:, COVER] = np.maximum(self.sums[:, 1] * self.rules.h_unit, 0)
        may = self._may_split()
        places = np.array([place for place in sorted(self._hist) if may[place]], np.int64)
        if batch.level >= batch.max_depth:
            places = places[:0]
        below: list[Ints] = []
        limits: list[Floats] = []
        above: list[tuple[Ints, Hashable] | None] = []
        if len(places):
            hist = np.stack([self._hist[place] for place in places.tolist()])
            found = self._search(hist, batch.open[places], self.bounds[places])
            for i in np.flatnonzero(found.feature >= 0).tolist():
                place, f = int(places[i]), int(found.feature[i])
                words[place, :4] = f, self._threshold(f, int(found.code[i]), int(found.mask[i])), \
                    found.default_left[i], found.gain[i]  # fmt: skip
                below += [found.left[i], found.right[i]]
                limits += [found.left_bounds[i], found.right_bounds[i]]
                above.append((self._hist[place], self._who[place]) if self.subtract else None)
        leaves = words[:, FEATURE] == LEAF
        with np.errstate(over="ignore"):
            values = np.clip(self._value(self.sums[leaves], self.bounds[leaves], batch.level), -FURTHEST, FURTHEST)
            words[leaves, THRESHOLD] = values.astype(np.float32)
        batch.apply(words)
        self.sums = np.array(below, np.int64).reshape(-1, 3)
        self.bounds = np.array(limits, np.float64).reshape(-1, 2)
        self._hist, self._who, self._above = {}, {}, above
        return words

    def _may_split(self) -> NDArray[np.bool_]:
        """Which open nodes the rules let split."""
        if not self.subtract:
            return np.ones(len(self.sums), bool)
        rows, weight = self.sums[:, 2], self.sums[:, 1] * self.rules.h_unit
        return np.asarray((rows >= max(2 * self.rules.min_rows, 2)) & (weight >= 2 * self.rules.min_child_weight))

    def _threshold(self, feature: int, code: int, mask: int) -> float:
        from atoll.models import tree_splits

        if self.batch.bins.codes[feature]:
            return float(mask)
        return tree_splits.threshold_of(self.batch.bins.edges[feature], code)

    def _best(self, hist: Ints, nodes: Ints, bounds: Floats) -> Splits:
        from atoll.models import tree_splits

        bins = self.batch.bins
        return tree_splits.best_splits(
            hist, bins.offsets, self.rules, categorical=bins.categorical, monotone=self.monotone, bounds=bounds,
            allowed=None if self.allowed is None else self.allowed(nodes),
        )  # fmt: skip

    def _weights(self, sums: Ints, bounds: Floats, depth: int) -> Floats:
        from atoll.models import tree_splits

        return self.learning_rate * tree_splits.weights_of(sums, self.rules, bounds)


class Rows:
    """A site's rows in a batch. codes: [num_rows, num_features]; node: where each row is in each tree, int32
    [num_trees, num_rows]."""

    def __init__(self, codes: NDArray[np.uint8], num_trees: int, included: NDArray[np.bool_] | None = None) -> None:
        """included: rows that count, [num_trees, num_rows]; the others only go along."""
        self.codes, self.included = codes, included
        self.node = np.zeros((num_trees, len(codes)), np.int32)

    def descend(self, batch: Batch) -> None:
        """One level down."""
        for tree in range(len(batch)):
            self.node[tree] = batch.descend(tree, self.codes, self.node[tree])

    def sums(self, offsets: Ints, nodes: Ints, g: Ints, h: Ints, num_nodes: int) -> Ints:
        """(Σ g, Σ h, rows) of the cells of some *nodes* (tree, node) [n, 2], int64 [n, cells, 3]. g, h: [num_rows,
        num_trees]. num_nodes: of one tree."""
        from atoll.models import tree_kernels

        found = np.zeros((len(nodes), int(offsets[-1]), 3), np.int64)
        for tree in np.unique(nodes[:, 0]).tolist():
            here = np.flatnonzero(nodes[:, 0] == tree)
            slot = self._slots(tree, nodes[here, 1], num_nodes)
            found[here] = tree_kernels.histogram(
                self.codes, offsets, slot, np.ascontiguousarray(g[:, tree]), np.ascontiguousarray(h[:, tree]), len(here)
            )
        return found

    def totals(self, nodes: Ints, g: Ints, h: Ints, num_nodes: int) -> Ints:
        """(Σ g, Σ h, rows) of some *nodes* as a whole, int64 [n, 3]."""
        found = np.zeros((len(nodes), 3), np.int64)
        for tree in np.unique(nodes[:, 0]).tolist():
            here = np.flatnonzero(nodes[:, 0] == tree)
            slot = self._slots(tree, nodes[here, 1], num_nodes)
            counted = slot >= 0
            for word, each in enumerate((g[:, tree], h[:, tree], np.ones(len(slot), np.int64))):
                sums = np.zeros(len(here), np.int64)
                np.add.at(sums, slot[counted], each[counted])
                found[here, word] = sums
        return found

    def _slots(self, tree: int, nodes: Ints, num_nodes: int) -> NDArray[np.int32]:
        """Which of *nodes* each row is at, −1 for none of them."""
        places: NDArray[np.int32] = np.full(num_nodes, -1, np.int32)
        places[nodes] = np.arange(len(nodes))
        slot: NDArray[np.int32] = places[self.node[tree]]
        if self.included is not None:
            slot[~self.included[tree]] = -1
        return slot


def drawn(batch: Batch, random: np.random.Generator) -> list[Floats]:
    """Split all inner nodes of a fresh batch at random, features and cells evenly; returns the levels' words. Rows with
    missing cells go to a side drawn, too (Geurts et al. 2006, Extremely Randomized Trees; Maddock et al. 2022, §4)."""
    bins, told = batch.bins, []
    usable = np.flatnonzero((bins.codes > 1) | np.array([len(edges) > 0 for edges in bins.edges]))
    while batch.level < batch.max_depth and len(usable):
        words = np.zeros((len(batch.open), WORDS))
        for row in words:
            f = int(random.choice(usable))
            if bins.codes[f]:
                row[THRESHOLD] = random.integers(1, 2 ** int(bins.codes[f]) - 1)
            else:
                row[THRESHOLD] = float(bins.edges[f][random.integers(len(bins.edges[f]))])
            row[FEATURE], row[DEFAULT] = f, random.integers(2)
        batch.apply(words)
        told.append(words)
    return told


__all__ = ["GAIN", "WORDS", "Batch", "Growing", "Rows", "drawn"]
