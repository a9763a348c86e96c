"""Text and ids in one notation."""

from __future__ import annotations

from typing import Any

import pytest

COLUMNS = {"id": {"dtype": "text"}, "k": {"dtype": "text"}}


@pytest.mark.parametrize(
    ("cell", "options", "text"),
    [
        ("  a \t b  ", {}, "a b"),
        ("　病人　甲 ", {}, "病人 甲"),
        ("ＡＢ１２", {"width": "half"}, "AB12"),
        ("Abc", {"case": "upper"}, "ABC"),
        ("Abc", {"case": "lower"}, "abc"),
        ("00120", {"strip_zeros": True}, "120"),
        ("000", {"strip_zeros": True}, "0"),
        ("12", {"pad": 5}, "00012"),
        ("123456", {"pad": 5}, "123456"),
        ("007", {"strip_zeros": True, "pad": 2}, "07"),
        ("AB-12.3", {"remove": "-."}, "AB123"),
        ("--", {"remove": "-"}, None),
        ("００７", {"width": "half", "strip_zeros": True}, "7"),
        ("", {"pad": 3}, None),
    ],
)
def test_text(clean: Any, cell: str, options: dict[str, Any], text: str | None) -> None:
    table = clean([{"step": "text", "columns": "id", **options}], COLUMNS, [["id", "k"], [cell, " Keep "]])
    assert table["id"].tolist() == [text]
    assert table["k"].tolist() == ["Keep"]


def test_ids_of_two_sites_meet(clean: Any) -> None:
    step = {"step": "text", "columns": ["id"], "width": "half", "remove": " -", "case": "upper", "pad": 6}
    assert clean([step], COLUMNS, [["id", "k"], ["ab-12", ""], ["ＡＢ　１２", ""]])["id"].tolist() == ["00AB12"] * 2
