"""Ratios of two columns, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table

STEP: dict[str, Any] = {"step": "ratio", "columns": {"growth": ["now", "usual"]}, "plus": 0.5}
COUNT = Column(range=(0, 100))
CELLS = st.lists(st.tuples(*[st.floats(0, 100) | st.just(float("nan"))] * 2), min_size=1, max_size=20)


def made(prepare: Any, now: list[float], usual: list[float], above: Column = COUNT, **more: Any) -> Table:
    schema = TableSchema(name="t", columns={"now": above, "usual": COUNT})
    table = Table(schema, {"now": np.array(now, float), "usual": np.array(usual, float)})
    found: Table = prepare([{**STEP, **more}], {"a": table})["a"]
    return found


@settings(max_examples=15, deadline=None)
@given(CELLS, st.booleans())
def test_it_is_the_ratio_or_its_logarithm(prepare: Any, cells: list[tuple[float, float]], log: bool) -> None:
    now, usual = (list(column) for column in zip(*cells, strict=True))
    ratio = (np.array(now) + 0.5) / (np.array(usual) + 0.5)
    found = made(prepare, now, usual, log=log)
    np.testing.assert_allclose(found["growth"], np.log(ratio) if log else ratio, rtol=1e-12, atol=1e-12)
    ends = np.array([0.5 / 100.5, 100.5 / 0.5])
    np.testing.assert_allclose(found.schema.columns["growth"].bounds(), np.log(ends) if log else ends)


def test_a_ratio_of_a_label_is_a_label(prepare: Any) -> None:
    label = COUNT.model_copy(update={"role": "label", "missing": "forbid"})
    column = made(prepare, [1.0], [1.0], label).schema.columns["growth"]
    assert (column.role, column.missing) == ("label", "allow"), "missing where what it is compared with is"


def test_what_may_be_zero_or_less_divides_nothing(prepare: Any) -> None:
    for above, plus in ((COUNT, 0.0), (Column(range=(-1, 1)), 0.5)):
        with pytest.raises(PlanError) as caught:
            made(prepare, [1.0], [1.0], above, plus=plus)
        assert caught.value.code == "recipe.ratio-range"


def test_names_are_free(prepare: Any) -> None:
    with pytest.raises(PlanError) as caught:
        made(prepare, [1.0], [1.0], columns={"now": ["now", "usual"]})
    assert caught.value.code == "recipe.column-exists"
