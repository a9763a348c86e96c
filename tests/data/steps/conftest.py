"""Steps on real files and real tables: ``clean`` reads a CSV, ``prepare`` fits on several sites as the runtime does."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.disclosure import Rule
from atoll.contract.errors import AtollError
from atoll.contract.plan import Recipe
from atoll.contract.program import Cohort, build
from atoll.contract.schema import Column, TableSchema
from atoll.data.check import checked
from atoll.data.engine import Engine
from atoll.data.recipe import Prepared
from atoll.data.sources import SourceSpec, known_columns, open_source
from atoll.data.table import Table

from .irregular import stream as stream

DTYPES = {"date": "datetime64[D]", "datetime": "datetime64[us]", "text": object, "image": np.uint8}


def schema_of(columns: Mapping[str, Any], **more: Any) -> TableSchema:
    return TableSchema(name="test", columns={name: Column(**column) for name, column in columns.items()}, **more)


@pytest.fixture
def clean(tmp_path: Path) -> Callable[..., Table]:
    """clean(steps, columns, rows, **source): a CSV of *rows* (first: the names), cleaned and checked."""

    def read(steps: Sequence[Any], columns: Mapping[str, Any], rows: Sequence[Sequence[Any]], **spec: Any) -> Table:
        with (tmp_path / "table.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        source, schema = SourceSpec(path="table.csv", **spec), schema_of(columns)
        frame = open_source(source, schema, tmp_path, Engine())
        frame = Prepared(Recipe(clean=tuple(steps))).cleaned(frame)
        return checked(known_columns(frame, source)).to_table()

    return read


@pytest.fixture
def prepare(drive: Any) -> Callable[..., dict[str, Table]]:
    """prepare(steps, tables, smallest=1): the recipe fitted over all *tables*' rows and applied at each."""

    def fitted(steps: Sequence[Any], tables: Mapping[str, Table], smallest: int = 1) -> dict[str, Table]:
        recipe = Prepared(Recipe(steps=tuple(steps)))
        schema = next(iter(tables.values())).schema
        view: dict[str, Any] = {}
        for stage in recipe.stages():
            now = {name: recipe.apply(table, view) for name, table in tables.items()}
            cohort = Cohort(tuple(tables), recipe.before(stage, schema), 0, smallest)
            results = {}
            for need in recipe.needs(stage):
                program = build(need.program, {"columns": list(need.columns), **dict(need.options)})
                rule = Rule(min_group_size=smallest)
                results[need] = drive(program.coordinate(cohort), now, rule=rule).result
            view |= recipe.fit(stage, results)
            schema = recipe.schema(schema, stage)
        made = {name: recipe.apply(table, view) for name, table in tables.items()}
        for table in made.values():
            assert table.schema == schema
            _keeps(table)
        return made

    return fitted


def _keeps(table: Table) -> None:
    """Does a table keep what its schema says of it?"""
    assert list(table.columns) == [n for n, c in table.schema.columns.items() if c.role != "ignore"]
    for name, column in table.schema.columns.items():
        Column.model_validate(column.model_dump())
        cells = table[name]
        gone = np.array([cell is None for cell in cells], bool) if cells.dtype == object else np.array(cells != cells)
        if column.missing == "forbid" and cells.ndim == 1:
            assert not gone.any(), name
        if column.numeric:
            low, high = column.bounds()
            inside = cells[~gone]
            assert ((inside >= low - 1e-9 * abs(low)) & (inside <= high + 1e-9 * abs(high))).all(), name
            if column.dtype == "integer":
                assert (inside == np.floor(inside)).all(), name
        if column.values is not None:
            assert set(cells[~gone].tolist()) <= set(column.values), name


@pytest.fixture
def problems() -> Callable[..., list[AtollError]]:
    """problems(error, *canaries): what an error lists, after a look that no cell is in it."""

    def listed(error: AtollError, *canaries: str) -> list[AtollError]:
        for part in [error, *error.parts]:
            for canary in canaries:
                assert canary not in f"{part} {part.message} {part.public()}"
        return error.parts or [error]

    return listed


@pytest.fixture
def table_of() -> Callable[..., Table]:
    """table_of(data, columns, **schema): a table in memory."""

    def made(data: Mapping[str, Any], columns: Mapping[str, Any], **more: Any) -> Table:
        schema = schema_of(columns, **more)
        return Table(schema, {n: np.array(data[n], DTYPES.get(c.dtype, np.float64)) for n, c in schema.columns.items()})

    return made


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    """Equal cells, to twelve digits, missing ones included."""

    def equal(left: Any, right: Any) -> bool:
        left, right = np.asarray(left), np.asarray(right)
        if left.dtype.kind in "fi":
            right = right.astype(float)
            return left.shape == right.shape and bool(np.allclose(left, right, rtol=1e-12, atol=1e-12, equal_nan=True))
        if left.dtype.kind == "M":
            return bool(np.array_equal(left, right.astype(left.dtype), equal_nan=True))
        return bool(left.tolist() == right.tolist())

    return equal
