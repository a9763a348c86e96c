"""A site's rows as they follow the trees: kept between rounds, and made again from the log where they do not fit it.

Nothing here is needed to go on after a restart: codes follow from the table and the bins, margins and places in the
tree from the log.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from atoll.contract.program import SiteView, TableView
from atoll.trees.binning import Bins
from atoll.trees.grown import Grown, Shape
from atoll.trees.growth import Batch, Ints, Rows
from atoll.trees.objective import Objective
from atoll.trees.replica import Log

Floats = NDArray[np.float64]
Draw = Callable[[int, int], NDArray[Any] | None]
"""(step, number of rows) → the rows that count in it; None: all."""


class Part:
    """Some of a site's rows: training rows, or held-out ones."""

    def __init__(self, codes: NDArray[np.uint8], labels: Floats, base: Floats) -> None:
        self.codes, self.labels = codes, labels
        self.margins = np.tile(base, (len(codes), 1))

    def add(self, batch: Batch, node: NDArray[np.int32]) -> None:
        """A batch's leaf values, of rows at *node* [num_trees, num_rows]."""
        for tree in range(len(batch)):
            self.margins[:, tree] += batch.values(tree)[node[tree]]


def counted(objective: Objective, bins: Bins, table: TableView) -> tuple[NDArray[np.uint8], Floats]:
    """(codes, labels) of a table's rows that count."""
    codes, labels = bins.coded(table), objective.labels(table)
    counting = objective.counting(labels)
    return (codes, labels) if counting is None else (codes[counting], labels[counting])


class Following(Grown):
    """One site. rows: where training rows are in the batch that grows."""

    def __init__(self, shape: Shape, table: TableView, holdout: TableView, draw: Draw) -> None:
        super().__init__(shape)
        self._tables, self._draw = (weakref.ref(table), weakref.ref(holdout)), draw
        self.taken = 0
        self.digest = b""
        self.log = Log()
        self.rows = Rows(np.zeros((0, 0), np.uint8), 0)
        self._held: Part | None = None
        self._gradients: tuple[Ints, Ints] | None = None
        self._columns: tuple[bytes, NDArray[np.uint8]] = (b"", np.zeros((0, 0), np.uint8))

    def is_of(self, table: TableView, holdout: TableView) -> bool:
        """Whether it is of these tables."""
        return self._tables[0]() is table and self._tables[1]() is holdout

    @property
    def alive(self) -> bool:
        """Whether its table is still there."""
        return self._tables[0]() is not None

    def follow(self, log: Log, progress: Callable[[float, float], None] = lambda _, __: None) -> bool:
        """Take the records that came; false where what is known does not lead to this log."""
        if self.taken > len(log) or (self.taken and log.digests[self.taken] != self.digest):
            return False
        for number, record in enumerate(log.records[self.taken :], self.taken):
            self.take(record)
            progress(number + 1, len(log))
        self.taken, self.digest, self.log = len(log), log.digests[-1], log
        return True

    def began(self) -> None:
        """Codes and labels of training rows; held-out ones are looked at when they are asked for."""
        self.train = self._part(0)

    @property
    def table(self) -> TableView:
        """The training rows."""
        return self._table(0)

    def _table(self, which: int) -> TableView:
        table = self._tables[which]()
        if table is None:
            raise RuntimeError("the table is gone")  # its owner calls this
        return table

    def _part(self, which: int) -> Part:
        return Part(*counted(self.shape.objective, self.bins, self._table(which)), self.base)

    @property
    def held(self) -> Part:
        """Held-out rows, with the margins of all finished steps."""
        if self._held is None:
            self._held = self._part(1)
            for batch in self.batches:
                self._descend(self._held, batch)
        return self._held

    def started(self) -> None:
        """All training rows are at the roots."""
        step, outputs = len(self.batches), self.shape.objective.outputs
        included = self._draw(step, len(self.train.codes))
        every = None if included is None else np.tile(included, (outputs, 1))
        self.rows, self._gradients = Rows(self.train.codes, outputs, every), None

    def descended(self) -> None:
        """Training rows go with the level."""
        self.rows.descend(self.growing)

    def finished(self) -> None:
        """Margins follow."""
        if self.batch is not None:
            self.train.add(self.batch, self.rows.node)
            if self._held is not None:
                self._descend(self._held, self.batch)

    @staticmethod
    def _descend(part: Part, batch: Batch) -> None:
        rows = Rows(part.codes, len(batch))
        for _ in range(batch.max_depth):
            rows.descend(batch)
        part.add(batch, rows.node)

    @property
    def gradients(self) -> tuple[Ints, Ints]:
        """(g, h) of training rows for the batch that grows, [num_rows, outputs] each."""
        if self._gradients is None:
            objective = self.shape.objective
            self._gradients = objective.gradients(self.train.margins, self.train.labels, self.shared)
        return self._gradients

    def only(self, columns: Ints) -> Rows:
        """The rows with the codes of some features alone."""
        key = columns.tobytes()
        if self._columns[0] != key:
            self._columns = (key, np.ascontiguousarray(self.train.codes[:, columns]))
        rows = Rows(self._columns[1], 0, self.rows.included)
        rows.node = self.rows.node
        return rows


F = TypeVar("F", bound=Following)


class Kept(Generic[F]):
    """What a program keeps of the sites whose tasks it answers: of each table that is still there, the last log's."""

    def __init__(self, kind: type[F]) -> None:
        self._kind = kind
        self._held: dict[int, F] = {}

    def log(self, site: SiteView) -> Log | None:
        """The log that a site last had, as far as this process remembers."""
        found = self._held.get(id(site.table))
        return None if found is None else found.log

    def at(self, site: SiteView, shape: Shape, log: Log, draw: Draw) -> F:
        """A site's rows, brought to the log."""
        table, holdout = site.table, site.holdout
        found = self._held.pop(id(table), None)  # kept again only when all of the log was sound
        if found is None or not found.is_of(table, holdout) or not found.follow(log, site.progress):
            found = self._kind(shape, table, holdout, draw)
            found.follow(log, site.progress)
        self._held = {key: kept for key, kept in self._held.items() if kept.alive} | {id(table): found}
        return found
