"""Text files in other encodings and compressions: the same table, or an error that says what to set."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

COLUMNS = {"name": {"dtype": "text"}, "city": {"dtype": "text"}, "weight": {"range": [0, 300]}}
ROWS = [("张伟", "上海", "70.5"), ("李娜", "联通", "55"), ("王芳", "", "61"), ("plain", "A", "62")]
CANARY = "7731977.31"


def text(rows: list[tuple[str, str, str]] = ROWS, end: str = "\n") -> str:
    return "".join(",".join(row) + end for row in [tuple(COLUMNS), *rows])


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "GB2312", "utf-16", "utf-16-le", "big5"])
def test_every_encoding_gives_the_same_table(
    tmp_path: Path, read_table: Any, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    rows = [tuple(cell.replace("张伟", "李四").replace("联通", "北京") for cell in row) for row in ROWS]
    (tmp_path / "t.csv").write_bytes(pack(text(rows).replace("娜", "上").encode(encoding)))  # type: ignore[arg-type]
    table = read_table(COLUMNS, path="t.csv", encoding=encoding.replace("-sig", ""))
    assert table["name"].tolist() == ["李四", "李上", "王芳", "plain"]
    assert table["city"].tolist() == ["上海", "北京", None, "A"]
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.startswith("spool-")]


def test_latin_text(tmp_path: Path, read_table: Any) -> None:
    (tmp_path / "t.csv").write_bytes(text([("Müller", "Orléans", "70")]).encode("latin-1"))
    assert read_table(COLUMNS, path="t.csv", encoding="latin-1")["name"].tolist() == ["Müller"]


def test_a_gbk_line_that_happens_to_be_utf8_is_no_stranger(tmp_path: Path, read_table: Any) -> None:
    """The two bytes of each character of 联通 are, as it happens, also UTF-8."""
    (tmp_path / "t.csv").write_bytes(text([*ROWS, ("x", "联通", "1")]).encode("gbk"))
    assert read_table(COLUMNS, path="t.csv", encoding="gbk")["city"].tolist()[-1] == "联通"


@pytest.mark.parametrize(
    ("written", "said", "likely"),
    [
        ("gb18030", "utf-8", "gb18030"),
        ("utf-8", "gb18030", "utf-8"),
        ("utf-8", "latin-1", "utf-8"),
        ("utf-16", "utf-8", "utf-16"),
        ("utf-16", "gbk", "utf-16"),
        ("big5", "utf-8", "big5"),
        ("gb18030", "ascii", "gb18030"),
    ],
)
def test_a_wrong_encoding_is_told_with_a_likely_one(
    tmp_path: Path, refused: Any, written: str, said: str, likely: str
) -> None:
    rows = [("臺灣大學的學生", "繁體中文資料表", "70")] * 3 if written == "big5" else ROWS
    (tmp_path / "t.csv").write_bytes(text([*rows, (f"中文{CANARY}", "", "1")]).encode(written))
    error = refused(COLUMNS, path="t.csv", encoding=said)
    assert (error.code, error.field) == ("source.encoding", "encoding")
    assert likely in error.remedy


@pytest.mark.parametrize("first", ["utf-8", "gb18030"])
@pytest.mark.parametrize("said", ["utf-8", "gb18030"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_two_encodings_in_one_file_are_refused_with_the_line(
    tmp_path: Path, refused: Any, first: str, said: str, pack: Callable[[bytes], bytes]
) -> None:
    other = "gb18030" if first == "utf-8" else "utf-8"
    data = text().encode(first) + f"赵敏{CANARY},重庆市区,7\n".encode(other)
    (tmp_path / "t.csv").write_bytes(pack(data))
    error = refused(COLUMNS, path="t.csv", encoding=said)
    assert error.code == "source.encoding"
    assert f"line {6 if said == first else 2} " in error.message


def test_unknown_encodings_and_damaged_archives(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "t.csv").write_text(text())
    assert refused(COLUMNS, path="t.csv", encoding="klingon").code == "source.encoding"
    assert refused(COLUMNS, path="t.csv", encoding="base64").code == "source.encoding"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text().encode() * 99)[:-30])
    assert refused(COLUMNS, path="t.csv.gz").code == "source.unreadable"
    (tmp_path / "t.csv.zst").write_bytes(zstd(text().encode() * 99)[:-30])
    assert refused(COLUMNS, path="t.csv.zst").code == "source.unreadable"


def test_mixed_line_ends_tabs_and_padded_headers(tmp_path: Path, read_table: Any) -> None:
    data = text().replace("name,", " name ,").encode().replace(b"\n", b"\r\n", 2)
    (tmp_path / "t.csv").write_bytes(data)
    assert len(read_table(COLUMNS, path="t.csv")) == 4
    (tmp_path / "t.tsv").write_text(text().replace(",", "\t"))
    assert len(read_table(COLUMNS, path="t.tsv")) == 4


def test_quotes_that_do_not_close(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "t.csv").write_text(text([("a", "b", "1"), ('"open', CANARY, "2"), ("c", "d", "3")]))
    error = refused(COLUMNS, path="t.csv")
    assert error.code == "source.quotes"
    assert "line 3" in error.message
