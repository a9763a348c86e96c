"""A site's prepared table: numpy columns under a schema, split into training and held-out rows."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PolicyError, SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.columns import Selected, Stored
from atoll.data.sketch import Sketch, mixed, sketch


@dataclass(frozen=True)
class Table:
    """Columns of equal length, as :mod:`atoll.data.columns` says; *held_out* marks rows kept for
    evaluation, [num_rows]; *dropped* counts the rows that preparation left out, by reason; *achieved* are
    the k and l of its anonymity; *withheld* are columns that may not be read, and which kind of data each is."""

    schema: TableSchema
    columns: Mapping[str, NDArray[Any]]
    held_out: NDArray[np.bool_] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    marked: NDArray[np.uint64] | None = None
    achieved: Mapping[str, int] = field(default_factory=dict)
    withheld: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def ids(self) -> NDArray[np.uint64]:
        """Who each row is, [num_rows]: as its source had it, else a hash of its entity, or of all its cells."""
        if self.marked is not None:
            return self.marked
        entities = [name for name, column in self.schema.columns.items() if column.role == "entity"]
        found = np.zeros(len(self), np.uint64)
        for name in entities or self.columns:
            found = (found ^ hashed(self[name])) * np.uint64(0x100000001B3)  # FNV-1a, a word at a time
        return found

    @cached_property
    def sketch(self) -> Sketch:
        """What is remembered of the rows (see :mod:`atoll.data.sketch`)."""
        return sketch(self.ids)

    def __len__(self) -> int:
        if self.held_out is not None:
            return len(self.held_out)
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        self._check_readable(name)
        try:
            return self.columns[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.columns, 1)
            raise SchemaError(
                "schema.no-column",
                f"there is no column {name!r}",
                field=name,
                remedy=f"did you mean {near[0]!r}?" if near else "check the plan's column names against the schema",
            ) from None

    def codes(self, name: str) -> NDArray[np.int32]:
        """A column with a code list as indices into the schema's *values*, [num_rows], −1 where missing."""
        self._check_readable(name)
        values = self.schema.columns[name].values if name in self.columns else ()
        if values is None:
            raise SchemaError(
                "schema.no-values", f"column {name!r} has no list of values", field=name,
                remedy="list its values in the schema, or bin it in the recipe",
            )  # fmt: skip
        if isinstance(self.columns, Stored | Selected) and self.schema.columns[name].dtype == "text":
            return self.columns.raw(name)
        column = self[name]
        if column.dtype == object:
            place = {value: i for i, value in enumerate(values)}
            return np.fromiter((place.get(cell, -1) for cell in column), np.int32, len(column))
        found = np.full(len(column), -1, np.int32)
        for i, value in enumerate(values):
            found[column == value] = i
        return found

    def batches(self, names: tuple[str, ...], size: int = 65_536) -> Iterator[NDArray[Any]]:
        """Numeric columns *names* as float64 matrices [≤ size, len(names)], in row order."""
        columns = [self[name] for name in names]
        for start in range(0, len(self), size):
            yield np.column_stack([column[start : start + size] for column in columns])

    def without(self, withheld: Mapping[str, str]) -> Table:
        """The table as programs may see it: columns that are *withheld* (and as which kind of data) raise PolicyError
        "policy.column-withheld" when they are read."""
        hidden = {name: kind for name, kind in withheld.items() if name in self.columns}
        return replace(self, withheld=hidden, marked=self.ids) if hidden else self

    def _check_readable(self, name: str) -> None:
        if name in self.withheld:
            raise not_readable(name, self.withheld[name])

    def rows(self, mask: NDArray[np.bool_]) -> Table:
        """The rows where *mask* is True, in order."""
        if mask.all():
            return self
        held_out = None if self.held_out is None else self.held_out[mask]
        columns: Mapping[str, NDArray[Any]]
        if isinstance(self.columns, dict):
            columns = {name: column[mask] for name, column in self.columns.items()}
        else:
            columns = Selected(self.columns, mask)
        marked = None if self.marked is None else self.marked[mask]
        return Table(self.schema, columns, held_out, self.dropped, marked, self.achieved, self.withheld)

    def within(self) -> Table:
        """Numeric columns clipped to the schema's ranges: what a sensitivity is derived from."""
        bounded = dict(self.columns)
        for name in self.schema.numeric_columns():
            low, high = self.schema.columns[name].bounds()
            bounded[name] = np.clip(self[name], low, high)
        return replace(self, columns=bounded)

    def parts(self) -> tuple[Table, Table]:
        """(training rows, held-out rows)."""
        held = np.zeros(len(self), bool) if self.held_out is None else self.held_out
        return self.rows(~held), self.rows(held)


