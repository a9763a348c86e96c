"""Columns as arrays: in memory when they are small, else one file each that is mapped when it is looked at.

float64 (NaN = missing) for numbers, str objects (None = missing) for text, datetime64[D] for
dates and datetime64[us] (UTC) for datetimes (NaT = missing), uint8 [num_rows, *shape] for images (black = missing,
where the schema allows that).
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atoll.contract.errors import SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data.engine import Engine

IN_MEMORY_BYTES = 64 << 20
"""Tables larger than this stay in files."""


class Stored(Mapping[str, NDArray[Any]]):
    """Columns of a table in the engine: each is computed into a file of its own when it is first looked at, and
    mapped anew at each look, so that what a caller has let go takes no memory."""

    def __init__(self, engine: Engine, table: ir.Table, schema: TableSchema, num_rows: int) -> None:
        self._engine, self._table, self._schema, self._rows = engine, table, schema, num_rows
        self._folder = Path(tempfile.mkdtemp(prefix="columns-", dir=engine.folder))
        self._names = list(table.columns)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self._schema.columns)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def path(self, name: str) -> Path:
        """The file that holds a column. Raises SchemaError."""
        path = self._folder / f"{self._names.index(name)}.column"
        with self._lock:
            if not path.exists():
                file = _Writer(path.with_suffix(".part"), self.declared(name))
                try:
                    for batch in self._engine.batches(self._table.select(name)):
                        file.write(batch.column(0))
                finally:
                    file.close()
                path.with_suffix(".part").rename(path)
        return path

    def declared(self, name: str) -> Column | None:
        """What the schema says of a column; None for a mark that the engine keeps beside them."""
        return self._schema.columns.get(name)

    def raw(self, name: str) -> NDArray[Any]:
        """As stored: text with a code list as int32 places in it, −1 where missing."""
        if name not in self._names:
            raise KeyError(name)
        column = self.declared(name)
        shape = (self._rows, *((column and column.shape) or ()))
        if not math.prod(shape):
            return np.empty(shape, stored_dtype(column))
        mapped: NDArray[Any] = np.memmap(self.path(name), stored_dtype(column), "r", shape=shape)
        return mapped

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        column = self.declared(name)
        if column is None or column.dtype != "text":
            return self.raw(name)
        if column.values is not None:
            codes: NDArray[Any] = np.array([*column.values, None], object)
            return np.asarray(codes[self.raw(name)])
        with pa.memory_map(str(self.path(name))) as file:
            return np.array(pa.ipc.open_stream(file).read_all().column(0).to_pylist(), object)


class Selected(Mapping[str, NDArray[Any]]):
    """Some rows of stored columns, selected when a column is looked at."""

    def __init__(self, stored: Mapping[str, NDArray[Any]], mask: NDArray[np.bool_]) -> None:
        self._stored, self._mask = stored, mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def raw(self, name: str) -> NDArray[Any]:
        """See :meth:`Stored.raw`."""
        return np.asarray(self._stored.raw(name)[self._mask])  # type: ignore[attr-defined]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return np.asarray(self._stored[name][self._mask])


def stored_dtype(column: Column | None) -> str:
    """The dtype of a column's file; of a mark's, 64 bits."""
    if column is None:
        return "<i8"
    kinds = {"date": "<M8[D]", "datetime": "<M8[us]", "image": "|u1", "text": "<i4"}
    return kinds.get(column.dtype, "<f8")


def collect(engine: Engine, table: ir.Table, num_rows: int, schema: TableSchema) -> dict[str, NDArray[Any]] | Stored:
    """All columns of *table* as arrays, in its order; of a large one, when they are looked at. Raises SchemaError."""
    names = list(table.columns)
    wide = sum(8 * math.prod(schema.columns[n].shape or (1,)) if n in schema.columns else 8 for n in names)
    if num_rows * wide <= IN_MEMORY_BYTES:
        batches = list(engine.batches(table, max(num_rows, 1)))
        whole = pa.Table.from_batches(batches) if batches else None
        declared = {name: schema.columns.get(name) for name in names}
        return {
            name: to_array(whole.column(name), declared[name]) if whole is not None else _nothing(declared[name])
            for name in names
        }
    return Stored(engine, table, schema, num_rows)


def is_large(num_rows: int, num_columns: int) -> bool:
    """Whether a table of numbers stays in files."""
    return num_rows * num_columns * 8 > IN_MEMORY_BYTES


def _nothing(column: Column | None) -> NDArray[Any]:
    shape = (column and column.shape) or ()
    return np.empty((0, *shape), object if column and column.dtype == "text" else stored_dtype(column))


class _Writer:
    """A column's file while it is written, 0600."""

    def __init__(self, path: Path, column: Column | None) -> None:
        self._column = column
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
        self._text = self._column is not None and self._column.dtype == "text"
        self._codes = pa.array(self._column.values) if self._text and self._column and self._column.values else None
        text = pa.schema([("text", pa.string())])
        self._stream = pa.ipc.new_stream(self._file, text) if self._text and self._codes is None else None

    def write(self, cells: pa.Array) -> None:
        """Append a batch."""
        if self._stream is not None:
            self._stream.write_batch(pa.record_batch([cells.cast(pa.string())], ["text"]))
        elif self._codes is not None:
            codes = pc.index_in(cells, value_set=self._codes)
            self._file.write(codes.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        else:
            self._file.write(np.ascontiguousarray(to_array(cells, self._column)).tobytes())

    def close(self) -> None:
        """End the file."""
        if self._stream is not None:
            self._stream.close()
        self._file.close()


def to_array(cells: Any, declared: Column | None) -> NDArray[Any]:
    """Arrow cells as the array that this module's docstring says; a mark as int64. Raises SchemaError for an
    image of another size."""
    if declared is None:
        marks = cells.to_numpy(zero_copy_only=False)
        return np.asarray(marks.view("<i8") if marks.dtype == np.uint64 else marks.astype("<i8"))
    if declared.dtype == "image":
        shape = declared.shape or ()
        missing = bytes(math.prod(shape)) if declared.missing == "allow" else None
        rows: list[Any] = [missing if row is None else row for row in cells.to_pylist()]
        if any(row is None or len(row) != math.prod(shape) for row in rows):
            raise SchemaError(
                "schema.image-shape", "an image is missing or has another shape", remedy="resize the images"
            )
        return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, *shape)
    if declared.dtype in ("date", "datetime"):
        return np.asarray(cells.to_numpy(zero_copy_only=False), dtype=stored_dtype(declared))
    if declared.dtype == "text":
        return np.array(cells.to_pylist(), dtype=object)
    return np.asarray(cells.cast(pa.float64()).fill_null(math.nan).to_numpy(zero_copy_only=False), dtype=np.float64)
