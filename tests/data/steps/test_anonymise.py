"""k-anonymity and l-diversity: what is promised is achieved, whatever the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.contract.schema import Column, TableSchema
from atoll.data.disclosure import achieved_k, achieved_l, classes
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData

NAN = float("nan")
COLUMNS: dict[str, Any] = {
    "age": {"dtype": "integer", "range": [0, 99], "unit": "year"},
    "weight": {"range": [0, 200]},
    "ward": {"dtype": "text", "values": ["n", "s", "e"]},
    "grade": {"dtype": "integer", "values": [1, 2, 3]},
    "ill": {"dtype": "text", "values": ["flu", "cold", "none"]},
}
QUASI = ["age", "weight", "ward", "grade"]
PEOPLE = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 9), st.just(NAN)), st.one_of(st.integers(0, 4), st.just(NAN)),
        st.sampled_from(["n", "s", "e", None]), st.sampled_from([1, 2, 3, NAN]),
        st.sampled_from(["flu", "cold", "none", None]),
    ),
    max_size=60,
)  # fmt: skip


def table(table_of: Any, people: Any) -> Any:
    return table_of({name: [person[i] for person in people] for i, name in enumerate(COLUMNS)}, COLUMNS)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    PEOPLE, st.integers(2, 6), st.integers(1, 3), st.sampled_from(["mean", "midpoint"]),
    st.sampled_from(["suppress", "set"]), st.sampled_from([QUASI, ["age"], ["ward", "age"], ["grade"]]),
)  # fmt: skip
def test_what_is_promised_is_achieved(
    table_of: Any, prepare: Any, people: Any, k: int, diversity: int, numbers: str, codes: str, quasi: list[str]
) -> None:
    before = table(table_of, people)
    options = {"l": diversity, "sensitive": "ill"} if diversity > 1 else {}
    step = {"step": "anonymise", "columns": quasi, "k": k, "numbers": numbers, "codes": codes, **options}
    made = prepare([step], {"site": before})["site"]
    assert len(made) + made.dropped["cannot be hidden among enough others"] == len(before)
    if len(made):
        found = {name: made[name] for name in quasi}
        assert achieved_k(found) >= k
        assert achieved_l(found, made["ill"]) >= diversity or diversity == 1
    elif diversity == 1:  # nobody could be hidden: no missing pattern had k people
        pattern = np.array(
            [[before[n][i] is None or before[n][i] != before[n][i] for n in quasi] for i in range(len(before))]
        )
        assert all((pattern == row).all(axis=1).sum() < k for row in pattern)


def test_classes_get_their_mean_or_middle(table_of: Any, prepare: Any) -> None:
    people = [(a, 50, "n", 1, "flu") for a in (10, 11, 12, 80, 81, 90)]
    for numbers, ages in {"mean": [11, 83.66666666666667], "midpoint": [11, 85]}.items():
        step = {"step": "anonymise", "columns": ["age", "weight"], "k": 3, "numbers": numbers}
        made = prepare([step], {"site": table(table_of, people)})["site"]
        assert made["age"].tolist() == pytest.approx([ages[0]] * 3 + [ages[1]] * 3)
        assert made["weight"].tolist() == [50] * 6
        assert made.schema.columns["age"] == Column(range=(0, 99), unit="year")


def test_classes_of_several_codes(table_of: Any, prepare: Any) -> None:
    people = [(10, 50, w, 1, "flu") for w in ("n", "n", "n", "s", "e", "s")]
    step = {"step": "anonymise", "columns": ["ward"], "k": 3}
    made = prepare([step], {"site": table(table_of, people)})["site"]
    assert made["ward"].tolist() == ["n", "n", "n", None, None, None]
    made = prepare([{**step, "codes": "set"}], {"site": table(table_of, people)})["site"]
    assert made["ward"].tolist() == ["n", "n", "n", "s|e", "s|e", "s|e"]
    assert made.schema.columns["ward"].values is None


def test_a_plain_table_is_parted_far(table_of: Any, prepare: Any) -> None:
    """Not only safe: classes stay small."""
    random = np.random.default_rng(0)
    pairs = zip(random.integers(0, 100, 2000), random.random(2000) * 200, strict=True)
    people = [(a, w, "n", 1, "flu") for a, w in pairs]
    made = prepare([{"step": "anonymise", "columns": ["age", "weight"], "k": 5}], {"site": table(table_of, people)})
    sizes = np.bincount(classes({n: made["site"][n] for n in ("age", "weight")}))
    assert sizes.min() >= 5
    assert sizes.max() <= 2 * 5 + 30
    assert sizes.mean() < 10


def test_the_smallest_classes() -> None:
    assert achieved_k({"a": [1, 1, 2, 2, 2]}) == 2
    assert achieved_k({"a": [1.0, NAN, NAN]}) == 1
    assert achieved_k({"a": [NAN, NAN], "b": np.array([None, None], object)}) == 2
    assert achieved_k({"a": [1, 1, 1, 1], "b": np.array(["x", "x", "y", "y"], object)}) == 2
    assert achieved_k({"a": []}) == 0
    assert achieved_l({"a": [1, 1, 2, 2]}, ["x", "y", "x", "x"]) == 1
    assert achieved_l({"a": [1, 1, 2, 2]}, np.array(["x", "y", "x", None], object)) == 1
    assert achieved_l({"a": [1, 1, 2]}, [NAN, NAN, 1.0]) == 0
    assert achieved_l({"a": [1, 1, 2, 2]}, [1.0, 2.0, 3.0, 1.0]) == 2
    assert achieved_l({"a": []}, []) == 0


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ({"columns": ["gone"], "k": 2}, "recipe.no-column"),
        ({"columns": ["age"], "k": 1}, "plan.bad-value"),
        ({"columns": ["age"], "k": 2, "l": 2}, "plan.bad-value"),
        ({"columns": ["age"], "k": 2, "sensitive": "ill"}, "plan.bad-value"),
        ({"columns": ["ill"], "k": 2, "l": 2, "sensitive": "ill"}, "plan.bad-value"),
        ({"columns": ["age"], "k": 2, "l": 2, "sensitive": "weight"}, "recipe.no-values"),
    ],
)
def test_recipes_that_cannot_work_are_refused_without_data(step: Any, code: str) -> None:
    schema = TableSchema(name="t", columns={n: Column(**c) for n, c in COLUMNS.items()})
    with pytest.raises(PlanError) as caught:
        Prepared(Recipe(steps=({"step": "anonymise", **step},))).schema(schema)
    assert caught.value.code == code


def test_a_federation_is_told_the_k_and_l_that_all_its_sites_achieve(federation: Any) -> None:
    random = np.random.default_rng(2)
    columns = {
        "age": {"dtype": "integer", "range": [0, 100]},
        "sex": {"dtype": "integer", "values": [0, 1]},
        "ill": {"dtype": "integer", "values": [0, 1, 2]},
    }
    tables = {
        name: federation.table(
            {"age": random.integers(20, 90, n), "sex": random.integers(0, 2, n), "ill": random.integers(0, 3, n)},
            columns,
        )
        for name, n in (("a", 300), ("b", 90), ("c", 40))
    }
    step = {"step": "anonymise", "columns": ["age", "sex"], "k": 6, "sensitive": "ill", "l": 2}
    plan = federation.plan("statistics.describe", {}, tables, recipe={"steps": [step]}, run={"holdout": 0.2})
    outcome = federation.run(plan, tables)
    ks, ls = [], []
    for name, table in tables.items():
        whole = SiteData.of(table, plan, name).base()
        quasi = {column: whole[column] for column in ("age", "sex")}
        ks.append(achieved_k(quasi))
        ls.append(achieved_l(quasi, whole["ill"]))
    assert outcome["preparation"]["achieved"] == {"k": min(ks), "l": min(ls)}
    assert min(ks) >= 6 and min(ls) >= 2
