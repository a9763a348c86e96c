"""Tables as CSV files, read and checked; no error shows a cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data.check import checked
from atoll.data.engine import Engine
from atoll.data.sources import SourceSpec, known_columns, open_source
from atoll.data.table import Table

COLUMNS: dict[str, dict[str, Any]] = {
    "id": {"dtype": "text", "role": "entity"},
    "weight": {"dtype": "real", "unit": "kg", "range": [20, 300]},
    "visits": {"dtype": "integer", "range": [0, 100], "missing": "forbid"},
    "sex": {"dtype": "integer", "values": [0, 1]},
    "ward": {"dtype": "text", "values": ["north", "south"]},
    "day": {"dtype": "date", "role": "time"},
    "note": {"role": "ignore"},
}
HEADER = ",".join(COLUMNS)
ROW = "p1,70.5,3,1,north,2024-02-29,free text"
CANARY = "7731977.31"  # stands for any cell of a person; must not be seen in an error
DIGITS = "31977"


def schema_of(columns: Mapping[str, Any] = COLUMNS, **more: Any) -> TableSchema:
    return TableSchema(name="test", columns={name: Column(**column) for name, column in columns.items()}, **more)


def read_source(spec: SourceSpec, schema: TableSchema, base: Path) -> Table:
    return checked(known_columns(open_source(spec, schema, base, Engine()), spec)).to_table()


def read(folder: Path, content: str | bytes, schema: TableSchema | None = None, **spec: Any) -> Table:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "table.csv").write_bytes(data)
    return read_source(SourceSpec(path="table.csv", **spec), schema or schema_of(), folder)


def refused(folder: Path, content: str | bytes, schema: TableSchema | None = None, **spec: Any) -> SchemaError:
    with pytest.raises(SchemaError) as caught:
        read(folder, content, schema, **spec)
    shows_no_cell(caught.value)
    return caught.value


def shows_no_cell(error: AtollError) -> None:
    chain: BaseException | None = error
    while chain is not None and not (chain is not error and chain.__suppress_context__):
        assert DIGITS not in f"{chain} {chain!r}"
        chain = chain.__cause__ if chain.__suppress_context__ or chain.__cause__ else chain.__context__
    assert DIGITS not in str(error.public())
    for part in error.parts:
        assert DIGITS not in f"{part} {part.message} {part.public()}"


def rows(*cells: Mapping[str, str]) -> str:
    """A CSV whose rows are the good row with some cells replaced, and ids of their own."""
    lines = [HEADER]
    for number, changed in enumerate(cells, 1):
        made = dict(zip(COLUMNS, ROW.split(","), strict=True)) | {"id": f"p{number}"} | dict(changed)
        lines.append(",".join(made.values()))
    return "\n".join(lines) + "\n"


def same(one: Table, other: Table) -> None:
    assert list(one.columns) == list(other.columns)
    for name in one.columns:
        a, b = one[name], other[name]
        assert a.dtype == b.dtype
        if a.dtype == np.float64:
            assert a.view(np.int64).tolist() == b.view(np.int64).tolist() or np.array_equal(a, b, equal_nan=True)
            known = ~np.isnan(b)
            assert a[known].tobytes() == b[known].tobytes()  # bit by bit, the sign of zero included
        else:
            assert a.astype(str).tolist() == b.astype(str).tolist()
