"""JSON lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

COLUMNS = {"a/b": {"range": [0, 9]}, "t": {"dtype": "text"}, "ok": {"dtype": "integer", "values": [0, 1]}}
CANARY = "7731977.31"


def test_missing_keys_truth_and_odd_names(tmp_path: Path, read_table: Any) -> None:
    lines = [
        {"a/b": 0.30000000000000004, "t": "中\n文", "ok": True},
        {"t": "true", "ok": False},
        {"a/b": None, "t": ""},
        {"a/b": "7", "ok": 1},
    ]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    for name, data in {
        "t.jsonl": content.encode(),
        "b.ndjson": content.encode("utf-8-sig"),
        "g.jsonl": content.encode("gbk"),
        "t.jsonl.gz": gzip.compress(content.encode()),
    }.items():
        (tmp_path / name).write_bytes(data)
        table = read_table(COLUMNS, path=name, encoding="gbk" if name[0] == "g" else "utf-8")
        assert np.array_equal(table["a/b"], [0.30000000000000004, np.nan, np.nan, 7], equal_nan=True)
        assert table["t"].tolist() == ["中\n文", "true", None, None]
        assert np.array_equal(table["ok"], [1, 0, np.nan, 1], equal_nan=True)


@pytest.mark.parametrize(
    "bad", [f'{{"t": "{CANARY}"', f"[{CANARY}]", CANARY, f'{{"t": 1, "t": {CANARY}}}', f'{{"t": 1}} {{"t": {CANARY}}}']
)
def test_a_malformed_line_is_told_by_its_number(tmp_path: Path, refused: Any, bad: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"t": "a"}}\n\n{{"t": "b"}}\n{bad}\n{{"t": "c"}}\n')
    error = refused(COLUMNS, path="t.jsonl")
    assert error.code == "source.bad-line"
    assert "line 4 " in error.message


def test_empty_files_other_encodings_and_unknown_keys(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "t.jsonl").write_text("\n")
    assert refused(COLUMNS, path="t.jsonl").code == "source.empty"
    (tmp_path / "t.jsonl").write_bytes('{"t": "上海市浦东新区"}\n'.encode("gbk"))
    error = refused(COLUMNS, path="t.jsonl")
    assert error.code == "source.encoding"
    assert "gb18030" in error.remedy
    (tmp_path / "t.jsonl").write_text('{"a/b": 1, "t": "x", "ok": 0}\n{"more": 1}\n')
    assert refused(COLUMNS, path="t.jsonl").code == "schema.extra-column"
