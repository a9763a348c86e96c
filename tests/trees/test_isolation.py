"""Isolation forests find planted anomalies as scikit-learn's do, by one sum of counts that any protection can make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score

from atoll.contract.errors import DisclosureError, PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import Table
from atoll.models.trees import COVER, FEATURE, LEAF, THRESHOLD
from atoll.runtime.policy import Policy
from atoll.trees.isolation import average_path, counted, drawn, pruned

COLUMNS: dict[str, Any] = {
    "a": {"range": [-50, 50]},
    "b": {"range": [-50, 50]},
    "c": {"range": [-50, 50]},
    "steps": {"dtype": "integer", "range": [0, 30]},
    "kind": {"dtype": "text", "values": ["x", "y", "z"]},
    "odd": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
NUMBERS = ["a", "b", "c"]


def rows(n: int = 900, planted: int = 30) -> dict[str, Any]:
    """Two clusters, of unlike width; the first rows lie anywhere."""
    random = np.random.default_rng(5)
    center = random.choice([-5.0, 5.0], n)[:, None]
    x = center + random.normal(0, np.where(center < 0, 0.4, 1.0), (n, 3))
    x[:planted] = random.uniform(-8, 8, (planted, 3))
    x[random.random(x.shape) < 0.01] = np.nan
    odd = (np.arange(n) < planted).astype(float)
    order = random.permutation(n)
    numbers = {name: column[order] for name, column in zip(NUMBERS, x.T, strict=True)}
    kinds = random.choice(["x", "y", "z"], n).astype(object)
    return {**numbers, "steps": random.poisson(5, n).astype(float), "kind": kinds, "odd": odd[order]}


def tables_of(federation: Any, data: dict[str, Any], sites: int = 3) -> dict[str, Table]:
    parts = np.array_split(np.arange(len(data["a"])), sites)
    made = [federation.table({n: v[part] for n, v in data.items()}, COLUMNS) for part in parts]
    return {f"s{i}": table for i, table in enumerate(made)}


def steps(params: dict[str, Any], tables: dict[str, Table], **cohort: Any) -> Any:
    schema = next(iter(tables.values())).schema
    return build("trees.isolation", params).coordinate(Cohort(tuple(tables), schema, **{"seed": 7, **cohort}))


def test_planted_anomalies_are_found_as_scikit_learn_finds_them(federation: Any, drive: Any) -> None:
    data = rows()
    tables = tables_of(federation, data)
    driven = drive(steps({"features": NUMBERS, "contamination": 0.05}, tables), tables)
    whole = federation.table(data, COLUMNS)
    scores = driven.result["model"].predict(whole)
    x = np.column_stack([data[name] for name in NUMBERS])
    beside = -IsolationForest(n_estimators=100, random_state=0).fit(x).score_samples(x)
    assert ((scores > 0) & (scores < 1)).all()
    assert roc_auc_score(data["odd"], scores) > roc_auc_score(data["odd"], beside) - 0.02
    assert (scores >= driven.result["threshold"]).mean() == pytest.approx(0.05, abs=0.02)
    assert driven.result["rows"] == 900
    assert [item.name for item in driven.rounds][-2:] == ["leaves", "scores"]


def test_of_whole_numbers_and_categories_too(federation: Any, drive: Any) -> None:
    data = rows(600, 0)
    data["steps"][:12], data["kind"][:12], data["odd"][:12] = 28, "z", 1
    tables = tables_of(federation, data)
    model = drive(steps({"features": ["steps", "kind", "a"], "trees": 40, "max_depth": 7}, tables), tables).result[
        "model"
    ]
    assert roc_auc_score(data["odd"], model.predict(federation.table(data, COLUMNS))) > 0.97
    of_steps = model.words[model.words[:, :, FEATURE] == 0]
    assert (of_steps[:, THRESHOLD] == np.floor(of_steps[:, THRESHOLD])).all()


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_it_is_that_of_the_pooled_rows_under_every_exact_protection(federation: Any, protection: str) -> None:
    data = rows(240, 8)
    params = {"features": [*NUMBERS, "kind"], "target": "odd", "trees": 8, "max_depth": 5, "contamination": 0.1}
    found = []
    for sites, asked in ((1, "plain"), (3, protection)):
        tables = tables_of(federation, data, sites)
        outcome = federation.run(federation.plan("trees.isolation", params, tables, protection=asked), tables)
        found.append(
            (federation.store.result(federation.run_id)[1]["weights"].tobytes(), outcome["result"]["threshold"])
        )
    assert found[0] == found[1]


def test_scores_are_evaluated_by_a_label_where_there_is_one(federation: Any) -> None:
    tables = tables_of(federation, rows())
    params = {"features": NUMBERS, "trees": 30}
    for target, evaluated in (("odd", True), ("", False)):
        plan = federation.plan("trees.isolation", {**params, "target": target}, tables, run={"holdout": 0.4, "seed": 5})
        outcome = federation.run(plan, tables)
        assert (outcome["evaluation"] is not None) is evaluated
        if evaluated:
            assert outcome["evaluation"]["pooled"]["auc"] > 0.85


def test_of_few_rows_a_leaf_tells_no_more_than_that(federation: Any, drive: Any) -> None:
    data = rows()
    tables = tables_of(federation, data)
    params = {"features": NUMBERS, "trees": 20}
    words = drive(steps(params, tables, min_group_size=10), tables).result["model"].words
    leaves, depth = words[:, :, FEATURE] == LEAF, np.floor(np.log2(np.arange(words.shape[1]) + 1))
    assert not ((words[leaves][:, COVER] > 0) & (words[leaves][:, COVER] < 10)).any()
    unit = 20 * average_path(np.array(256.0))
    path = words[:, :, THRESHOLD] * unit - depth
    np.testing.assert_allclose(path[leaves & (words[:, :, COVER] == 0)], 0, atol=1e-4)
    scores = (
        drive(steps(params, tables, min_group_size=10), tables).result["model"].predict(federation.table(data, COLUMNS))
    )
    assert roc_auc_score(data["odd"], scores) > 0.9
    few = drive(steps({**params, "contamination": 0.005}, tables, min_group_size=10), tables)
    assert few.result["threshold"] is None


def test_path_lengths_are_those_of_the_paper() -> None:
    assert average_path(np.array([0.0, 1.0, 1.5, 2.0])).tolist() == [0, 0, 0.5, 1]
    harmonic = sum(1 / k for k in range(1, 256))
    assert float(average_path(np.array(256.0))) == pytest.approx(2 * harmonic - 2 * 255 / 256, abs=0.01)
    leaves = np.array([[3, 1, 0, 4]])
    assert counted(leaves).tolist() == [[8, 4, 4, 3, 1, 0, 4]]


def test_a_tree_ends_where_one_of_the_sample_is_left(federation: Any) -> None:
    schema = federation.table(rows(10, 0), COLUMNS).schema
    model = build("trees.isolation", {"features": NUMBERS, "trees": 1, "max_depth": 2})._unfitted(schema)  # type: ignore[attr-defined]
    words = drawn(model, np.tile([-5.0, 5.0], (3, 1)), 3)
    assert (words[0, :3, FEATURE] >= 0).all() and (words[0, 3:, FEATURE] == LEAF).all()
    found = pruned(words, counted(np.array([[90, 6, 3, 1]])), 100.0, 20, 1)
    assert (found[0, :3, FEATURE] >= 0).tolist() == [True, True, False]
    assert found[0, 2, FEATURE] == LEAF and (found[0, 5:, FEATURE] == -2).all()
    unit = float(average_path(np.array(20.0)))
    expected = [(2 + float(average_path(np.array(18.0)))) / unit, (2 + 0.2) / unit, 1 / unit]
    np.testing.assert_allclose(found[0, [3, 4, 2], THRESHOLD], expected, rtol=1e-6)
    assert found[0, :3, COVER].tolist() == [100, 96, 4]


def test_drawn_trees_are_sound_and_thresholds_keep_to_what_is_left(federation: Any) -> None:
    schema = federation.table(rows(10, 0), COLUMNS).schema
    params = {"features": ["a", "steps", "kind"], "trees": 12, "max_depth": 7}
    model = build("trees.isolation", params)._unfitted(schema)  # type: ignore[attr-defined]
    words = drawn(model, np.array([[-2.0, 2.0], [0.0, 3.0], [0.0, 0.0]]), 1)
    model.with_weights(np.append(0.0, words))  # it raises otherwise

    def check(tree: np.ndarray, node: int, low: tuple[float, float], high: tuple[float, float]) -> None:
        feature, threshold = int(tree[node, FEATURE]), tree[node, THRESHOLD]
        if feature < 0:
            return
        left, right = (low, high), (low, high)
        if feature < 2:
            assert low[feature] < threshold <= high[feature]
            below, above = list(high), list(low)
            below[feature], above[feature] = threshold - feature, threshold  # whole numbers: one less
            left, right = (low, tuple(below)), (tuple(above), high)  # type: ignore[assignment]
        check(tree, 2 * node + 1, *left)
        check(tree, 2 * node + 2, *right)

    for tree in words:
        check(tree, 0, (-2, 0), (2, 3))
    assert not np.array_equal(words, drawn(model, np.array([[-2.0, 2.0], [0.0, 3.0], [0.0, 0.0]]), 2))


def test_under_noise_it_asks_no_quantiles_and_makes_a_model(federation: Any, drive: Any) -> None:
    tables = tables_of(federation, rows())
    params = {"features": NUMBERS, "trees": 10, "max_depth": 5, "contamination": 0.1}
    driven = drive(steps(params, tables, exact=False), tables)
    assert [item.name for item in driven.rounds] == ["leaves", "scores"]
    program, schema = build("trees.isolation", params), tables["s0"].schema
    assert program._leaves_per_record(schema, {})["rows"].l1 == 10  # type: ignore[attr-defined]
    noisy = np.random.default_rng(0).normal(0, 30, (10, 32)) + 1
    made = program._unfitted(schema)  # type: ignore[attr-defined]
    words = drawn(made, np.tile([-50.0, 50.0], (3, 1)), 0)
    made.with_weights(np.append(0.0, pruned(words, counted(noisy), 1.0, 256, 1)))  # sound, whatever the sums


@pytest.mark.parametrize(
    "sent",
    [
        {"ranges": np.zeros((2, 2))},
        {"seed": np.array(-1)},
        {"seed": np.array(1.0)},
        {"ranges": np.full((3, 2), np.inf)},
    ],
)
def test_a_site_takes_nothing_malformed(federation: Any, drive: Any, sent: dict[str, Any]) -> None:
    tables = tables_of(federation, rows(60))
    params = {"features": NUMBERS, "trees": 2, "max_depth": 2}
    driven = drive(steps(params, tables), tables)
    arrays = {**driven.rounds[-1].send, **sent}
    program = build("trees.isolation", params)
    driven.desks["s0"].state.clear()
    with pytest.raises(ProtocolError) as caught:
        program.leaves(driven.desks["s0"], Task(TaskId("0" * 32, 0, 0, "reply", "s0"), arrays, ()))  # type: ignore[attr-defined]
    assert caught.value.code == "task.array"


def test_a_site_counts_in_one_forest_a_run(federation: Any, drive: Any) -> None:
    tables = tables_of(federation, rows(60))
    params = {"features": NUMBERS, "trees": 2, "max_depth": 2, "contamination": 0.1}
    driven = drive(steps(params, tables), tables)
    handlers = type(build("trees.isolation", params)).handlers  # type: ignore[attr-defined]
    leaves, scores = driven.rounds[-2], driven.rounds[-1]
    weights = scores.send["weights"].copy()
    weights[np.flatnonzero(weights)[-1]] += 1
    for item, sent in (
        (leaves, {}), (leaves, {"seed": np.array(8)}), (leaves, {"ranges": leaves.send["ranges"] + 1}),
        (scores, {}), (scores, {"weights": weights}),
    ):  # fmt: skip
        task = Task(TaskId("0" * 32, 9, 0, "reply", "s0"), {**item.send, **sent}, ())
        made = build("trees.isolation", params)
        if not sent:  # the same again
            handlers[item.name].answer(made, driven.desks["s0"], task)
            continue
        with pytest.raises(ProtocolError) as caught:
            handlers[item.name].answer(made, driven.desks["s0"], task)
        assert caught.value.code == "trees.other-forest"


@pytest.mark.parametrize("ranges", [[[5, -5]] * 3, [[1e300, 1e308]] * 3, [[-1e308, 1e308]] * 3, [[0, 0]] * 3])
def test_whatever_ranges_a_coordinator_sends_trees_are_sound(federation: Any, drive: Any, ranges: Any) -> None:
    tables = tables_of(federation, rows(60))
    params = {"features": NUMBERS, "trees": 2, "max_depth": 3}
    driven = drive(steps(params, tables), tables)
    arrays = {**driven.rounds[-1].send, "ranges": np.array(ranges, np.float64)}
    program = build("trees.isolation", params)
    driven.desks["s0"].state.clear()
    reply = program.leaves(driven.desks["s0"], Task(TaskId("0" * 32, 0, 0, "reply", "s0"), arrays, ()))  # type: ignore[attr-defined]
    assert reply["rows"].sum(axis=1).tolist() == [20, 20]


def test_what_cannot_be_is_refused(federation: Any, drive: Any) -> None:
    tables = tables_of(federation, rows(60))
    for params in ({"features": ["nobody"]}, {"features": ["a"], "categorical": ["kind"]}, {"target": "steps"}):
        with pytest.raises(PlanError):
            drive(steps(params, tables), tables)
    policies = {name: Policy.sandbox().model_copy(update={"min_group_size": 5}) for name in tables}
    with pytest.raises(DisclosureError):
        federation.run(federation.plan("trees.isolation", {"trees": 2}, tables), tables, policies)
