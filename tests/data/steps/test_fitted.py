"""Steps fitted on federated statistics: the same at several sites as pandas on the pooled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.contract.schema import Column, TableSchema
from atoll.data.recipe import Prepared

NAN = float("nan")
COLUMNS: dict[str, Any] = {
    "x": {"range": [-50, 150], "unit": "mg"},
    "whole": {"dtype": "integer", "range": [0, 40]},
    "same": {"range": [0, 9]},
    "empty": {"range": [0, 1]},
    "code": {"dtype": "integer", "values": [1, 2, 4]},
    "ward": {"dtype": "text", "values": ["north", "south", "east", "none"]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}


@pytest.fixture
def sites(table_of: Any) -> Any:
    """Uneven sites, one without rows, one with a single row."""
    random = np.random.default_rng(3)

    def site(n: int, wards: list[Any]) -> Any:
        return table_of(
            {
                "x": np.where(random.random(n) < 0.2, NAN, np.clip(random.normal(40, 30, n), -50, 150)),
                "whole": np.where(random.random(n) < 0.1, NAN, random.integers(0, 41, n)),
                "same": np.full(n, 3.0),
                "empty": np.full(n, NAN),
                "code": np.where(random.random(n) < 0.1, NAN, random.choice([1, 2, 4], n)),
                "ward": random.choice(np.array(wards, object), n),
                "y": random.integers(0, 2, n),
            },
            COLUMNS,
        )

    return {"a": site(300, ["north", None]), "b": site(0, ["north"]), "c": site(1, ["east"]),
            "d": site(120, ["north", "south", "east"])}  # fmt: skip


def pooled(tables: Any) -> pd.DataFrame:
    return pd.concat([pd.DataFrame({n: t[n] for n in t.columns}) for t in tables.values()], ignore_index=True)


def test_outliers(sites: Any, prepare: Any, same: Any) -> None:
    x = pooled(sites)["x"]
    low, high = x.mean() - 1.5 * x.std(), x.mean() + 1.5 * x.std()
    step = {"step": "outliers", "columns": ["x"], "k": 1.5}
    assert same(pooled(prepare([step], sites))["x"], x.where(x.between(low, high)))
    made = prepare([{**step, "outside": "winsorise"}], sites)
    assert same(pooled(made)["x"], x.clip(low, high))
    assert all(len(made[name]) == len(sites[name]) for name in sites)


def test_outliers_by_quartiles(sites: Any, prepare: Any) -> None:
    x = pooled(sites)["x"]
    q1, q3 = np.nanquantile(x, [0.25, 0.75], method="inverted_cdf")
    step = {"step": "outliers", "columns": ["x"], "method": "iqr", "k": 0.5, "outside": "winsorise"}
    found = pooled(prepare([step], sites))["x"]
    assert np.allclose(found, x.clip(q1 - 0.5 * (q3 - q1), q3 + 0.5 * (q3 - q1)), atol=200 * 4e-6, equal_nan=True)
    whole = prepare([{**step, "columns": "whole"}], sites)["a"].schema.columns["whole"]
    assert (whole.dtype, whole.range) == ("real", (0, 40))  # a fence is not a whole number


def test_standard_scale(sites: Any, prepare: Any, same: Any) -> None:
    x = pooled(sites)["x"]
    made = prepare([{"step": "scale", "columns": ["x", "same"]}], sites)
    assert same(pooled(made)["x"], (x - x.mean()) / x.std())
    assert set(pooled(made)["same"]) == {0.0}
    assert made["a"].schema.columns["x"] == Column(range=(-10, 10))
    clipped = prepare([{"step": "scale", "columns": ["x"], "clip": 1}], sites)
    assert same(pooled(clipped)["x"], ((x - x.mean()) / x.std()).clip(-1, 1))


def test_other_scales(sites: Any, prepare: Any, same: Any) -> None:
    x = pooled(sites)["x"]
    made = pooled(prepare([{"step": "scale", "columns": ["x"], "method": "range"}], sites))["x"]
    assert same(made, (x + 50) / 200)
    q1, q2, q3 = np.nanquantile(x, [0.25, 0.5, 0.75], method="inverted_cdf")
    made = pooled(prepare([{"step": "scale", "columns": ["x"], "method": "robust"}], sites))["x"]
    assert np.allclose(made, (x - q2) / (q3 - q1), atol=1e-3, equal_nan=True)
    made = pooled(prepare([{"step": "scale", "columns": ["x"], "method": "minmax"}], sites))["x"]
    assert ((made.dropna() >= 0) & (made.dropna() <= 1)).all()
    assert np.corrcoef(made.dropna(), x.dropna())[0, 1] > 0.98


def test_bins_with_edges(sites: Any, prepare: Any, same: Any) -> None:
    step = {"step": "bins", "column": "whole", "into": "bin", "edges": [10, 20.5, 30]}
    made = prepare([step], sites)
    whole = pooled(sites)["whole"]
    expected = pd.cut(whole, [-np.inf, 10, 20.5, 30, np.inf], right=False, labels=False)
    assert same(pooled(made)["bin"], expected)
    assert "whole" not in made["a"].columns
    assert made["a"].schema.columns["bin"].values == (0, 1, 2, 3)
    own = prepare([{**step, "missing": "own"}], sites)
    assert same(pooled(own)["bin"], expected.fillna(4))
    assert own["a"].schema.columns["bin"].missing == "forbid"


def test_bins_by_quantiles(sites: Any, prepare: Any) -> None:
    made = prepare([{"step": "bins", "column": "x", "quantiles": 5}], sites)
    counts = pooled(made)["x"].value_counts()
    assert len(counts) == 5
    assert counts.max() - counts.min() <= 4
    assert set(pooled(prepare([{"step": "bins", "column": "same", "quantiles": 4}], sites))["same"]) == {1}


def test_one_hot(sites: Any, prepare: Any, same: Any) -> None:
    frame = pooled(sites)
    made = pooled(prepare([{"step": "one_hot", "columns": ["ward", "code"], "missing": "own"}], sites))
    for value in COLUMNS["ward"]["values"]:
        assert same(made[f"ward_{value}"], frame["ward"] == value)
    assert same(made["ward_missing"], frame["ward"].isna())
    assert same(made["code_4"], frame["code"] == 4)
    made = pooled(prepare([{"step": "one_hot", "columns": "ward", "drop_first": True}], sites))
    assert "ward_north" not in made
    assert same(made["ward_east"], (frame["ward"] == "east").where(frame["ward"].notna(), NAN).astype(float))
    made = pooled(prepare([{"step": "one_hot", "columns": "ward", "missing": "zero"}], sites))
    assert same(made["ward_east"], frame["ward"] == "east")


def test_target_encoding(sites: Any, prepare: Any, same: Any) -> None:
    frame = pooled(sites)
    mean = frame["y"].mean()
    groups = frame.groupby("ward")["y"].agg(["count", "mean"])
    encoded = (groups["count"] * groups["mean"] + 10 * mean) / (groups["count"] + 10)
    step = {"step": "target_encode", "column": "ward", "target": "y", "into": "ward_risk"}
    made = prepare([step], sites)
    assert same(pooled(made)["ward_risk"], frame["ward"].map(encoded).fillna(mean))
    assert made["b"].schema.columns["ward_risk"].bounds() == (0, 1)


def test_groups_too_small_to_be_told_get_the_mean(table_of: Any, prepare: Any) -> None:
    columns = {"ward": COLUMNS["ward"], "y": COLUMNS["y"]}
    data = {"ward": ["north"] * 40 + ["south"] * 30 + ["east"] * 2, "y": [0, 1] * 35 + [1, 1]}
    made = prepare([{"step": "target_encode", "column": "ward", "target": "y"}], {"a": table_of(data, columns)}, 5)["a"]
    assert made["ward"][-1] == pytest.approx(np.mean(data["y"]))
    assert not set(made["ward"][:70].tolist()) & {0.0, 1.0}


@pytest.mark.parametrize("method", ["mean", "median", "most_frequent"])
def test_impute(sites: Any, prepare: Any, method: str) -> None:
    frame = pooled(sites)
    columns = ["code", "ward"] if method == "most_frequent" else ["x", "whole"]
    made = pooled(prepare([{"step": "impute", "columns": columns, "with": method, "indicator": True}], sites))
    for name in columns:
        wanted = {
            "mean": lambda c: c.mean(),
            "median": lambda c: np.nanquantile(c, 0.5, method="inverted_cdf"),
            "most_frequent": lambda c: c.value_counts().index[0],
        }[method](frame[name])
        filled = made[name][frame[name].isna()]
        assert filled.tolist() == pytest.approx([wanted] * len(filled), abs=1e-3) if name != "ward" else True
        assert set(filled) == {wanted} if name == "ward" else True
        assert made[name][frame[name].notna()].tolist() == frame[name].dropna().tolist()
        assert made[f"{name}_missing"].tolist() == frame[name].isna().astype(float).tolist()


def test_impute_with_a_constant(sites: Any, prepare: Any) -> None:
    step = {"step": "impute", "with": "constant"}
    frame = pooled(sites)
    made = pooled(prepare([{**step, "columns": "x", "value": -1}, {**step, "columns": "ward", "value": "none"}], sites))
    assert made["x"].tolist() == frame["x"].fillna(-1).tolist()
    assert made["ward"].tolist() == frame["ward"].fillna("none").tolist()


def test_a_constant_must_keep_the_contract() -> None:
    schema = TableSchema(name="t", columns={n: Column(**c) for n, c in COLUMNS.items()})
    for name, value in {"x": 200, "code": 3, "ward": "west", "whole": 1.5, "y": "yes"}.items():
        step = {"step": "impute", "columns": [name], "with": "constant", "value": value}
        with pytest.raises(PlanError) as caught:
            Prepared(Recipe(steps=(step,))).schema(schema)
        assert (caught.value.code, caught.value.field) == ("recipe.wrong-value", name)


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ({"step": "scale", "columns": ["empty"]}, "recipe.nothing-to-fit"),
        ({"step": "scale", "columns": ["empty"], "method": "minmax"}, "recipe.nothing-to-fit"),
        ({"step": "scale", "columns": ["empty"], "method": "robust"}, "recipe.nothing-to-fit"),
        ({"step": "outliers", "columns": ["empty", "x"]}, "recipe.nothing-to-fit"),
        ({"step": "outliers", "columns": ["empty"], "method": "iqr"}, "recipe.nothing-to-fit"),
        ({"step": "bins", "column": "empty", "quantiles": 4}, "recipe.nothing-to-fit"),
        ({"step": "target_encode", "column": "ward", "target": "empty"}, "recipe.nothing-to-fit"),
        ({"step": "impute", "columns": ["empty"], "with": "median"}, "recipe.nothing-to-impute"),
        ({"step": "impute", "columns": ["empty"]}, "recipe.nothing-to-impute"),
    ],
)
def test_a_column_without_values_is_named(sites: Any, prepare: Any, step: Any, code: str) -> None:
    with pytest.raises(PlanError) as caught:
        prepare([step], sites)
    assert (caught.value.code, caught.value.field) == (code, "empty")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ({"step": "one_hot", "columns": ["x"]}, "recipe.no-values"),
        ({"step": "target_encode", "column": "x", "target": "y"}, "recipe.no-values"),
        ({"step": "target_encode", "column": "code", "target": "ward"}, "recipe.not-numeric"),
        ({"step": "bins", "column": "ward", "edges": [1]}, "recipe.not-numeric"),
        ({"step": "bins", "column": "x", "into": "y", "edges": [1]}, "recipe.column-exists"),
        ({"step": "bins", "column": "x"}, "plan.bad-value"),
        ({"step": "bins", "column": "x", "edges": [2, 1]}, "plan.bad-value"),
        ({"step": "bins", "column": "x", "edges": [2], "quantiles": 3}, "plan.bad-value"),
        ({"step": "scale", "columns": ["ward"]}, "recipe.not-numeric"),
        ({"step": "outliers", "columns": ["nothing"]}, "recipe.no-column"),
        ({"step": "complete_rows", "columns": ["nothing"]}, "recipe.no-column"),
        ({"step": "impute", "columns": ["x"], "with": "most_frequent"}, "recipe.no-values"),
        ({"step": "impute", "columns": ["x"], "with": "constant"}, "plan.bad-value"),
        ({"step": "impute", "columns": ["x"], "with": "forward_fill"}, "plan.bad-value"),
        ({"step": "impute", "columns": ["x"], "limit": 3}, "plan.bad-value"),
        ({"step": "impute", "columns": ["x"], "with": "forward_fill", "on": "y"}, "recipe.wrong-type"),
    ],
)
def test_recipes_that_cannot_work_are_refused_without_data(step: Any, code: str) -> None:
    schema = TableSchema(name="t", columns={n: Column(**c) for n, c in COLUMNS.items()})
    with pytest.raises(PlanError) as caught:
        Prepared(Recipe(steps=(step,))).schema(schema)
    assert caught.value.code == code


def test_groups_of_a_column_that_was_changed_wait_for_the_next_stage() -> None:
    encode = {"step": "target_encode", "column": "ward", "target": "y"}
    fill = {"step": "impute", "columns": ["ward"], "with": "most_frequent"}
    assert Prepared(Recipe(steps=(fill, encode))).stages() == [[0], [1]]
    assert Prepared(Recipe(steps=(encode, {"step": "scale", "columns": ["x"]}))).stages() == [[0, 1]]


def test_a_whole_federation(sites: Any, federation: Any) -> None:
    """Everything at once over the real runtime, in two stages."""
    steps = [
        {"step": "outliers", "columns": ["x"], "outside": "winsorise"},
        {"step": "impute", "columns": ["ward", "code"], "with": "most_frequent"},
        {"step": "target_encode", "column": "ward", "target": "y"},
        {"step": "one_hot", "columns": ["code"]},
        {"step": "bins", "column": "whole", "quantiles": 3},
    ]
    tables = {name: sites[name] for name in ("a", "d")}
    plan = federation.plan("statistics.describe", {"columns": ["x", "ward", "whole"]}, tables, recipe={"steps": steps})
    described = federation.run(plan, tables)["result"]["columns"]
    assert described["ward"]["count"] == 420
    assert described["ward"]["mean"] == pytest.approx(pooled(tables)["y"].mean(), abs=0.01)


@pytest.mark.parametrize("high", [250, 251])
def test_values_that_tie_with_a_quantile_are_in_the_bin_above_its_edge(federation: Any, high: int) -> None:
    """Whatever the schema's range, and so the grid on which the quantile is found."""
    random = np.random.default_rng(3)
    values = {name: random.choice([110.0, 120, 130, 140, 150], n) for name, n in (("a", 300), ("b", 500))}
    tables = {name: federation.table({"bp": v}, {"bp": {"range": [60, high]}}) for name, v in values.items()}
    recipe = {"steps": [{"step": "bins", "column": "bp", "quantiles": 4}]}
    plan = federation.plan("statistics.frequency", {}, tables, recipe=recipe)
    counts = federation.run(plan, tables)["result"]["frequency"]["columns"]["bp"]["counts"]
    pooled = np.concatenate(list(values.values()))
    edges = np.unique(np.quantile(pooled, [0.25, 0.5, 0.75], method="inverted_cdf"))
    wanted = np.bincount(np.searchsorted(edges, pooled, side="right"), minlength=4)
    assert counts == wanted.tolist()
