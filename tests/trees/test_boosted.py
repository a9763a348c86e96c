"""Boosted trees are those of the pooled rows, to the bit; and they are XGBoost's, as far as they can be."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, DisclosureError, PlanError, SchemaError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Sum
from atoll.data.table import Table
from atoll.models.trees import FEATURE, THRESHOLD
from atoll.runtime.policy import Policy

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [-5, 5]},
    "b": {"range": [0, 1000]},
    "n": {"dtype": "integer", "values": list(range(10))},
    "kind": {"dtype": "text", "values": ["x", "y", "z", "w"]},
    "binary": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "class": {"dtype": "text", "values": ["p", "q", "r"], "role": "label"},
    "count": {"dtype": "integer", "range": [0, 40], "role": "label"},
    "value": {"range": [-80, 80], "role": "label"},
    "time": {"dtype": "integer", "range": [1, 30], "role": "label"},
}
FEATURES = ["a", "b", "n", "kind"]
SIZES = (150, 40, 90)


def rows(seed: int, n: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    a, b = random.normal(0, 1, n).clip(-5, 5), random.uniform(0, 900, n)
    number, kind = random.integers(0, 10, n).astype(float), random.choice(["x", "y", "z", "w"], n).astype(object)
    eta = np.sin(2 * a) + b / 500 + 0.1 * number + np.where(kind == "x", 1.0, 0.0) - np.where(kind == "z", 1.0, 0.0)
    found = {
        "a": np.where(random.random(n) < 0.1, np.nan, a), "b": b, "n": number, "kind": kind,
        "binary": (random.random(n) < 1 / (1 + np.exp(1.5 - eta))).astype(float),
        "class": np.array(["p", "q", "r"], object)[np.digitize(eta + random.normal(0, 0.5, n), [1, 2])],
        "count": random.poisson(np.exp(eta / 2)).clip(0, 40).astype(float),
        "value": (10 * eta + random.normal(0, 2, n)).clip(-80, 80),
        "time": np.ceil(random.exponential(10 / (1 + np.exp(eta)), n)).clip(1, 30),
    }  # fmt: skip
    found["kind"][random.random(n) < 0.05] = None
    return found


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def tables_of(
    federation: Any, sizes: tuple[int, ...] = SIZES, **schema: Any
) -> tuple[dict[str, Table], dict[str, Table]]:
    """(of three sites, of one that has all their rows)."""
    parts = [rows(seed, n) for seed, n in enumerate(sizes)]
    apart = {f"s{i}": federation.table(part, COLUMNS, **schema) for i, part in enumerate(parts)}
    return apart, {"all": federation.table(pooled(parts), COLUMNS, **schema)}


def params_of(target: str, **more: Any) -> dict[str, Any]:
    basis = {"features": FEATURES, "trees": 4, "max_depth": 3, "max_bins": 16, "binning": "even", "min_rows": 5}
    return {"target": target, **basis, **more}


def steps(params: Mapping[str, Any], tables: Mapping[str, Table], start: Any = None, **cohort: Any) -> Any:
    schema = next(iter(tables.values())).schema
    return build("trees.boosted", params).coordinate(Cohort(tuple(tables), schema, **{"seed": 7, **cohort}), start)


def halves(tables: Mapping[str, Table]) -> tuple[dict[str, Table], dict[str, Table]]:
    odd = {name: np.arange(len(table)) % 3 == 1 for name, table in tables.items()}
    return {n: t.rows(~odd[n]) for n, t in tables.items()}, {n: t.rows(odd[n]) for n, t in tables.items()}


SORTS: list[dict[str, Any]] = [
    params_of("value"),
    params_of("binary"),
    params_of("class"),
    params_of("count", objective="poisson"),
    params_of("value", objective={"kind": "quantile", "alpha": 0.8}),
    params_of("time", objective={"kind": "cox", "event": "binary"}),
    params_of("binary", categorical=["n"], monotone={"b": 1, "a": -1}, colsample=0.5),
    params_of("count", objective="poisson", splits="random", trees=6),
    params_of("class", splits="random"),
    params_of("value", max_cells=64, max_depth=4, l2=0.0, min_split_gain=0.5),
]


# ---------------------------------------------------------------- the pooled rows' trees


@pytest.mark.parametrize("params", SORTS, ids=lambda p: f"{p.get('objective', p['target'])}-{len(p)}")
def test_they_are_those_of_one_site_that_has_all_rows(federation: Any, drive: Any, params: dict[str, Any]) -> None:
    apart, whole = tables_of(federation)
    one, other = (drive(steps(params, tables), tables) for tables in (whole, apart))
    assert one.result["model"].weights.tobytes() == other.result["model"].weights.tobytes()
    assert one.result["history"] == other.result["history"]
    losses = one.result["history"]
    assert losses[-1] < losses[0], "they learn"
    assert (one.result["model"].words[:, :, FEATURE] >= 0).any()


@pytest.mark.parametrize("protection", ["plain", "secagg", pytest.param("paillier", marks=pytest.mark.slow)])
def test_they_are_so_under_every_exact_protection(federation: Any, protection: str) -> None:
    apart, whole = tables_of(federation, (60, 40, 50))
    params = params_of("class", trees=2, max_depth=2, max_bins=4, features=["a", "kind"])
    federation.run(federation.plan("trees.boosted", params, whole), whole)
    pooled_weights = federation.store.result(federation.run_id)[1]["weights"]
    federation.run(federation.plan("trees.boosted", params, apart, protection=protection), apart)
    assert federation.store.result(federation.run_id)[1]["weights"].tobytes() == pooled_weights.tobytes()


@pytest.mark.slow
def test_they_are_so_under_ckks(federation: Any) -> None:
    pytest.importorskip("tenseal")
    apart, whole = tables_of(federation, (60, 40, 50))
    params = params_of("binary", trees=2, max_depth=2, max_bins=4, features=["a", "kind"])
    federation.run(federation.plan("trees.boosted", params, whole), whole)
    pooled_weights = federation.store.result(federation.run_id)[1]["weights"]
    federation.run(federation.plan("trees.boosted", params, apart, protection="ckks"), apart)
    found = federation.store.result(federation.run_id)[1]["weights"]
    np.testing.assert_allclose(found, pooled_weights, rtol=1e-4, atol=1e-4)


def test_edges_from_quantiles_are_the_pooled_rows_and_so_are_the_trees(federation: Any, drive: Any) -> None:
    apart, whole = tables_of(federation)
    params = params_of("binary", binning="quantiles", max_bins=32)
    one, other = (drive(steps(params, tables), tables).result["model"] for tables in (whole, apart))
    assert one.weights.tobytes() == other.weights.tobytes()
    used = one.words[one.words[:, :, FEATURE] == 2][:, THRESHOLD]
    assert set(used) <= set(range(1, 10)), "few distinct values have an edge each"


def test_given_edges_are_the_only_thresholds(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    params = params_of("value", edges={"a": [-1, 0, 1], "b": [450]}, binning="even")
    driven = drive(steps(params, apart), apart)
    words = driven.result["model"].words
    assert set(words[words[:, :, FEATURE] == 0][:, THRESHOLD]) <= {-1.0, 0.0, 1.0, -float(np.finfo(np.float32).max)}
    assert driven.rounds[0].name == "begin", "no round is spent on edges"


# ---------------------------------------------------------------- rounds and sizes


def test_a_tree_takes_a_round_a_level_and_asks_the_smaller_children(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("value", min_rows=1, min_child_weight=0), apart), apart)
    names = [item.name for item in driven.rounds]
    assert names == ["begin"] + ["root", "level", "level"] * 4 + ["losses"]
    for item, total in zip(driven.rounds, driven.reduced, strict=True):
        if item.name == "level":
            nodes = np.asarray(item.send["nodes"])
            assert len(nodes) <= 2 ** (int(np.log2(nodes[:, 1].max() + 1)) - 1), "one of two siblings"
            assert total["n"][:, :17].sum(axis=1).max() <= sum(SIZES) / 2, "the smaller one"
    assert "h" not in driven.rounds[1].reply, "a constant Hessian is the count"


def test_a_level_of_many_cells_is_asked_in_several_rounds(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    some = drive(steps(params_of("value", max_cells=64), apart), apart)
    every = drive(steps(params_of("value"), apart), apart)
    assert some.result["model"].weights.tobytes() == every.result["model"].weights.tobytes()
    assert len(some.rounds) > len(every.rounds)
    assert max(math.prod(item.reply["g"].shape) for item in some.rounds if "g" in item.reply) <= 64


def test_only_some_features_cells_are_asked(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("value", colsample=0.5), apart), apart)
    drawn = [tuple(item.send["columns"]) for item in driven.rounds if item.name == "root"]
    assert all(len(columns) == 2 for columns in drawn) and len(set(drawn)) > 1
    words = driven.result["model"].words
    for step, columns in enumerate(drawn):
        used = words[step, :, FEATURE]
        assert set(used[used >= 0].astype(int)) <= set(columns)


# ---------------------------------------------------------------- rows that count


def test_each_site_draws_its_own_rows_for_each_tree(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("value", subsample=0.5, binning="even"), apart), apart)
    counted = [int(total["n"][0, :17].sum()) for item, total in zip(driven.rounds, driven.reduced, strict=True)
               if item.name == "root"]  # fmt: skip
    assert len(set(counted)) > 1
    assert all(0.35 * sum(SIZES) < n < 0.65 * sum(SIZES) for n in counted)
    losses = driven.result["history"]
    assert losses[-1] < losses[0]


def test_leaves_hold_as_many_rows_as_the_plans_smallest_group(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    model = drive(steps(params_of("value", min_rows=1), apart, min_group_size=25), apart).result["model"]
    leaves = model.words[:, :, FEATURE] == -1
    assert model.words[:, :, 4][leaves].min() >= 25, "of squared loss the cover is the number of rows"


def test_monotone_constraints_hold_everywhere(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    params = params_of("value", monotone={"b": -1}, trees=8)
    model = drive(steps(params, apart), apart).result["model"]
    table = next(iter(apart.values()))
    x = np.repeat(model.inputs(table)[:20], 50, axis=0)
    x[:, 1] = np.tile(np.linspace(0, 1000, 50), 20)
    assert (np.diff(model.margins(x)[:, 0].reshape(20, 50), axis=1) <= 1e-12).all()


# ---------------------------------------------------------------- ending early


def test_it_ends_where_the_pooled_held_out_rows_say(federation: Any, drive: Any) -> None:
    """Losses by the model itself, of 0, 1, … trees, over all sites' held-out rows together."""
    apart, _ = tables_of(federation)
    params = params_of("binary", trees=14, learning_rate=1.0, stop={"patience": 3}, min_rows=1)
    training, held = halves(apart)
    result = drive(steps(params, training), training, held).result
    labels = np.concatenate([np.asarray(t["binary"]) for t in held.values()])
    model, losses = result["model"], []
    longest = drive(steps({**params, "stop": {}}, training), training, held).result
    for size in range(result["iterations"] + 1):
        words = longest["model"].words.copy()
        words[size:] = 0
        words[size:, :, FEATURE] = -2
        words[size:, 0, FEATURE] = -1
        some = longest["model"].with_weights(np.concatenate([longest["model"].base, words.ravel()]))
        p = np.concatenate([some.predict(t) for t in held.values()])
        losses.append(float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean()))
    np.testing.assert_allclose(result["held_out"], losses, atol=1e-5)
    best = int(np.argmin(losses))
    assert result["kept"] == best
    assert result["iterations"] == best + 3 < 14
    assert (model.words[best:, 0, FEATURE] == -1).all() and (model.words[:best, 0, FEATURE] >= 0).any()


