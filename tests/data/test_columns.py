"""Columns in files are what columns in memory are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from atoll.contract.errors import SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data import columns as stored_columns
from atoll.data.columns import Stored, to_array
from atoll.data.engine import Engine
from atoll.data.frame import ROW, Frame
from atoll.data.table import Table

NAN = float("nan")
COLUMNS: dict[str, Any] = {
    "x": {"range": [-10, 10]},
    "code": {"dtype": "text", "values": ["a", "b", "ä"]},
    "level": {"dtype": "integer", "values": [1, 2]},
    "note": {"dtype": "text"},
    "day": {"dtype": "date"},
    "at": {"dtype": "datetime"},
    "scan": {"dtype": "image", "shape": [2, 3]},
}


def table(n: int) -> Table:
    random = np.random.default_rng(4)
    schema = TableSchema(name="t", columns={name: Column(**column) for name, column in COLUMNS.items()})
    days = np.datetime64("2024-02-28") + np.arange(n) % 9
    made: dict[str, Any] = {
        "x": np.where(random.random(n) < 0.2, NAN, random.normal(0, 3, n).clip(-10, 10)),
        "code": random.choice(np.array(["a", "b", "ä", None], object), n),
        "level": random.choice([1.0, 2.0, NAN], n),
        "note": np.array([None if i % 7 == 0 else f"note {i} – 注" for i in range(n)], object),
        "day": np.where(np.arange(n) % 5 == 0, np.datetime64("NaT"), days).astype("datetime64[D]"),
        "at": (np.datetime64("2024-01-01T00:00:00.000001") + np.arange(n).astype("timedelta64[s]")).astype("M8[us]"),
        "scan": random.integers(0, 256, (n, 2, 3)).astype(np.uint8),
    }
    return Table(schema, made, random.random(n) < 0.3)


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_columns, "IN_MEMORY_BYTES", 0)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("n", [1, 2000])
def test_files_hold_what_memory_holds(small_memory: None, n: int, ordered: bool) -> None:
    wanted = table(n)
    engine = Engine()
    frame = Frame.of(wanted, engine)
    if not ordered:
        frame = Frame(engine, frame.table.order_by(frame.table[ROW].desc()), frame.schema, ordered=False)
    found = frame.to_table()
    assert isinstance(found.columns, Stored)
    assert list(found.columns) == list(wanted.columns)
    assert len(found) == n
    for part, other in zip((found, *found.parts()), (wanted, *wanted.parts()), strict=True):
        for name in COLUMNS:
            assert part[name].dtype == other[name].dtype, name
            if other[name].dtype == object:
                assert part[name].tolist() == other[name].tolist()
            else:
                assert np.array_equal(part[name], other[name], equal_nan=other[name].dtype.kind in "fM")
        for name in ("code", "level"):
            assert np.array_equal(part.codes(name), other.codes(name))
        assert np.array_equal(part.ids, other.ids)
        for batch, same in zip(part.batches(("level",), 7), other.batches(("level",), 7), strict=True):
            assert np.array_equal(batch, same, equal_nan=True)


def test_only_what_is_looked_at_is_computed_and_only_its_owner_may_read_it(small_memory: None) -> None:
    engine = Engine()
    found = Frame.of(table(50), engine).to_table()
    before = set(engine.folder.rglob("*.column"))
    found["x"]
    (made,) = set(engine.folder.rglob("*.column")) - before
    assert made.stat().st_mode & 0o777 == 0o600
    assert made.parent.stat().st_mode & 0o777 == engine.folder.stat().st_mode & 0o777 == 0o700


def test_files_are_gone_with_their_table(small_memory: None) -> None:
    engine = Engine()
    folder: Path = engine.folder
    found = Frame.of(table(50), engine).to_table()
    del engine
    assert len(found["x"]) == 50
    assert folder.is_dir()
    del found
    assert not folder.exists()


def test_a_missing_image_is_black_where_the_schema_allows_it() -> None:
    cells = pa.array([bytes(range(6)), None], pa.binary())
    column = Column(**COLUMNS["scan"])
    assert to_array(cells, column).tolist() == [[[0, 1, 2], [3, 4, 5]], [[0, 0, 0], [0, 0, 0]]]
    for odd, declared in ((cells, column.model_copy(update={"missing": "forbid"})), (pa.array([b"123"]), column)):
        with pytest.raises(SchemaError) as caught:
            to_array(odd, declared)
        assert caught.value.code == "schema.image-shape"
