"""A site's own validation part: training rows that it does not train on, the same ones in every round of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.models.linear import feature_bounds
from atoll.models.model import Model
from atoll.models.rows import Rows
from atoll.statistics.scores import LOSS_CAP, class_losses, log_loss

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Parts:
    """kept: places of the rows that are trained on; held: those of the validation part, and its rows as a table."""

    kept: NDArray[np.int64]
    held: NDArray[np.int64]
    rows: Rows

    @staticmethod
    def of(table: TableView, site: str, share: float) -> Parts:
        """*share* of the rows of *table* held back, drawn by the site's name. One row at least is kept, if there is
        any, and one held back, if there are two."""
        number = len(table)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((number, *site.encode()))))
        count = min(max(round(share * number), 1), number - 1) if number > 1 else 0
        order = random.permutation(number)
        held, kept = np.sort(order[:count]), np.sort(order[count:])
        return Parts(kept, held, Rows.part(table, held))


def labels(model: Model, rows: Rows) -> Floats:
    """[num_rows], of several targets [num_rows, targets]; of classes, places in the code list."""
    if model.task == "classes":
        return np.asarray(rows.codes(model.targets[0]), np.float64)
    columns = [np.asarray(rows[name], np.float64) for name in model.targets]
    return columns[0] if len(columns) == 1 else np.column_stack(columns)


def right(model: Model, y: Floats, p: Floats, schema: TableSchema) -> Floats:
    """How right each row's prediction is, in [0, 1], [num_rows]: of classes 1 or 0; of values 1 − |error| in halves of
    the target's range, 0 at the least, the mean over several targets."""
    if model.task == "classes":
        return np.asarray(p.argmax(1) == y, np.float64)
    if model.task == "binary":
        return np.asarray((p >= 0.5) == (y == 1), np.float64)
    bounds = np.array([feature_bounds(schema, name) for name in model.targets])
    near = 1 - np.abs(p - y).reshape(len(y), -1) / ((bounds[:, 1] - bounds[:, 0]) / 2)
    return np.asarray(np.maximum(near, 0).mean(1), np.float64)


def skill(model: Model, rows: Rows) -> float:
    """How well a fitted model knows *rows*, in [0, 1]: the share it is right about, above that of guessing by how
    frequent the classes are there, so that sites with other classes compare; of values, R². 0 of no rows."""
    if not len(rows):
        return 0.0
    y, p = labels(model, rows), model.predict(rows)
    if model.task in ("classes", "binary"):
        hit, shares = float(right(model, y, p, rows.schema).mean()), np.unique_counts(y).counts / len(y)
        chance = float(np.sum(shares**2))
        return max(0.0, (hit - chance) / (1 - chance)) if chance < 1 else hit
    spread = float(np.sum((y - y.mean(0)) ** 2))
    return max(0.0, 1 - float(np.sum((p - y) ** 2)) / spread) if spread else 0.0


def losses(model: Model, y: Floats, p: Floats) -> Floats:
    """Each row's log loss, or the absolute error, [num_rows], at most LOSS_CAP."""
    if model.task == "classes":
        return class_losses(y, p)
    if model.task == "binary":
        return log_loss(y, p)
    return np.asarray(np.minimum(np.abs(y - p).reshape(len(y), -1).mean(1), LOSS_CAP), np.float64)