def test_ending_early_needs_held_out_rows(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    with pytest.raises(PlanError) as caught:
        drive(steps(params_of("binary", stop={"patience": 3}), apart), apart)
    assert caught.value.code == "plan.no-holdout"


# ---------------------------------------------------------------- sites that come and go


@pytest.mark.parametrize("params", [SORTS[1], SORTS[5], {**SORTS[8], "trees": 8}], ids=["logistic", "cox", "random"])
def test_a_site_that_was_away_takes_part_again(federation: Any, drive: Any, params: dict[str, Any]) -> None:
    apart, _ = tables_of(federation)
    away = {3: ["s1"], 4: ["s1"], 5: ["s1"], 8: ["s2"]}
    driven = drive(steps(params, apart), apart, absent=lambda number: away.get(number, []))
    number = max(len(item.send_to) for item in driven.rounds)
    assert number >= 1, "it is sent what it lacks"
    took = [set(reply) for reply in driven.replies]
    assert "s1" not in took[3] and "s1" in took[6]
    assert driven.result["history"][-1] < driven.result["history"][0]


def test_siblings_are_asked_when_a_sum_is_of_other_sites(federation: Any, drive: Any) -> None:
    """A level that only two of three answered: what is grown below is of these two alone, as if the third were not."""
    apart, _ = tables_of(federation)
    params = params_of("value", trees=1)
    driven = drive(steps(params, apart), apart, absent=lambda number: ["s2"] if number >= 2 else [])
    names = [item.name for item in driven.rounds]
    assert names[:4] == ["begin", "root", "level", "level"]
    first, second = (np.asarray(driven.rounds[i].send["nodes"]).tolist() for i in (2, 3))
    assert sorted(first + second) == [[0, 1], [0, 2]], "the smaller child, then its sibling"
    cover = driven.result["model"].words[0, :, 4]
    assert cover[0] == sum(SIZES)
    two = SIZES[0] + SIZES[1]
    assert cover[1] + cover[2] == two


def test_sites_whose_memory_is_lost_go_on_from_their_journal(federation: Any) -> None:
    """Between any two rounds the sites' processes may be new: ``drive`` makes every program anew for each round. Here
    programs are kept, as in a process that lives, and the bits are the same."""
    apart, _ = tables_of(federation)
    params = params_of("class", trees=2)
    federation.run(federation.plan("trees.boosted", params, apart), apart)
    lived = federation.store.result(federation.run_id)[1]["weights"]

    def forgetful(name: str, endpoint: Any) -> Any:
        def handle(message: Any, progress: Any) -> Any:
            for opened in federation.sites[name]._runs.values():
                opened._program = {}
            return endpoint(message, progress)

        return handle

    federation.run(federation.plan("trees.boosted", params, apart), apart, wrap=forgetful)
    assert federation.store.result(federation.run_id)[1]["weights"].tobytes() == lived.tobytes()


# ---------------------------------------------------------------- bad input


def refused(
    drive: Any, params: Mapping[str, Any], tables: Mapping[str, Table], error: type[AtollError], code: str
) -> None:
    with pytest.raises(error) as caught:
        drive(steps(params, tables), tables)
    assert code in (caught.value.code, *(part.code for part in caught.value.parts))
    assert caught.value.remedy or caught.value.parts


def test_what_cannot_be_is_refused_before_data_is_read(federation: Any) -> None:
    apart, _ = tables_of(federation)
    for more, code in (
        ({"features": ["a", "nope"]}, "plan.bad-column"),
        ({"features": ["a", "binary"]}, "plan.bad-column"),
        ({"features": ["a"], "categorical": ["b"]}, "plan.bad-column"),
        ({"monotone": {"kind": 1}}, "plan.bad-column"),
        ({"monotone": {"value": 1}}, "plan.bad-column"),
        ({"edges": {"a": [1, 0]}}, "plan.bad-edges"),
        ({"edges": {"kind": [1, 2]}}, "plan.bad-column"),
        ({"max_cells": 20}, "trees.too-many-cells"),
        ({"objective": "nope"}, "trees.objective"),
        ({"objective": "softmax", "target": "value"}, "plan.bad-target"),
        ({"trees": 2000, "max_depth": 12}, "model.too-large"),
    ):
        with pytest.raises(PlanError) as caught:
            next(steps({**params_of("binary"), **more}, apart))
        assert code in (caught.value.code, *(part.code for part in caught.value.parts)), more
    wide = {**COLUMNS, **{f"c{i}": {"range": [0, 1]} for i in range(300)}}
    many = federation.table({**rows(1, 10), **{f"c{i}": np.zeros(10) for i in range(300)}}, wide)
    large = params_of("class", features=[f"c{i}" for i in range(300)], max_depth=11, max_bins=254, trees=1)
    with pytest.raises(PlanError) as caught:
        next(steps(large, {"s": many}))
    assert caught.value.code == "trees.too-many-cells"


def test_missing_and_constant_labels_are_refused(federation: Any, drive: Any) -> None:
    data = rows(1, 60)
    gap = {**data, "binary": np.where(np.arange(60) == 3, np.nan, data["binary"])}
    good = federation.table(data, COLUMNS)
    refused(drive, params_of("binary"), {"s": good, "t": federation.table(gap, COLUMNS)}, SchemaError, "schema.missing")
    for target, value in (("binary", 0.0), ("value", 3.3), ("count", 7.0), ("count", 0.0)):
        constant = federation.table({**data, target: np.full(60, value)}, COLUMNS)
        objective = {"objective": "poisson"} if target == "count" else {}
        refused(drive, params_of(target, **objective), {"s": constant}, SchemaError, "schema.constant-label")
    alike = federation.table({**data, "class": np.full(60, "q", object)}, COLUMNS)
    refused(drive, params_of("class"), {"s": alike, "t": alike}, SchemaError, "schema.constant-label")


def test_sites_without_rows_with_one_row_or_one_class_take_part(federation: Any, drive: Any) -> None:
    parts = [rows(1, 120), {name: column[:0] for name, column in rows(2, 3).items()}, rows(3, 1), rows(4, 50)]
    parts[3]["binary"] = np.ones(50)
    apart = {f"s{i}": federation.table(part, COLUMNS) for i, part in enumerate(parts)}
    whole = {"all": federation.table(pooled(parts), COLUMNS)}
    for params in (params_of("binary"), params_of("binary", splits="random"), params_of("class")):
        one, other = (drive(steps(params, tables), tables).result["model"] for tables in (whole, apart))
        assert one.weights.tobytes() == other.weights.tobytes()


def test_a_feature_may_be_missing_at_a_site_or_everywhere(federation: Any, drive: Any) -> None:
    parts = [rows(seed, n) for seed, n in enumerate(SIZES)]
    for part in parts[:1]:
        part["b"] = np.full(len(part["b"]), np.nan)
    for part in parts:
        part["a"] = np.full(len(part["a"]), np.nan)
    apart = {f"s{i}": federation.table(part, COLUMNS) for i, part in enumerate(parts)}
    whole = {"all": federation.table(pooled(parts), COLUMNS)}
    for binning in ("even", "quantiles"):
        params = params_of("value", binning=binning)
        one, other = (drive(steps(params, tables), tables).result["model"] for tables in (whole, apart))
        assert one.weights.tobytes() == other.weights.tobytes()
        assert not (one.words[:, :, FEATURE] == 0).any(), "what is missing everywhere tells nothing"


def test_nobody_has_rows(federation: Any, drive: Any) -> None:
    empty = {name: column[:0] for name, column in rows(2, 3).items()}
    apart = {"s": federation.table(empty, COLUMNS), "t": federation.table(empty, COLUMNS)}
    found = drive(steps(params_of("binary"), apart), apart).result
    assert (found["model"].words[:, 0, FEATURE] == -1).all()
    assert math.isnan(found["history"][0])


def test_features_that_tell_nothing_leave_the_base(federation: Any, drive: Any) -> None:
    data = {**rows(1, 50), "a": np.full(50, 1.0), "b": np.full(50, np.nan)}
    table = {"s": federation.table(data, COLUMNS)}
    model = drive(steps(params_of("binary", features=["a", "b"]), table), table).result["model"]
    np.testing.assert_allclose(model.predict(table["s"]), data["binary"].mean(), rtol=1e-6)


def test_cells_are_not_told_where_a_sites_own_are_seen(federation: Any) -> None:
    apart, _ = tables_of(federation)
    policy = Policy.sandbox().model_copy(update={"min_group_size": 5})
    policies = dict.fromkeys(apart, policy)
    with pytest.raises(DisclosureError) as caught:
        federation.run(federation.plan("trees.boosted", params_of("binary"), apart), apart, policies)
    assert caught.value.code == "disclosure.cells"
    params = params_of("binary", trees=1, max_depth=1)
    federation.run(federation.plan("trees.boosted", params, apart, protection="secagg"), apart, policies)


def test_all_rounds_are_sums(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    assert all(isinstance(item.reduce, Sum) for item in drive(steps(params_of("class"), apart), apart).rounds)


# ---------------------------------------------------------------- beside XGBoost


def test_its_splits_are_xgboosts_where_the_bins_are(federation: Any, drive: Any) -> None:
    """Few distinct values have a bin each on both sides."""
    xgboost = pytest.importorskip("xgboost")
    random = np.random.default_rng(3)
    x = random.integers(0, 12, (900, 3)).astype(float)
    x[random.random(x.shape) < 0.1] = np.nan
    signal = np.nan_to_num(x[:, 0]) - 5 + np.where(np.nan_to_num(x[:, 1]) > 4, 2, -2) + random.normal(0, 1, 900)
    y = (signal > 0).astype(float)
    columns = {f"x{j}": {"dtype": "integer", "range": [0, 11]} for j in range(3)}
    columns["y"] = {"dtype": "integer", "values": [0, 1], "role": "label"}
    tables = {
        f"s{i}": federation.table({**{f"x{j}": x[i::3, j] for j in range(3)}, "y": y[i::3]}, columns) for i in range(3)
    }
    params = {"target": "y", "trees": 5, "max_depth": 3, "learning_rate": 0.3, "min_rows": 1}
    model = drive(steps(params, tables), tables).result["model"]
    settings = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": 3, "eta": 0.3, "nthread": 1,
                "base_score": float(y.mean())}  # fmt: skip
    booster = xgboost.train(settings, xgboost.DMatrix(x, y), 5)
    for words, tree in zip(model.words, booster.get_dump(dump_format="json"), strict=True):
        compared(words, 0, json.loads(tree))
    ours = np.concatenate([model.predict(tables[f"s{i}"]) for i in range(3)])
    theirs = np.concatenate([booster.predict(xgboost.DMatrix(x[i::3])) for i in range(3)])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def compared(words: np.ndarray, at: int, node: Mapping[str, Any]) -> None:
    """A node of ours and one of XGBoost's, and what is below; where no cell is missing, either way is right."""
    if "leaf" in node:
        assert words[at, FEATURE] == -1
        assert words[at, THRESHOLD] == pytest.approx(node["leaf"], abs=1e-5)
        return
    assert words[at, FEATURE] == int(node["split"].removeprefix("f"))
    assert words[at, THRESHOLD] == pytest.approx(node["split_condition"])
    for below, child in zip((2 * at + 1, 2 * at + 2), (node["yes"], node["no"]), strict=True):
        compared(words, below, next(c for c in node["children"] if c["nodeid"] == child))


@pytest.mark.slow
def test_its_auc_is_xgboosts_on_three_banks(federation: Any, atoll_data: Path) -> None:
    """With the same bins: each column's values are put on 200 of its quantiles before."""
    xgboost = pytest.importorskip("xgboost")
    metrics = pytest.importorskip("sklearn.metrics")
    folder = atoll_data / "default-credit-uci"

    def read(name: str) -> np.ndarray:
        with gzip.open(folder / f"default_credit_homo_{name}.csv.gz", "rt") as file:
            return np.loadtxt(file, delimiter=",", skiprows=1)[:, 1:]

    parts, test = [read(name) for name in ("guest", "host_1", "host_2")], read("test")
    train = np.concatenate(parts)
    for j in range(1, train.shape[1]):
        levels = np.unique(np.quantile(train[:, j], np.linspace(0, 1, 200)).astype(np.float32)).astype(float)
        for part in (*parts, test, train):
            part[:, j] = levels[np.clip(np.searchsorted(levels, part[:, j], "right") - 1, 0, None)]
    names = [f"x{j}" for j in range(train.shape[1] - 1)]
    columns = {n: {"range": [float(c.min()), float(c.max())]} for n, c in zip(names, train[:, 1:].T, strict=True)}
    columns["y"] = {"dtype": "integer", "values": [0, 1], "role": "label"}

    def table(rows: np.ndarray) -> Table:
        return federation.table({"y": rows[:, 0], **dict(zip(names, rows[:, 1:].T, strict=True))}, columns)

    tables = {f"bank{i}": table(part) for i, part in enumerate(parts)}
    params = {"target": "y", "trees": 40, "max_depth": 4, "learning_rate": 0.1}
    outcome = federation.run(federation.plan("trees.boosted", params, tables, protection="secagg"), tables)
    ours = metrics.roc_auc_score(test[:, 0], outcome["result"]["model"].predict(table(test)))
    settings = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": 4, "eta": 0.1, "max_bin": 256}
    booster = xgboost.train(settings, xgboost.DMatrix(train[:, 1:], train[:, 0]), 40)
    theirs = metrics.roc_auc_score(test[:, 0], booster.predict(xgboost.DMatrix(test[:, 1:])))
    assert abs(ours - theirs) <= 0.0005
