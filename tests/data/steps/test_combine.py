"""One column made of several, as text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError

DATE = {"born": {"dtype": "date"}}
TEXT = {"id": {"dtype": "text"}, "ward": {"dtype": "text"}}
COMBINE = {"step": "combine", "into": "born", "template": "{year}-{month}-{day}"}
CANARY = "7731977"


def test_a_date_of_its_parts(clean: Any) -> None:
    rows = [["year", "month", "day"], [1990, "05", "01"], ["2024", "2", "29"], [1990, "", "01"]]
    iso = {"step": "dates", "columns": ["born"], "formats": ["%Y-%m-%d"]}
    table = clean([COMBINE, iso], DATE, rows)
    assert table["born"].astype(str).tolist() == ["1990-05-01", "2024-02-29", "NaT"]
    assert list(table.columns) == ["born"]


def test_columns_of_the_contract_stay(clean: Any) -> None:
    step = {"step": "combine", "into": "id", "template": "{ward}/{number}"}
    table = clean([step], TEXT, [["ward", "number"], ["n", 1], ["s", ""], ["", 3]])
    assert table["id"].tolist() == ["n/1", None, None]
    assert table["ward"].tolist() == ["n", "s", None]


def test_a_column_may_be_made_of_itself(clean: Any) -> None:
    step = {"step": "combine", "into": "id", "template": "A{id}Z"}
    assert clean([step], TEXT, [["id", "ward"], ["1", "n"]])["id"].tolist() == ["A1Z"]


cells = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=5), st.sampled_from(["{ward}{b}", "{b}", "é'{b}\" {ward}!"])
)
def test_the_template_is_filled_in(clean: Any, rows: list[tuple[str, str]], template: str) -> None:
    step = {"step": "combine", "into": "id", "template": template}
    table = clean([step], TEXT, [["ward", "b"], *rows])
    assert table["id"].tolist() == [template.format(ward=a.strip(), b=b.strip()) for a, b in rows]


def test_all_missing(clean: Any) -> None:
    table = clean([COMBINE], {**DATE, "x": {"range": [0, 9]}}, [["year", "month", "day", "x"], ["", "", "", 1]])
    assert table["born"].astype(str).tolist() == ["NaT"]


def test_a_part_that_is_not_there(clean: Any) -> None:
    with pytest.raises(PlanError) as caught:
        clean([COMBINE], DATE, [["year", "month"], [CANARY, "2"]])
    assert (caught.value.code, caught.value.field) == ("recipe.no-column", "day")
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("template", ["", "year", "{}", 3])
def test_a_template_names_columns(clean: Any, template: Any) -> None:
    with pytest.raises(PlanError):
        clean([{**COMBINE, "template": template}], DATE, [["year"], [1]])
