"""What correlations tell of few people: nothing; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.disclosure import Rule
from atoll.contract.errors import DisclosureError, PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.runtime.policy import Policy
from atoll.statistics.pairs import largest_of_pairs

from .correlated import COLUMNS, NAN, correlation, site

# ---------------------------------------------------------------- small groups


def pair(federation: Any, x: Any, y: Any) -> Any:
    columns = {"x": {"range": [0, 100]}, "y": {"range": [0, 100]}}
    return federation.table({"x": np.asarray(x, float), "y": np.asarray(y, float)}, columns)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize("common", [3, 27])
def test_pairs_of_which_a_difference_tells_a_few_rows_are_withheld(
    federation: Any, drive: Any, common: int, method: str
) -> None:
    """3 rows have both columns; or 27 of the 30 with x have y, and Σx of the other 3 would be the difference."""
    random = np.random.default_rng(8)
    x, y = random.uniform(0, 100, (2, 30))
    y[common:] = NAN
    tables = {
        "a": pair(federation, x, np.where(np.arange(30) < 27, y, NAN)),
        "b": pair(federation, *random.uniform(0, 100, (2, 30))),
    }
    found = correlation(drive, tables, Rule(5), method=method)
    assert found["matrix"][0][1] is None
    assert found["pairs_count"][0][1] is None
    assert found["matrix"][0][0] == 1
    assert "x-y" in found["notes"][-1]
    if common == 27:
        assert correlation(drive, tables, Rule(5), method=method, missing="listwise")["matrix"][0][1] is None


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize("reveals", [True, False])
def test_complete_rows_are_not_told_beside_a_few_others(
    federation: Any, drive: Any, method: str, reveals: bool
) -> None:
    """One has x and not y: the sum of all x, which other programs tell, less that of complete rows would be his."""
    x, y = np.random.default_rng(8).uniform(0, 100, (2, 60))
    y[0] = NAN
    tables = {"a": pair(federation, x[:30], y[:30]), "b": pair(federation, x[30:], y[30:])}
    made = build("statistics.correlation", {"missing": "listwise", "method": method})
    steps = made.coordinate(Cohort(tuple(tables), tables["a"].schema, 0, 5))
    driven = drive(steps, tables, rule=Rule(5 if reveals else 1))
    found = driven.result["correlation"]
    assert found["matrix"] == found["pairs_count"] == [[None, None], [None, None]]
    assert found.get("mean", [None, None]) == [None, None]
    assert "withheld" in found["notes"][0]
    if reveals:
        for replies in driven.replies:
            assert not any(array.any() for name, array in replies["a"].items() if name != "left_out")
    y[1:5] = NAN
    tables["a"] = pair(federation, x[:30], y[:30])
    assert correlation(drive, tables, Rule(5), missing="listwise", method=method)["pairs_count"][0][1] == 55


def test_what_few_people_dominate_is_withheld_with_its_pairs(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(8)
    percent, other, wide = random.uniform(0, 100, (3, 50))
    wide[7] = 1e6
    data = {"percent": percent, "loose": other, "wide": wide}
    table = federation.table(data, {name: COLUMNS[name] for name in data})
    rule, cohort = Rule(5, 1, 0.85), Cohort(("a",), table.schema, 0, 5)
    driven = drive(build("statistics.correlation", {}).coordinate(cohort), {"a": table}, rule=rule)
    found = driven.result["correlation"]
    assert found["mean"] == pytest.approx([percent.mean(), other.mean(), None])
    assert found["matrix"][0][1] == pytest.approx(np.corrcoef(percent, other)[0, 1], rel=1e-9)
    assert (found["matrix"][2], found["matrix"][0][2], found["matrix"][1][2]) == ([None] * 3, None, None)
    assert not driven.replies[0]["a"]["s1"][2]
    sums = driven.replies[-1]["a"]["sums"]
    assert not sums[2].any()
    assert not sums[:, 2].any()
    for asked in ("pca", "vif"):
        told = drive(build(f"statistics.{asked}", {}).coordinate(cohort), {"a": table}, rule=rule).result[asked]
        assert "wide" in told["notes"][0]
        assert not (told["loadings"] if asked == "pca" else told["columns"]["loose"]["r_squared"])
    ranked = correlation(drive, {"a": table}, rule, method="spearman")
    assert ranked["matrix"][0][2] is not None


def test_a_column_may_be_dominated_in_a_pairs_rows_only(federation: Any, drive: Any) -> None:
    x, y = np.random.default_rng(8).uniform(1, 2, (2, 50))
    x[:10], x[10], y[:10] = 90, 95, NAN
    table = pair(federation, x, y)
    assert correlation(drive, {"a": table}, Rule(5, 1, 0.5))["matrix"] == [[1, None], [None, 1]]
    assert correlation(drive, {"a": table}, Rule(5, 1, 0.7))["matrix"][0][1] is not None


@pytest.mark.parametrize("near", [3, 64, 500])
def test_each_pairs_largest_are_found(near: int) -> None:
    random = np.random.default_rng(3)
    sizes, known = random.gamma(1, 1, (3, 400)), random.random((400, 3)) < [1, 0.7, 0.01]
    sizes = np.where(known.T, sizes, 0)
    found = np.sort(largest_of_pairs(sizes, known, near).reshape(3, 3, -1)[..., :3], axis=-1)
    for i, j in np.ndindex(3, 3):
        assert found[i, j].tolist() == np.sort(sizes[i] * known[:, j])[-3:].tolist()


def test_a_site_with_few_complete_rows_is_refused(federation: Any) -> None:
    random = np.random.default_rng(9)
    x, y = random.uniform(0, 100, (2, 30))
    tables = {"a": pair(federation, x, y), "b": pair(federation, x, np.where(np.arange(30) < 3, y, NAN))}
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    plan = federation.plan("statistics.correlation", {"missing": "listwise"}, tables)
    with pytest.raises(DisclosureError) as caught:
        federation.run(plan, tables, {"b": strict})
    assert (caught.value.code, caught.value.field) == ("disclosure.small-group", "rows")


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), rows=st.integers(5, 60), smallest=st.integers(2, 7))
def test_histograms_show_no_small_group(federation: Any, drive: Any, seed: int, rows: int, smallest: int) -> None:
    """Nor do differences of the histograms of all refinements together."""
    random = np.random.default_rng(seed)
    table = pair(federation, random.gamma(1, 3, rows).clip(0, 100), np.round(random.uniform(0, 100, rows)))
    params = {"method": "spearman", "bins": 16, "refinements": 3}
    steps = build("statistics.correlation", params).coordinate(Cohort(("a",), table.schema, 0, smallest))
    driven = drive(steps, {"a": table}, rule=Rule(smallest))
    for i in range(2):
        levels = {0}
        for asked, replies in zip(driven.rounds, driven.replies, strict=True):
            if asked.name == "histogram":
                levels |= set(np.cumsum(replies["a"]["histogram"][i]).tolist())
        if rows >= smallest:
            assert (np.diff(sorted(levels)) >= smallest).all()
        else:
            assert levels == {0}


def test_made_up_counts_do_not_single_out_a_row(federation: Any, drive: Any) -> None:
    """A gap of a billion ranks below the one largest x, asked of a site that others see alone: the answer is
    the same whichever of the five largest x has the outstanding y."""
    x, answers = np.arange(40.0), []
    for place in (37, 39):
        y = np.full(40, 10.0) + np.arange(40) % 2
        y[place] = 90
        table = pair(federation, x, y)
        made = build("statistics.correlation", {"method": "spearman", "bins": 128, "refinements": 0})
        driven = drive(made.coordinate(Cohort(("a",), table.schema, 0, 5)), {"a": table}, rule=Rule(5))
        counts = driven.rounds[-1].send["counts"].copy()
        counts[0, np.searchsorted(driven.rounds[0].send["edges"][0], 38.5)] = 1e9
        desk = _Desk(table)
        edges = driven.rounds[0].send["edges"]
        asks = {"histogram": {"edges": edges}, "rank_products": {"counts": counts, "edges": edges}}
        for name, send in asks.items():
            task = Task(TaskId("0" * 32, 0, 0, "reply", "a"), send, (0,))
            reply = type(made).handlers[name].answer(made, desk, task)
        answers.append(reply["sums"][0, 1, 0])
    assert answers[0] == pytest.approx(answers[1], rel=1e-9)


class _Desk:
    min_group_size = 5

    def __init__(self, table: Any) -> None:
        self.table, self.state = table, {}

    def progress(self, done: float, total: float) -> None:
        """Nobody watches."""


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("column", ["text", "none"])
def test_columns_without_numbers_are_refused(federation: Any, column: str) -> None:
    tables = {"a": site(federation, np.random.default_rng(1), 9)}
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.correlation", {"columns": ["wide", column]}, tables), tables)
    assert (caught.value.code, caught.value.field) == ("plan.bad-column", column)


@pytest.mark.parametrize(
    ("name", "send"),
    [
        ("moments", {"center": np.zeros((30, 2)), "scale": np.ones(2)}),
        ("moments", {"center": np.zeros(2), "scale": np.zeros(2)}),
        ("products", {"center": np.full(2, math.inf), "scale": np.ones(2)}),
        ("products", {"center": np.zeros(2), "scale": -np.ones(2)}),
        ("histogram", {"edges": np.zeros((2, 5))}),
        ("rank_products", {"counts": np.ones((2, 2048)), "edges": np.ones((2, 2048))}),
    ],
)
def test_crafted_arrays_are_refused(federation: Any, name: str, send: dict[str, Any]) -> None:
    made, table = build("statistics.correlation", {}), pair(federation, np.arange(30), np.arange(30))
    task = Task(TaskId("0" * 32, 0, 0, "reply", "a"), send, (0,))
    with pytest.raises(ProtocolError) as caught:
        type(made).handlers[name].answer(made, _Desk(table), task)
    assert caught.value.code == "task.array"
