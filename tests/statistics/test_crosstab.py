"""Cross-tables and chi-square tests equal pandas' and scipy's on the pooled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency
from scipy.stats.contingency import association

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "grade": {"dtype": "text", "values": ["a", "b", "c", "nobody"]},
    "sex": {"dtype": "integer", "values": [1, 0]},
    "ill": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "constant": {"dtype": "text", "values": ["x", "y"]},
    "empty": {"values": [1, 2]},
    "real": {"range": [0, 1]},
}
PAIRS = [["grade", "sex"], ["sex", "ill"], ["ill", "ill"], ["constant", "sex"], ["empty", "grade"]]


def sites(federation: Any, seed: int, sizes: list[int], holes: float = 0.1) -> dict[str, Any]:
    random, tables = np.random.default_rng(seed), {}
    for i, n in enumerate(sizes):
        grade = random.choice(["a", "b", "c"] if i else ["a", "b"], n).astype(object)
        grade[random.random(n) < holes] = None
        sex = random.choice([0.0, 1.0, NAN], n, p=[0.3, 0.6, 0.1])
        data = {
            "grade": grade,
            "sex": sex,
            "ill": (random.random(n) < np.where(sex == 1, 0.6, 0.3)).astype(float),
            "constant": ["y"] * n,
            "empty": np.full(n, NAN),
            "real": np.zeros(n),
        }
        tables[f"s{i}"] = federation.table(data, COLUMNS)
    return tables


def crosstab(drive: Any, tables: dict[str, Any], smallest: int = 1, at_sites: int = 1, **params: Any) -> Any:
    schema = next(iter(tables.values())).schema
    steps = build("statistics.crosstab", {"pairs": PAIRS, **params}).coordinate(
        Cohort(tuple(tables), schema, 0, smallest)
    )
    driven = drive(steps, tables, rule=Rule(at_sites))
    assert len(driven.rounds) == 1
    return driven.result["crosstab"]["tables"]


def frame(tables: dict[str, Any]) -> pd.DataFrame:
    rows = concatenate(list(tables.values()))
    return pd.DataFrame({name: rows[name] for name in COLUMNS})


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 9, 80, 400]), min_size=1, max_size=4),
    yates=st.booleans(),
)
def test_equals_scipy_on_pooled_rows(federation: Any, drive: Any, seed: int, sizes: list[int], yates: bool) -> None:
    tables = sites(federation, seed, sizes)
    rows = frame(tables)
    for (a, b), found in zip(PAIRS, crosstab(drive, tables, yates=yates), strict=True):
        wanted = [
            [int(((rows[a] == x) & (rows[b] == y)).sum()) for y in COLUMNS[b]["values"]] for x in COLUMNS[a]["values"]
        ]
        assert found["counts"] == wanted
        assert (found["row_values"], found["column_values"]) == (COLUMNS[a]["values"], COLUMNS[b]["values"])
        seen = np.array(wanted)
        seen = seen[seen.any(axis=1)][:, seen.any(axis=0)]
        if not seen.size:
            assert found["test"] is None
            assert "no row" in found["note"]
            continue
        test, scipys = found["test"], chi2_contingency(seen, correction=yates)
        assert test["statistic"] == pytest.approx(scipys.statistic, rel=1e-9)
        assert test["p_value"] == pytest.approx(scipys.pvalue, rel=1e-9)
        assert test["dof"] == scipys.dof
        assert np.array(test["expected"]) == pytest.approx(scipys.expected_freq, rel=1e-9)
        if min(seen.shape) > 1:
            assert test["cramers_v"] == pytest.approx(association(seen, method="cramer"), rel=1e-9, abs=1e-9)
        else:
            assert test["cramers_v"] is None
        assert ("below 5" in found["note"]) == (scipys.expected_freq < 5).any()


def test_the_published_example_of_two_by_two(federation: Any, drive: Any) -> None:
    """Aspirin and myocardial infarction (Agresti 2007, table 2.3): X² = 25.0 on one degree of freedom."""
    cells = {(0, 1): 189, (0, 0): 10_845, (1, 1): 104, (1, 0): 10_933}
    rows = np.array([pair for pair, n in cells.items() for _ in range(n)], float)
    columns = {"group": {"values": [0, 1]}, "attack": {"values": [1, 0]}}
    tables = {
        "a": federation.table({"group": rows[::3, 0], "attack": rows[::3, 1]}, columns),
        "b": federation.table({"group": rows[1::3, 0], "attack": rows[1::3, 1]}, columns),
        "c": federation.table({"group": rows[2::3, 0], "attack": rows[2::3, 1]}, columns),
    }
    found = crosstab(drive, tables, pairs=[["group", "attack"]])[0]
    assert found["counts"] == [[189, 10_845], [104, 10_933]]
    assert found["test"]["statistic"] == pytest.approx(25.0, abs=0.05)
    assert found["test"]["dof"] == 1


# ---------------------------------------------------------------- small groups


@pytest.mark.parametrize("at_sites", [1, 5])
def test_with_a_small_cell_its_complement_is_withheld_and_nothing_is_tested(
    federation: Any, drive: Any, at_sites: int
) -> None:
    columns = {"r": {"values": [0, 1, 2]}, "c": {"values": [0, 1, 2]}}
    counts = np.array([[2, 30, 40], [25, 35, 45], [50, 60, 70]])
    cells = np.argwhere(np.ones((3, 3))).repeat(counts.ravel(), axis=0).astype(float)
    table = federation.table({"r": cells[:, 0], "c": cells[:, 1]}, columns)
    found = crosstab(drive, {"a": table}, 5, at_sites, pairs=[["r", "c"]])[0]
    assert found["test"] is None
    assert "withheld" in found["note"]
    hidden = np.array([[cell is None for cell in row] for row in found["counts"]])
    assert hidden[0, 0]
    for axis in (0, 1):  # no line has a single hidden cell, which subtracting would tell
        lines = hidden.sum(axis=axis)
        assert (lines[lines > 0] >= 2).all()
    for cell, wanted in zip(np.array(found["counts"]).ravel(), counts.ravel(), strict=True):
        assert cell in (None, wanted)


def test_a_sites_small_cells_never_leave_it(federation: Any) -> None:
    tables = sites(federation, 3, [400, 12, 300])
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    plan = federation.plan("statistics.crosstab", {"pairs": PAIRS}, tables)
    outcome = federation.run(plan, tables, dict.fromkeys(tables, strict))
    for (a, b), found in zip(PAIRS, outcome["result"]["crosstab"]["tables"], strict=True):
        rows = frame(tables)
        for i, x in enumerate(COLUMNS[a]["values"]):
            for j, y in enumerate(COLUMNS[b]["values"]):
                assert found["counts"][i][j] in (None, int(((rows[a] == x) & (rows[b] == y)).sum()))


@pytest.mark.parametrize("at_sites", [1, 5])
def test_rows_with_one_missing_code_cannot_be_had_from_each_columns_own_counts(
    federation: Any, drive: Any, at_sites: int
) -> None:
    """Every line of the table and its missing cell, whose sum a frequency table tells, hides two cells and k people."""
    r = np.repeat([0.0, 1.0, 2.0], [50, 60, 70])
    c = np.tile([0.0, 1.0], 90)
    c[0] = np.nan
    table = federation.table({"r": r, "c": c}, {"r": {"values": [0, 1, 2]}, "c": {"values": [0, 1]}})
    found = crosstab(drive, {"a": table}, 5, at_sites, pairs=[["r", "c"]])[0]
    assert None in found["counts"][0]  # else it and the 50 rows of code 0 tell the one without c
    assert None not in found["counts"][2]
    assert found["test"] is None
    c[0] = 0.0
    whole = federation.table({"r": r, "c": c}, {"r": {"values": [0, 1, 2]}, "c": {"values": [0, 1]}})
    assert crosstab(drive, {"a": whole}, 5, at_sites, pairs=[["r", "c"]])[0]["test"] is not None


@pytest.mark.parametrize(("last", "said"), [(20, "1 expected count is below 5"), (9, "")])
def test_the_note_on_small_expected_counts(federation: Any, drive: Any, last: int, said: str) -> None:
    cells = np.argwhere(np.ones((2, 2))).repeat([3 if said else 9, 9, 9, last], axis=0).astype(float)
    table = federation.table({"r": cells[:, 0], "c": cells[:, 1]}, {"r": {"values": [0, 1]}, "c": {"values": [0, 1]}})
    note = crosstab(drive, {"a": table}, pairs=[["r", "c"]])[0]["note"]
    assert note == (f"{said}: the p-value is a rough one" if said else "")


@pytest.mark.parametrize("column", ["real", "none"])
def test_columns_without_a_code_list_are_refused(federation: Any, column: str) -> None:
    tables = sites(federation, 1, [9])
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.crosstab", {"pairs": [["sex", column]]}, tables), tables)
    assert (caught.value.code, caught.value.field) == ("plan.bad-column", column)