def not_readable(name: str, kind: str, why: str = "no program may read it here") -> PolicyError:
    """The one error for a column that the site's policy keeps from programs."""
    return PolicyError(
        "policy.column-withheld", f"column {name!r} is {kind}, and {why}", field=name,
        remedy="leave the column out; the site's operator decides: policy.yaml, 'withhold'",
    )  # fmt: skip


def hashed(column: NDArray[Any]) -> NDArray[np.uint64]:
    """64 bits of each cell, the same in every process, [num_rows]."""
    if column.dtype == np.float64:
        return np.where(np.isnan(column), np.nan, column + 0.0).view(np.uint64)
    if column.dtype.kind == "M":
        return column.astype(np.int64).view(np.uint64)
    cells = [cell.tobytes() if isinstance(cell, np.ndarray) else str(cell).encode() for cell in column]
    known = {cell: hashlib.blake2b(cell, digest_size=8).digest() for cell in set(cells)}
    return np.frombuffer(b"".join(known[cell] for cell in cells), np.uint64)


def concatenate(tables: Sequence[Table]) -> Table:
    """The rows of all *tables* (one schema), in order: what a pooled study would see."""
    names = list(tables[0].columns)
    held = [np.zeros(len(t), bool) if t.held_out is None else t.held_out for t in tables]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in names}
    return Table(tables[0].schema, columns, np.concatenate(held))


def hold_out(labels: NDArray[Any] | None, num_rows: int, fraction: float, seed: int, site: str) -> NDArray[np.bool_]:
    """Which rows to keep for evaluation: *fraction* of each class of *labels*, at random by seed and site.

    Per class, in sorted order (missing last), the class's row numbers in table order are permuted
    by a Philox generator keyed with SHA-256("atoll split\\0" + seed + "\\0" + site) and the first
    round(fraction · class size) are held out. labels: [num_rows], or None for no strata.
    """
    held = np.zeros(num_rows, bool)
    if fraction <= 0:
        return held
    digest = hashlib.sha256(f"atoll split\0{seed}\0{site}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    if labels is None:
        strata = [np.arange(num_rows)]
    else:
        if labels.dtype == object:  # text: None has no place in an order, so it is put after all others
            order = {value: code for code, value in enumerate(sorted(set(labels) - {None}))}
            labels = np.array([order.get(value, len(order)) for value in labels], np.int64)
        _, codes = np.unique(labels, return_inverse=True)
        strata = [np.flatnonzero(codes == code) for code in range(codes.max(initial=-1) + 1)]
    for rows in strata:
        held[generator.permutation(rows)[: round(fraction * len(rows))]] = True
    return held


def hold_out_latest(order: NDArray[Any], fraction: float) -> NDArray[np.bool_]:
    """Which rows to keep for evaluation: from the first of the latest *fraction* on, by time or another number.

    order: [num_rows]; rows that are alike stay together, and rows without one (NaT, NaN) are not held out. Some rows
    are always left for training: where all are alike, all of them.
    """
    known = np.sort(order[~np.isnan(order)])
    later = known[known > known[:1]] if len(known) else known
    if not len(later) or fraction <= 0:
        return np.zeros(len(order), bool)
    border = known[min(round((1 - fraction) * len(known)), len(known) - 1)]
    held: NDArray[np.bool_] = order >= max(border, later[0])
    return held


def hold_out_each(ids: NDArray[np.uint64], fraction: float, seed: int, site: str) -> NDArray[np.bool_]:
    """Which rows to keep for evaluation, each with probability *fraction* by who it is alone: a row more or less
    moves no other. ids: [num_rows]."""
    key = hashlib.sha256(f"atoll split each\0{seed}\0{site}".encode()).digest()
    return mixed(ids ^ np.frombuffer(key[:8], np.uint64)) < np.uint64(int(fraction * 2**64))
