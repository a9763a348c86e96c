"""Drivers over all sites' rows: equal to the pooled rows' SHAP values, without any row having left."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from atoll.contract.errors import DisclosureError, PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import TableSchema
from atoll.data.table import Table
from atoll.models import shap
from atoll.models.trees import COVER, LEAF, UNUSED, Trees, TreesSpec

COLUMNS: dict[str, dict[str, Any]] = {
    "age": {"range": [0, 100], "dtype": "integer"},
    "dose": {"range": [-1, 1]},
    "place": {"dtype": "text", "values": ["coast", "hills", "isles"]},
    "idle": {"range": [0, 1]},
    "stage": {"values": [3, 0.1, 2]},
    "kind": {"dtype": "text", "values": ["p", "q"], "role": "label"},
    "ill": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
FEATURES = ["age", "dose", "place", "idle", "stage"]


def spec(link: str = "logistic") -> dict[str, Any]:
    return {"kind": "trees", "features": FEATURES, "categorical": ["place"], "link": link, "num_trees": 5,
            "max_depth": 3, "target": "kind" if link == "softmax" else "ill"}  # fmt: skip


def drawn(schema: TableSchema, link: str = "logistic", seed: int = 0) -> Trees:
    """Random trees, none of which asks for "idle" or "stage"."""
    model, random = Trees.of(TreesSpec.model_validate(spec(link)), schema), np.random.default_rng(seed)
    words = np.array(model.words)
    for tree in words:
        tree[0, COVER] = 100
        for at in range(len(tree)):
            if tree[at, 0] == UNUSED:
                continue
            cover, place = tree[at, COVER], int(random.integers(3))
            if at >= len(tree) // 2:
                tree[at] = LEAF, np.float32(random.normal()), 0, 0, cover
                continue
            cut = (np.float32(random.uniform(10, 90)), np.float32(random.uniform(-1, 1)), random.integers(1, 8))[place]
            tree[at] = place, cut, random.integers(2), 1, cover
            tree[2 * at + 1 : 2 * at + 3, 0] = LEAF
            tree[2 * at + 1 : 2 * at + 3, COVER] = cover * np.array([0.3, 0.7])
    return model.with_weights(np.concatenate([np.zeros(model.outputs), words.ravel()]))


def tables_of(federation: Any, sizes: tuple[int, ...] = (40, 25, 70)) -> dict[str, Table]:
    random = np.random.default_rng(3)
    found = {}
    for i, n in enumerate(sizes):
        data: dict[str, Any] = {
            "age": random.integers(0, 101, n).astype(float),
            "dose": random.uniform(-1, 1, n),
            "place": random.choice(np.array(["coast", "hills", "isles", None], object), n, p=[0.6, 0.3, 0.05, 0.05]),
            "idle": random.uniform(0, 1, n),
            "stage": random.choice([3, 0.1, 2], n),
            "kind": random.choice(np.array(["p", "q"], object), n),
            "ill": random.integers(0, 2, n).astype(float),
        }
        data["dose"][random.random(n) < 0.2] = np.nan
        found[f"s{i}"] = federation.table(data, COLUMNS)
    return found


def pooled(tables: Mapping[str, Table]) -> Table:
    first = next(iter(tables.values()))
    return Table(first.schema, {n: np.concatenate([t[n] for t in tables.values()]) for n in first.columns})


def steps(tables: Mapping[str, Table], model: Trees, smallest: int = 1, **params: Any) -> Any:
    made = build("trees.explanation", {"model": spec(model.settings.link), **params})
    cohort = Cohort(tuple(tables), model.schema, min_group_size=smallest)
    return made.coordinate(cohort, {"weights": model.weights})


@pytest.mark.parametrize("link", ["logistic", "softmax"])
def test_drivers_are_those_of_the_pooled_rows(federation: Any, drive: Any, link: str) -> None:
    tables = tables_of(federation)
    model = drawn(tables["s0"].schema, link)
    found = drive(steps(tables, model), tables).result["explanation"]
    values, _ = shap.shap_values(model, model.inputs(pooled(tables)))
    wanted = dict(zip(FEATURES, np.abs(values).sum(axis=1).mean(axis=0), strict=True))
    assert found["rows"] == 135
    assert [one["feature"] for one in found["drivers"]] == sorted(wanted, key=lambda name: -wanted[name])
    assert {one["feature"]: one["importance"] for one in found["drivers"]} == pytest.approx(wanted, abs=1e-12)
    assert wanted["idle"] == 0


def test_dependence_is_that_of_the_pooled_rows(federation: Any, drive: Any) -> None:
    tables = tables_of(federation)
    model = drawn(tables["s0"].schema)
    found = drive(steps(tables, model, dependence=True, bins=4), tables).result["explanation"]["dependence"]
    table = pooled(tables)
    values, _ = shap.shap_values(model, model.inputs(table))
    old = table["age"] >= 75
    assert found["age"]["bins"] == ["missing", "0 to 25", "25 to 50", "50 to 75", "75 to 100"]
    assert found["age"]["rows"][-1] == old.sum()
    assert found["age"]["mean"][-1] == pytest.approx(values[old, 0, 0].mean())
    assert found["age"]["mean"][0] is None
    unknown = np.isnan(table["dose"])
    assert found["dose"]["rows"][0] == unknown.sum()
    assert found["dose"]["mean"][0] == pytest.approx(values[unknown, 0, 1].mean())
    assert found["place"]["bins"] == ["missing", "coast", "hills", "isles"]
    hills = table.codes("place") == 1
    assert found["place"]["mean"][2] == pytest.approx(values[hills, 0, 2].mean())
    assert found["stage"]["bins"] == ["missing", "0.1", "2", "3"]
    third = table["stage"] == 3
    assert (found["stage"]["rows"][3], found["stage"]["mean"][3]) == (third.sum(), values[third, 0, 4].mean())


def test_bins_of_few_rows_are_withheld_and_so_is_their_complement(federation: Any, drive: Any) -> None:
    tables = tables_of(federation)
    model = drawn(tables["s0"].schema)
    found = drive(steps(tables, model, 10, dependence=True), tables).result["explanation"]["dependence"]
    codes = pooled(tables).codes("place")
    counts = np.bincount(codes + 1, minlength=4).tolist()
    assert 0 < counts[0] < 10 and 0 < counts[3] < 10
    assert found["place"]["rows"] == [None, counts[1], counts[2], None]
    assert found["place"]["mean"][0] is None


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_it_is_a_study_of_an_installed_model(
    federation: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protection: str
) -> None:
    """A plan names the model by its hash: no weights travel, and secagg gives what plain does."""
    tables = tables_of(federation)
    model = drawn(tables["s0"].schema)
    content = save({"weights": model.weights})
    (tmp_path / "risk.safetensors").write_bytes(content)
    monkeypatch.setenv("ATOLL_MODELS", str(tmp_path))
    base = {"name": "risk", "sha256": hashlib.sha256(content).hexdigest()}
    params = {"model": {**spec(), "base": base}, "dependence": True, "bins": 5}
    plan = federation.plan("trees.explanation", params, tables, protection=protection)
    found = federation.run(plan, tables)["result"]["explanation"]
    values, _ = shap.shap_values(model, model.inputs(pooled(tables)))
    wanted = np.sort(np.abs(values[:, 0]).mean(axis=0))[::-1]
    assert [one["importance"] for one in found["drivers"]] == pytest.approx(wanted.tolist(), abs=1e-9)
    assert model.weights.tobytes() not in b"".join(sent for _, _, sent in federation.wire)


def test_what_a_record_changes_is_what_is_declared(federation: Any) -> None:
    tables = tables_of(federation, (40,))
    table, model = tables["s0"], drawn(tables["s0"].schema)
    made = build("trees.explanation", {"model": spec(), "dependence": True})
    sent = {"weights": model.weights}
    handler = type(made).handlers["explain"]  # type: ignore[attr-defined]
    norms = handler.record(made, table.schema, sent)

    def told(rows: Table) -> dict[str, np.ndarray]:
        site: Any = type("Desk", (), {"table": rows, "state": {}, "min_group_size": 1, "progress": lambda *_: None})()
        task: Any = type("Task", (), {"arrays": sent})()
        return {name: np.asarray(value) for name, value in handler.answer(made, site, task).items()}

    whole, most = told(table), dict.fromkeys(norms, 0.0)
    for left_out in range(len(table)):
        other = told(table.rows(np.arange(len(table)) != left_out))
        for name, norm in norms.items():
            change = np.abs(whole[name] - other[name])
            assert change.sum() <= norm.l1 + 1e-9
            assert np.sqrt((change**2).sum()) <= norm.l2 + 1e-9
            most[name] = max(most[name], float(change.sum()))
    assert most["sizes"] > norms["sizes"].l1 / 12


@pytest.mark.parametrize(
    ("params", "start", "code"),
    [
        ({"model": {"kind": "linear", "family": "logistic", "features": ["age"], "target": "ill"}}, {}, "not-trees"),
        ({"model": spec()}, {}, "no-weights"),
    ],
)
def test_what_cannot_be_explained_is_refused(federation: Any, params: Any, start: Any, code: str) -> None:
    tables = tables_of(federation)
    with pytest.raises(PlanError) as caught:
        next(build("trees.explanation", params).coordinate(Cohort(tuple(tables), tables["s0"].schema), start))
    assert caught.value.code == f"trees.{code}"


def test_a_site_explains_one_model_and_tells_bins_only_in_sums(federation: Any, drive: Any) -> None:
    tables = tables_of(federation)
    model = drawn(tables["s0"].schema)
    first = drive(steps(tables, model), tables)
    again = drive(steps(tables, model), tables, kept={name: desk.state for name, desk in first.desks.items()})
    assert again.result == first.result
    other = drawn(tables["s0"].schema, seed=5)
    with pytest.raises(ProtocolError) as caught:
        drive(steps(tables, other), tables, kept={name: desk.state for name, desk in first.desks.items()})
    assert caught.value.code == "trees.explained"
    bad = np.array(model.weights)
    bad[1] = 9  # no such feature
    made = build("trees.explanation", {"model": spec()})
    handler = type(made).handlers["explain"]  # type: ignore[attr-defined]
    with pytest.raises(PlanError) as refused:
        handler.answer(made, first.desks["s0"], type("Task", (), {"arrays": {"weights": bad}})())
    assert refused.value.code == "model.bad-trees"
    first.desks["s0"].min_group_size = 5
    made = build("trees.explanation", {"model": spec(), "dependence": True})
    with pytest.raises(DisclosureError):
        handler.answer(made, first.desks["s0"], type("Task", (), {"arrays": {"weights": model.weights}})())
