"""Disclosure control: what is withheld cannot be had by subtracting, and what is not withheld is untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.disclosure import TOP, Cells, Rule, judged, largest, suppress
from atoll.contract.errors import ProtocolError

counts_1d = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(np.array)
counts_2d = st.integers(1, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 30), min_size=width, max_size=width), min_size=1, max_size=6
    ).map(np.array)
)  # fmt: skip


def lines_of(counts: np.ndarray, hidden: np.ndarray, axis: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rows, marks = (np.moveaxis(array, axis, -1).reshape(-1, counts.shape[axis]) for array in (counts, hidden))
    return list(zip(rows, marks, strict=True))


@given(counts=counts_2d, k=st.integers(1, 10))
def test_a_withheld_cell_cannot_be_had_from_its_lines_totals(counts: np.ndarray, k: int) -> None:
    hidden = suppress(counts, np.zeros(counts.shape, bool), k, (0, 1))
    assert not (~hidden & (counts > 0) & (counts < k)).any()
    for axis in (0, 1):
        for row, marks in lines_of(counts, hidden, axis):
            if marks.any() and (row[~marks] > 0).any():  # else the whole line is withheld
                assert row[marks].sum() >= k
                assert ((row > 0) & marks).sum() >= 2


@given(counts=counts_1d, k=st.integers(1, 10))
def test_nothing_is_withheld_without_need(counts: np.ndarray, k: int) -> None:
    nothing = np.zeros(counts.shape, bool)
    alone = suppress(counts, nothing, k)
    assert np.array_equal(alone, (counts > 0) & (counts < k))
    if not alone.any():
        assert not suppress(counts, nothing, k, (0,)).any()


@given(
    values=st.lists(st.one_of(st.floats(-100, 100), st.just(float("nan"))), max_size=40).map(np.array),
    data=st.data(),
)
def test_the_largest_contributions_of_each_cell(values: np.ndarray, data: Any) -> None:
    values = values.astype(float)
    size = data.draw(st.integers(1, 4))
    cell = np.array(data.draw(st.lists(st.integers(-1, size - 1), min_size=len(values), max_size=len(values))), int)
    found = largest(values, cell, size)
    for i in range(size):
        inside = np.abs(values[(cell == i) & ~np.isnan(values)])
        best = np.sort(inside)[::-1][:TOP]
        assert found[i, : len(best)].tolist() == best.tolist()
        assert not found[i, len(best) : TOP].any()
        assert found[i, TOP] == pytest.approx(inside.sum())
    whole = largest(values)
    assert whole[0, :TOP].tolist() == largest(values, np.zeros(len(values), int), 1)[0, :TOP].tolist()


TABLE = Cells("n", "withheld", ("sum",), (0,), "top")


def reply(n: list[int], total: list[float], top: list[list[float]]) -> dict[str, Any]:
    return {"n": np.array(n), "sum": np.array(total), "top": np.array(top)}


def test_a_small_group_is_withheld_with_its_complement() -> None:
    told = judged(reply([3, 9, 40, 0], [1.0, 2, 3, 0], [[0] * 4] * 4), [TABLE], Rule(5))
    assert told["withheld"].tolist() == [1, 1, 0, 0]  # 9 could be subtracted from the line's total: the 3 would show
    assert told["n"].tolist() == [0, 0, 40, 0]
    assert told["sum"].tolist() == [0, 0, 3, 0]
    assert "top" not in told


def test_a_dominated_total_is_withheld() -> None:
    alone = Cells("n", "withheld", ("sum",), (), "top")
    given = reply([20, 20], [100.0, 100.0], [[90, 2, 1, 100], [40, 30, 5, 100]])
    assert judged(given, [alone], Rule(5, 1, 0.85))["withheld"].tolist() == [1, 0]
    assert judged(given, [alone], Rule(5, 2, 0.65))["withheld"].tolist() == [1, 1]
    assert judged(given, [alone], Rule(5))["withheld"].tolist() == [0, 0]


def test_without_a_rule_nothing_is_withheld_and_nothing_internal_is_told() -> None:
    given = reply([1, 0], [5.0, 0], [[5, 0, 0, 5], [0] * 4])
    told = judged(given, [TABLE], Rule())
    assert set(told) == {"n", "sum", "withheld"}
    assert told["n"].tolist() == [1, 0]
    assert not told["withheld"].any()
    assert given["top"].shape == (2, 4)


def test_a_handler_must_give_what_its_cells_are_judged_by() -> None:
    with pytest.raises(ProtocolError) as caught:
        judged({"n": np.ones(2)}, [TABLE], Rule(5))
    assert (caught.value.code, caught.value.field) == ("reply.missing", "top")


def test_the_cohorts_total_is_judged_by_the_same_rule() -> None:
    total = {"n": np.array([4, 11, 60]), "withheld": np.array([0, 0, 0])}
    assert TABLE.hidden(total, 5).tolist() == [True, True, False]
    partly = {"n": np.array([30, 2, 0, 9]), "withheld": np.array([0, 1, 1, 0])}
    assert TABLE.hidden(partly, 5).tolist() == [False, True, True, False]
    assert TABLE.hidden(total, 1).tolist() == [False, False, False]


def test_a_withheld_total_is_not_dominated_either() -> None:
    """A is shown, and the line's total known: B and C together would tell B's largest value."""
    table = Cells("n", "withheld", ("sum",), (0,), "top")
    top = np.array([[19.0, 19, 19, 15_000], [990, 0.3, 0.3, 1000], [0.1, 0.1, 0.1, 0.5]])
    given = {"n": np.array([1000, 50, 6]), "sum": top[:, 3].copy(), "top": top}
    assert judged(given, [table], Rule(5, 2, 0.85))["withheld"].tolist() == [1, 1, 1]


def test_a_cell_that_its_parent_took_along_is_counted_for_the_complement() -> None:
    """Of x, group B has no value at all: hiding B beside A hides nothing."""
    parent, child = Cells("rows", "rows_withheld", ("count",), (0,)), Cells("count", "withheld", ("sum",), (0,))
    given = {"rows": np.array([1, 6, 100]), "count": np.array([1, 0, 100]), "sum": np.array([42.5, 0, 900])}
    told = judged(given, [parent, child], Rule(5))
    assert told["rows_withheld"].tolist() == [1, 1, 0]
    assert told["withheld"].tolist() == [1, 1, 1]
