"""JSON lines: one object a line; a key that a line does not have is a missing cell."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine, telling
from atoll.data.frame import ROW
from atoll.data.sources import SourceSpec, named, source
from atoll.data.sources.encoding import as_utf8, check_utf8, compression, opened

_LOOK = """
    SELECT count(*), count(*) FILTER (json_type(json) <> 'OBJECT'), first(json_keys(json)),
        list_sort(list_distinct(flatten(list(DISTINCT json_keys(json)))))
    FROM read_ndjson_objects(?, compression = ?)
"""


@source("jsonl", ".jsonl", ".ndjson")
def open_jsonl(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """All values as text: numbers as written, truth as 1 and 0, nested values as JSON."""
    with as_utf8(path, spec.encoding, engine) as plain:
        try:
            return _kept(plain, engine)
        except SchemaError as error:
            if error.code != "source.unreadable":
                raise
            check_utf8(plain)
            _refuse_bad_line(plain)
            raise


def _kept(path: Path, engine: Engine) -> ir.Table:
    file, packed = glob.escape(str(path)), compression(path).replace("none", "uncompressed")
    with telling():
        [(rows, odd, first, keys)] = engine.backend.con.cursor().execute(_LOOK, [file, packed]).fetchall()
    if not rows:
        raise SchemaError("source.empty", "the file is empty", field="path", remedy="check the site's source")
    if odd:
        _refuse_bad_line(path)
    names = named(list(dict.fromkeys([*(first or ()), *(keys or ())])))
    with telling():
        table = engine.backend.read_json(
            file, format="newline_delimited", auto_detect=False, columns=dict.fromkeys(names, "JSON"),
            compression=packed,
        )  # fmt: skip
    return engine.keep(table.select(**{name: _text(table[name]) for name in names}), number=ROW)


def _text(value: Any) -> ir.Value:
    json_text = value.cast("string")
    truth = {"true": "1", "false": "0"}
    return json_text.cases(*truth.items(), else_=ibis.coalesce(value.str, json_text))


def _refuse_bad_line(path: Path) -> None:
    """Raises SchemaError for the first line that is not an object."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                sound = not line.strip() or _is_object(json.loads(line, object_pairs_hook=_each_once))
            except (ValueError, RecursionError):
                sound = False
            if not sound:
                raise SchemaError(
                    "source.bad-line", f"line {number} is not one JSON object with each key once", field="path",
                    remedy="write one object a line; no arrays around them",
                )  # fmt: skip


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError
    return made
