"""The state that follows from a log of records (see ``replica.py``): bins, base margins and trees as far as they grew.

Records come in one order only, so that none says what it is: the bins and base margins; then for each step of boosting
a record of what the objective shares, if it does; one for each level, the words of its open nodes in order (the last
level's too); and the new values of all leaves, where the objective renews them. :meth:`Grown.take` refuses any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atoll.contract.schema import TableSchema
from atoll.models.trees import COVER, FEATURE, LEAF, THRESHOLD
from atoll.trees.binning import Bins, unsound
from atoll.trees.growth import WORDS, Batch
from atoll.trees.objective import Objective

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """What a plan says of the trees, before anything is known of data. trees: at most so many steps."""

    schema: TableSchema
    features: tuple[str, ...]
    categorical: tuple[str, ...]
    objective: Objective
    trees: int
    max_depth: int


class Grown:
    """batches: of finished steps. batch: of the one that grows, None before its first record. shared: what the
    objective shares for it. expects: which record comes next."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.base: Floats = np.zeros(shape.objective.outputs)
        self.bins = Bins((), (), np.zeros(0, np.int64))
        self.batches: list[Batch] = []
        self.batch: Batch | None = None
        self.shared: Floats = np.zeros(0)
        self.expects: Literal["begin", "share", "level", "renew", "end"] = "begin"

    @property
    def growing(self) -> Batch:
        """The batch that grows; raises ProtocolError where none does."""
        if self.batch is None or self.expects != "level":
            raise unsound()
        return self.batch

    def take(self, record: Floats) -> None:
        """The next record; raises ProtocolError for one that cannot come now. Calls what subclasses follow."""
        match self.expects:
            case "begin":
                outputs = self.shape.objective.outputs
                if len(record) < outputs or not np.isfinite(record).all():
                    raise unsound()
                self.base, told = record[:outputs].copy(), record[outputs:]
                self.bins = Bins.read(told, self.shape.schema, self.shape.features, self.shape.categorical)
                self.began()
                self._next()
            case "share":
                if record.shape != (self.shape.objective.shared_size,) or not np.isfinite(record).all():
                    raise unsound()
                self.shared = record.copy()
                self._fresh()
            case "level":
                batch = self.growing
                if record.size != len(batch.open) * WORDS:
                    raise unsound()
                batch.apply(record.reshape(-1, WORDS))
                self.descended()
                if batch.done:
                    self.expects = "renew"
                    if not self.shape.objective.renews(1):
                        self._finish()
            case "renew" if self.batch is not None:
                renew(self.batch, record)
                self._finish()
            case _:
                raise unsound()

    def began(self) -> None:
        """The bins are known."""

    def started(self) -> None:
        """A step begins."""

    def descended(self) -> None:
        """A level of the batch was decided."""

    def finished(self) -> None:
        """A step's trees are done."""

    def _next(self) -> None:
        if len(self.batches) >= self.shape.trees:
            self.batch, self.expects = None, "end"
        elif self.shape.objective.shares:
            self.batch, self.expects = None, "share"
        else:
            self._fresh()

    def _fresh(self) -> None:
        self.batch = Batch(self.shape.objective.outputs, self.shape.max_depth, self.bins)
        self.expects = "level"
        self.started()

    def _finish(self) -> None:
        if self.batch is not None:
            self.finished()
            self.batches.append(self.batch)
        self._next()

    def weights(self, steps: int) -> Floats:
        """A model's (see ``models/trees.py``) of so many of the finished steps; the other trees are not in use."""
        outputs, nodes = self.shape.objective.outputs, 2 ** (self.shape.max_depth + 1) - 1
        words = Batch(self.shape.trees * outputs, self.shape.max_depth, self.bins).words
        words[:, 0, 0] = LEAF
        for step, batch in enumerate(self.batches[:steps]):
            words[step * outputs : (step + 1) * outputs] = covered(batch.words)
        return np.concatenate([self.base, words.reshape(-1, nodes * WORDS).ravel()])


def covered(words: Floats) -> Floats:
    """Trees' words, [num_trees, num_nodes, 5], with covers where a split came without one (it was drawn): of what is
    told below, since a difference would tell of leaves that are too small."""
    found = words.copy()
    for node in reversed(range(words.shape[1] // 2)):
        drawn = (found[:, node, FEATURE] >= 0) & (found[:, node, COVER] == 0)
        found[drawn, node, COVER] = found[drawn, 2 * node + 1, COVER] + found[drawn, 2 * node + 2, COVER]
    return found


def leaf_places(batch: Batch) -> tuple[NDArray[np.int32], int]:
    """(number of each node among its tree's leaves, in heap order, −1 for others, [num_trees, num_nodes]; the most
    leaves of a tree)."""
    leaves = batch.words[:, :, 0] == LEAF
    places = np.where(leaves, np.cumsum(leaves, axis=1) - 1, -1).astype(np.int32)
    return places, int(leaves.sum(axis=1).max(initial=1))


def renew(batch: Batch, values: Floats) -> None:
    """Give a batch's leaves other *values*, [num_trees · leaves], by :func:`leaf_places`; raises ProtocolError where
    they are not float32, or too few or many."""
    places, most = leaf_places(batch)
    with np.errstate(over="ignore"):
        single = np.isfinite(values).all() and (values.astype(np.float32).astype(np.float64) == values).all()
    if len(values) not in (len(batch) * most, len(batch) * 2**batch.max_depth) or not single:
        raise unsound()
    told = values.reshape(len(batch), -1)
    for tree in range(len(batch)):
        leaves = places[tree] >= 0
        batch.words[tree, leaves, THRESHOLD] = told[tree, places[tree][leaves]]
