"""Random forests: those of the pooled rows where nothing is drawn by sites, and as good as scikit-learn's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.metrics import r2_score, roc_auc_score

from atoll.contract.errors import AtollError, DisclosureError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import Table
from atoll.models.trees import COVER, FEATURE, LEAF
from atoll.runtime.policy import Policy

from .forest_rows import COLUMNS, rows


def tables_of(federation: Any, sizes: tuple[int, ...] = (80, 40, 60)) -> tuple[dict[str, Table], dict[str, Table]]:
    """(of three sites, of one that has all their rows)."""
    parts = [rows(seed, n) for seed, n in enumerate(sizes)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    apart = {f"s{i}": federation.table(part, COLUMNS) for i, part in enumerate(parts)}
    return apart, {"all": federation.table(whole, COLUMNS)}


def params_of(target: str, **more: Any) -> dict[str, Any]:
    basis = {"features": ["a", "b", "kind"], "trees": 5, "batch": 2, "max_depth": 3, "max_bins": 8, "min_rows": 2}
    return {"target": target, **basis, **more}


def steps(params: dict[str, Any], tables: dict[str, Table], start: Any = None, **cohort: Any) -> Any:
    schema = next(iter(tables.values())).schema
    return build("trees.forest", params).coordinate(Cohort(tuple(tables), schema, **{"seed": 7, **cohort}), start)


@pytest.mark.parametrize("target", ["binary", "class", "value"])
def test_without_a_bootstrap_it_is_that_of_the_pooled_rows(federation: Any, drive: Any, target: str) -> None:
    apart, whole = tables_of(federation)
    params = params_of(target, bootstrap=False)
    one, other = (drive(steps(params, tables), tables) for tables in (whole, apart))
    assert one.result["model"].weights.tobytes() == other.result["model"].weights.tobytes()
    assert (one.result["model"].words[:, 0, FEATURE] >= 0).all()
    model, outputs = other.result["model"], 3 if target == "class" else 1
    assert model.words.shape[0] == 5 * outputs
    predicted = model.predict(whole["all"])
    assert predicted.shape == ((180, 3) if outputs == 3 else (180,))
    if outputs == 3:
        np.testing.assert_allclose(predicted.sum(axis=1), 1)
        assert (predicted.argmax(axis=1) == whole["all"].codes("class")).mean() > 0.6


@pytest.mark.parametrize("protection", ["plain", "secagg", pytest.param("paillier", marks=pytest.mark.slow)])
def test_it_is_so_under_every_exact_protection(federation: Any, protection: str) -> None:
    apart, whole = tables_of(federation, (60, 40, 50))
    params = params_of("binary", trees=2, max_depth=2, max_bins=4, bootstrap=False)
    federation.run(federation.plan("trees.forest", params, whole), whole)
    pooled = federation.store.result(federation.run_id)[1]["weights"]
    federation.run(federation.plan("trees.forest", params, apart, protection=protection), apart)
    assert federation.store.result(federation.run_id)[1]["weights"].tobytes() == pooled.tobytes()


def test_each_leaf_is_the_mean_of_its_rows(federation: Any, drive: Any) -> None:
    _, whole = tables_of(federation)
    model = drive(steps(params_of("value", bootstrap=False, trees=1), whole), whole).result["model"]
    predicted, labels = model.predict(whole["all"]), np.asarray(whole["all"]["value"])
    assert len(set(predicted)) > 3
    for value in set(predicted):
        assert value == pytest.approx(labels[predicted == value].mean(), abs=1e-4)


def test_rows_count_as_often_as_drawn_and_differently_in_each_tree(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("binary"), apart), apart)
    roots = [(item, total) for item, total in zip(driven.rounds, driven.reduced, strict=True)
             if item.name == "level" and np.asarray(item.send["nodes"])[0, 1] == 0]  # fmt: skip
    first = [total["rows"][t, -4:].sum() for _, total in roots for t in range(2)]  # the cells of "kind"
    weight = [total["weight"][t, -4:].sum() for _, total in roots for t in range(2)]
    assert len(set(first)) > 1
    assert all(180 * 0.45 < n < 180 * 0.8 for n in first), "1 − 1/e of the rows"
    assert all(180 * 0.7 < n < 180 * 1.35 for n in weight)
    again = drive(steps(params_of("binary"), apart), apart)
    assert again.result["model"].weights.tobytes() == driven.result["model"].weights.tobytes()


def test_a_node_looks_at_some_features_and_at_all_where_these_do_not_split_it(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)

    def roots(tables: dict[str, Table], size: int) -> set[float]:
        params = params_of("value", max_features=size, trees=8, batch=8, bootstrap=False)
        words = drive(steps(params, tables), tables).result["model"].words
        return set(words[:, 0, FEATURE].tolist())

    assert len(roots(apart, 1)) > 1
    assert len(roots(apart, 3)) == 1
    alike = {name: federation.table({**rows(i, 40), "a": np.zeros(40), "b": np.ones(40)}, COLUMNS)
             for i, name in enumerate(apart)}  # fmt: skip
    assert roots(alike, 1) == {2.0}


def test_leaves_hold_the_plans_smallest_group(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    params = params_of("value", bootstrap=False, max_depth=6)
    words = drive(steps(params, apart, min_group_size=15), apart).result["model"].words
    assert words[:, :, COVER][words[:, :, FEATURE] == LEAF].min() >= 15


def test_it_goes_on_from_a_checkpoint_and_without_a_site(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    whole = drive(steps(params_of("binary"), apart), apart)
    assert [number for number, _ in whole.checkpoints]
    number, checkpoint = whole.checkpoints[0]
    resumed = drive(
        steps(params_of("binary"), apart, dict(checkpoint.state)), apart, first_round=number, kept=whole.kept[0]
    )
    assert resumed.result["model"].weights.tobytes() == whole.result["model"].weights.tobytes()
    away = drive(
        steps(params_of("binary"), apart), apart, absent=lambda at: ["s1"] if at in (number, number + 1) else []
    )
    assert any(item.send_to for item in away.rounds), "it is sent what it lacks"


@pytest.mark.parametrize("target", ["binary", "class", "value"])
def test_under_noise_drawn_trees_ask_one_round_a_batch(federation: Any, drive: Any, target: str) -> None:
    apart, whole = tables_of(federation, (400, 300, 300))
    driven = drive(steps(params_of(target, trees=12, batch=6, max_depth=4), apart, exact=False), apart)
    assert [item.name for item in driven.rounds] == ["noisy leaves"] * 2, "whatever the data"
    model, table = driven.result["model"], whole["all"]
    predicted = model.predict(table)
    if target == "class":
        assert (predicted.argmax(axis=1) == table.codes("class")).mean() > 0.5
    else:
        assert np.corrcoef(predicted, np.asarray(table[target]))[0, 1] > 0.4


@pytest.mark.parametrize("target", ["binary", "class", "value"])
@pytest.mark.parametrize("handled", ["level", "noisy_leaves"])
def test_a_row_changes_sums_by_no_more_than_the_norms_say(
    federation: Any, drive: Any, target: str, handled: str
) -> None:
    data = rows(0, 25)
    whole = {"s0": federation.table(data, COLUMNS)}
    params = params_of(target, bootstrap=False)  # a row that is left out changes what is drawn for the others
    driven = drive(steps(params, whole, exact=handled == "level"), whole)
    asked = next(item for item in driven.rounds if item.name == handled.replace("_", " "))
    program, desk = build("trees.forest", params), driven.desks["s0"]

    def answer(table: Table) -> dict[str, Any]:
        desk.table, desk.state = table, {}
        task = Task(TaskId("0" * 32, 0, 0, "reply", "s0"), asked.send, (), lambda _: Zeros())
        return getattr(build("trees.forest", params), handled)(desk, task)  # type: ignore[no-any-return]

    full = answer(whole["s0"])
    norms = getattr(program, "_level_per_record" if handled == "level" else "_leaves_per_record")(desk.table.schema, {})
    for without in range(25):
        rest = answer(whole["s0"].rows(np.arange(25) != without))
        for name, norm in norms.items():
            change = np.abs(full[name] - rest[name]).astype(float)
            assert change.sum() <= norm.l1 and np.sqrt((change**2).sum()) <= norm.l2 * (1 + 1e-12)


def test_few_rounds_for_many_trees(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("binary", trees=12, batch=12), apart), apart)
    assert sum(item.name == "level" for item in driven.rounds) == 3
    some = drive(steps(params_of("binary", trees=12, batch=12, max_cells=60), apart), apart)
    assert some.result["model"].weights.tobytes() == driven.result["model"].weights.tobytes()
    assert len(some.rounds) > len(driven.rounds)


@pytest.mark.parametrize(
    "nodes", [[[0, 1]], [[9, 0]], [[0, 0], [0, 0]], [[-1, 0]], [[0]], []], ids=["level", "tree", "twice", "-", "1", "0"]
)
def test_a_site_answers_only_what_the_trees_lead_to(federation: Any, drive: Any, nodes: list[Any]) -> None:
    apart, _ = tables_of(federation)
    driven = drive(steps(params_of("binary"), apart), apart)
    asked = next(item for item in driven.rounds if item.name == "level")
    program, desk = build("trees.forest", params_of("binary")), driven.desks["s0"]
    desk.state.clear()
    sent = {**asked.send, "nodes": np.array(nodes, np.int64)}
    with pytest.raises(ProtocolError):
        program.level(desk, Task(TaskId("0" * 32, 0, 0, "reply", "s0"), sent, (), lambda _: Zeros()))  # type: ignore[attr-defined]


class Zeros:
    def bytes(self, size: int) -> bytes:
        return bytes(size)


def test_what_cannot_be_is_refused(federation: Any, drive: Any) -> None:
    apart, _ = tables_of(federation)
    for params, code in (
        (params_of("binary", edges={"a": [2, 1]}), "plan.bad-edges"),
        (params_of("binary", categorical=["class"]), "plan.bad-column"),
        (params_of("nobody"), "plan.bad-column"),
        (params_of("binary", max_cells=5), "trees.too-many-cells"),
        (params_of("binary", trees=2000, max_depth=12), "model.too-large"),
    ):
        with pytest.raises(AtollError) as caught:
            drive(steps(params, apart), apart)
        assert caught.value.code == code


def test_where_histograms_are_seen_alone_a_site_of_groups_does_not_answer(federation: Any) -> None:
    apart, _ = tables_of(federation)
    policies = {name: Policy.sandbox().model_copy(update={"min_group_size": 5}) for name in apart}
    with pytest.raises(DisclosureError) as caught:
        federation.run(federation.plan("trees.forest", params_of("binary"), apart), apart, policies)
    assert caught.value.code == "disclosure.cells"


# ---------------------------------------------------------------- beside scikit-learn


def apart_and_rest(federation: Any, x: np.ndarray, y: np.ndarray, label: dict[str, Any]) -> Any:
    """(three sites' tables, of 70% of the rows; a table of the rest; (x, y) of both)."""
    order = np.random.default_rng(0).permutation(len(x))
    x, y, cut = x[order], y[order], int(0.7 * len(x))
    columns = {f"x{j}": {"range": [float(c.min()) - 1, float(c.max()) + 1]} for j, c in enumerate(x.T)}

    def table(part: Any) -> Table:
        data = {f"x{j}": c[part] for j, c in enumerate(x.T)}
        return federation.table({**data, "y": y[part].astype(float)}, {**columns, "y": {**label, "role": "label"}})

    sites = {f"s{i}": table(part) for i, part in enumerate(np.array_split(np.arange(cut), 3))}
    return sites, table(slice(cut, None)), (x[:cut], y[:cut]), (x[cut:], y[cut:])


def test_of_two_classes_it_ranks_as_well(federation: Any, drive: Any) -> None:
    label = {"dtype": "integer", "values": [0, 1]}
    sites, rest, learned, (x, y) = apart_and_rest(federation, *load_breast_cancer(return_X_y=True), label)
    model = drive(steps({"target": "y", "trees": 30, "max_depth": 6, "max_bins": 32}, sites), sites).result["model"]
    beside = RandomForestClassifier(30, random_state=0).fit(*learned).predict_proba(x)[:, 1]
    assert roc_auc_score(y, model.predict(rest)) > roc_auc_score(y, beside) - 0.01


def test_of_values_it_explains_as_much(federation: Any, drive: Any) -> None:
    sites, rest, learned, (x, y) = apart_and_rest(federation, *load_diabetes(return_X_y=True), {"range": [0, 400]})
    model = drive(steps({"target": "y", "trees": 40, "max_depth": 6, "max_bins": 16}, sites), sites).result["model"]
    beside = RandomForestRegressor(40, max_features=1 / 3, random_state=0).fit(*learned).predict(x)
    assert r2_score(y, model.predict(rest)) > r2_score(y, beside) - 0.04


def test_of_several_classes_it_is_as_often_right(federation: Any, drive: Any) -> None:
    label = {"dtype": "integer", "values": [0, 1, 2]}
    sites, rest, learned, (x, y) = apart_and_rest(federation, *load_wine(return_X_y=True), label)
    model = drive(steps({"target": "y", "trees": 30, "max_depth": 5, "max_bins": 16}, sites), sites).result["model"]
    beside = (RandomForestClassifier(30, random_state=0).fit(*learned).predict(x) == y).mean()
    assert (model.predict(rest).argmax(axis=1) == y).mean() > beside - 0.04
