"""Rows seen by models as a table is, wherever their columns come from: a part of a table, a DataFrame, public rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema

Cells = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """A table view (see :class:`atoll.contract.program.TableView`). column: gives a column by its name, [num_rows]."""

    schema: TableSchema
    num_rows: int
    column: Callable[[str], Cells]
    dropped: Mapping[str, int] = field(default_factory=dict)
    achieved: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def part(table: TableView, rows: NDArray[np.int64]) -> Rows:
        """Some rows of a table, in the order given."""
        return Rows(table.schema, len(rows), lambda name: np.asarray(table[name][rows]))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, name: str) -> Cells:
        return self.column(name)

    def codes(self, name: str) -> NDArray[np.int32]:
        """Places in the schema's code list, −1 where missing."""
        place = {value: i for i, value in enumerate(self.schema.columns[name].values or ())}
        return np.fromiter((place.get(cell, -1) for cell in self[name].tolist()), np.int32, len(self))

    def batches(self, names: tuple[str, ...], size: int = 65_536) -> Iterator[Cells]:
        """Numeric columns side by side."""
        columns = [self[name] for name in names]
        for start in range(0, len(self), size):
            yield np.column_stack([column[start : start + size] for column in columns])
