"""FedDF and FedMD: numpy simulations of the papers' algorithms, and models of different architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import Table
from atoll.horizontal.distillation import labels, scores
from atoll.horizontal.rows import PublicParams
from atoll.models.model import make, restored

COLUMNS: dict[str, Any] = {
    "u": {"range": [-4, 4]},
    "v": {"range": [0, 10]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "z": {"range": [-20, 20], "role": "label"},
    "w": {"range": [0, 8], "role": "label"},
    "n": {"dtype": "integer", "range": [0, 30], "role": "label"},
    "c": {"dtype": "integer", "values": [1, 2, 3], "role": "label"},
}
RANDOM = np.random.default_rng(9)
PUBLIC = {"u": RANDOM.uniform(-4, 4, 30).tolist(), "v": RANDOM.uniform(0, 10, 30).tolist()}
PARAMS: dict[str, Any] = {
    "family": "logistic", "target": "y", "features": ["u", "v"], "batch_size": 1000, "learning_rate": 0.5,
    "public": PUBLIC, "distil_steps": 7, "distil_rate": 0.8,
}  # fmt: skip
SMALL = {"kind": "linear", "family": "logistic", "features": ["u"]}


def sites(federation: Any, sizes: tuple[int, ...] = (40, 25, 60)) -> dict[str, Table]:
    random, tables = np.random.default_rng(2), {}
    for i, n in enumerate(sizes):
        u, v = np.clip(random.normal(i - 1, 1.5, n), -4, 4), random.uniform(0, 10, n)
        y = (random.random(n) < 1 / (1 + np.exp(1 - u - 0.2 * v))).astype(float)
        rest = {"z": 3 * u, "w": 4 + u / 2, "n": np.rint(v), "c": 1 + np.rint(v / 5).clip(0, 2)}
        tables[f"s{i}"] = federation.table({"u": u, "v": v, "y": y, **rest}, COLUMNS)
    return tables


def run(drive: Any, name: str, tables: dict[str, Table], state: Any = None, **more: Any) -> Any:
    options = {key: more.pop(key) for key in ("first_round", "kept", "absent", "holdouts") if key in more}
    cohort = Cohort(tuple(tables), tables["s0"].schema, seed=5)
    made = build(name, {key: value for key, value in {**PARAMS, **more}.items() if value is not None})
    return drive(made.coordinate(cohort, state), tables, **options)


def design(rows: Any, features: tuple[str, ...] = ("u", "v")) -> np.ndarray:
    scaled = {"u": np.asarray(rows["u"]) / 4, "v": (np.asarray(rows["v"]) - 5) / 5}
    return np.column_stack([np.ones(len(scaled["u"])), *[scaled[name] for name in features]])


def sigmoid(eta: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-eta)))


def descent(w: np.ndarray, x: np.ndarray, y: np.ndarray, rate: float, steps: int = 1) -> np.ndarray:
    for _ in range(steps):
        w = w - rate * x.T @ (sigmoid(x @ w) - y) / len(y)
    return w


# ---------------------------------------------------------------- FedDF


def test_feddf_is_algorithm_1_of_its_paper(federation: Any, drive: Any) -> None:
    """Average, then KL descent towards the softmax of the mean logits; here both weighted by rows."""
    tables = sites(federation)
    driven = run(drive, "horizontal.feddf", tables, rounds=5)
    share = np.array([40, 25, 60]) / 125
    w, public = np.zeros(3), design(PUBLIC)
    for _ in range(5):
        own = [descent(w, design(t), t["y"], 0.5) for t in tables.values()]
        logits = share @ np.array([public @ site for site in own])
        w = descent(share @ np.array(own), public, sigmoid(logits), 0.8, 7)
    assert np.allclose(driven.result["model"].weights, w, rtol=0, atol=1e-12)


def test_feddf_of_sites_alike_weights_logits_as_the_paper_does(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    driven = run(drive, "horizontal.feddf", tables, rounds=1, weighting="sites")
    own = [descent(np.zeros(3), design(t), t["y"], 0.5) for t in tables.values()]
    logits = np.mean([design(PUBLIC) @ site for site in own], 0)
    w = descent(np.mean(own, 0), design(PUBLIC), sigmoid(logits), 0.8, 7)
    assert np.allclose(driven.result["model"].weights, w, rtol=0, atol=1e-12)


def test_without_distillation_feddf_is_fedavg(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    found = run(drive, "horizontal.feddf", tables, rounds=3, distil_steps=0, batch_size=8).result
    only = {"public": None, "distil_steps": None, "distil_rate": None}
    plain = run(drive, "horizontal.fedavg", tables, rounds=3, batch_size=8, **only).result
    assert found["model"].weights.tobytes() == plain["model"].weights.tobytes()


def test_of_one_site_feddf_keeps_its_model(federation: Any, drive: Any) -> None:
    """A student that says what its teacher says has nothing left to learn, on however many public rows."""
    tables = sites(federation, (50,))
    rows = {"public": None, "generated": 3000, "batch_size": 50, "distil_steps": 100}
    student = run(drive, "horizontal.feddf", tables, rounds=3, **rows).result["model"].weights
    alone = run(drive, "horizontal.feddf", tables, rounds=3, **{**rows, "distil_steps": 0}).result["model"].weights
    assert np.allclose(student, alone, rtol=0, atol=1e-9)


def test_feddf_goes_on_from_a_checkpoint_with_the_same_bits(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    whole = run(drive, "horizontal.feddf", tables, rounds=5, checkpoint_every=2, batch_size=8)
    for done, checkpoint in whole.checkpoints:
        again = run(drive, "horizontal.feddf", tables, dict(checkpoint.state), rounds=5, batch_size=8, first_round=done)
        assert again.result["model"].weights.tobytes() == whole.result["model"].weights.tobytes()


# ---------------------------------------------------------------- FedMD


def test_fedmd_is_algorithm_1_of_its_paper(federation: Any, drive: Any) -> None:
    """One site's model is of another architecture; consensus, digest, revisit; the coordinator's digests too."""
    tables = sites(federation)
    driven = run(drive, "horizontal.fedmd", tables, rounds=4, models={"s1": SMALL})
    features = {"s0": ("u", "v"), "s1": ("u",), "s2": ("u", "v")}
    own = {site: np.zeros(1 + len(names)) for site, names in features.items()}
    student, consensus = np.zeros(3), np.zeros(30)
    for number in range(4):
        for site, names in features.items():
            if number:
                own[site] = descent(own[site], design(PUBLIC, names), sigmoid(consensus), 0.8, 7)
            own[site] = descent(own[site], design(tables[site], names), tables[site]["y"], 0.5)
        consensus = np.mean([design(PUBLIC, features[site]) @ w for site, w in own.items()], 0)
        student = descent(student, design(PUBLIC), sigmoid(consensus), 0.8, 7)
    for site, w in own.items():
        assert np.allclose(driven.desks[site].personal["weights"], w, rtol=0, atol=1e-12)
    assert np.allclose(driven.result["model"].weights, student, rtol=0, atol=1e-12)
    assert not any("weights" in reply for replies in driven.replies for reply in replies.values())


def test_public_labels_are_learned_first(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    public = {**PUBLIC, "y": [i % 2 for i in range(30)]}
    driven = run(drive, "horizontal.fedmd", tables, rounds=1, public=public)
    for site, table in tables.items():
        w = descent(np.zeros(3), design(PUBLIC), np.array(public["y"]), 0.8, 7)
        w = descent(w, design(table), table["y"], 0.5)
        assert np.allclose(driven.desks[site].personal["weights"], w, rtol=0, atol=1e-12)


def test_of_one_site_the_coordinators_model_comes_near_its_model(federation: Any, drive: Any) -> None:
    """From nothing, on many generated rows: it never saw a weight."""
    tables = sites(federation, (60,))
    rows = {"public": None, "generated": 3000, "batch_size": 64, "distil_steps": 1500, "distil_rate": 2.0}
    driven = run(drive, "horizontal.fedmd", tables, rounds=1, local_epochs=200, **rows)
    teacher = driven.desks["s0"].personal["weights"]
    assert np.linalg.norm(teacher) > 2
    assert np.allclose(driven.result["model"].weights, teacher, rtol=0, atol=0.02)


def test_a_sites_own_model_is_what_evaluation_scores(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    driven = run(drive, "horizontal.fedmd", tables, rounds=3, models={"s1": SMALL}, holdouts=tables)
    made = build("statistics.evaluation", {"model": driven.result["model"].spec(), "personal": True})
    sent = {"weights": driven.result["model"].weights, "personal": np.array(1.0)}
    for site, features in {"s0": ("u", "v"), "s1": ("u",)}.items():
        desk = driven.desks[site]
        found = handler_of(made, "own").answer(made, desk, Task(TaskId("0" * 32, 9, 0, "reply", site), sent, (0,)))
        p, y = sigmoid(design(tables[site], features) @ desk.personal["weights"]), tables[site]["y"]
        assert found["log_loss"] == pytest.approx(
            -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)), abs=6e-4
        )  # three digits
        own = restored(desk.personal, tables[site].schema, driven.result["model"])
        assert own.spec()["features"] == list(features)


def test_fedmd_of_networks_and_linear_models_in_a_whole_federation(federation: Any) -> None:
    """Hidden by masks, three architectures learn together, and each site's own model is scored."""
    pytest.importorskip("torch")
    tables = sites(federation, (120, 90, 100))
    network = {"kind": "mlp", "features": ["u", "v"], "hidden": [8]}
    params = {
        **PARAMS, "public": None, "generated": 200, "models": {"s1": network, "s2": SMALL}, "rounds": 6,
        "batch_size": 16, "learning_rate": 0.2, "evaluate_every": 3,
    }  # fmt: skip
    more = {"run": {"holdout": 0.3}, "protection": "secagg", "cohort": {"min_sites": 3}}
    outcome = federation.run(federation.plan("horizontal.fedmd", params, tables, **more), tables)
    evaluated = outcome["evaluation"]
    assert evaluated["pooled"]["auc"] > 0.75
    assert set(evaluated["personal"]["own"]) == set(tables)
    assert all(own["auc"] > 0.7 for own in evaluated["personal"]["own"].values())


def test_fedmd_goes_on_from_a_checkpoint_with_the_same_bits(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    more = {"rounds": 5, "checkpoint_every": 2, "batch_size": 8, "models": {"s1": SMALL}}
    whole = run(drive, "horizontal.fedmd", tables, **more)
    for (done, checkpoint), kept in zip(whole.checkpoints, whole.kept, strict=True):
        again = run(drive, "horizontal.fedmd", tables, dict(checkpoint.state), first_round=done, kept=kept, **more)
        assert again.result["model"].weights.tobytes() == whole.result["model"].weights.tobytes()
        assert again.result["history"] == whole.result["history"]


def test_a_site_that_comes_back_digests_the_latest_consensus(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    driven = run(drive, "horizontal.fedmd", tables, rounds=3, absent=lambda number: ["s2"] if number == 1 else [])
    assert set(driven.replies[1]) == {"s0", "s1"}
    w, consensus = np.zeros(3), driven.rounds[2].send["scores"][:, 0]
    w = descent(w, design(tables["s2"]), tables["s2"]["y"], 0.5)
    w = descent(w, design(PUBLIC), sigmoid(consensus), 0.8, 7)
    w = descent(w, design(tables["s2"]), tables["s2"]["y"], 0.5)
    assert np.allclose(driven.desks["s2"].personal["weights"], w, rtol=0, atol=1e-12)


def test_a_site_without_rows_is_scored_by_the_coordinators_model(federation: Any, drive: Any) -> None:
    tables = sites(federation, (40, 0, 30))
    driven = run(drive, "horizontal.fedmd", tables, rounds=2)
    assert float(driven.replies[0]["s1"]["weight"]) == 0
    assert not driven.desks["s1"].personal


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("name", ["horizontal.feddf", "horizontal.fedmd"])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"public": {"u": [1.0]}}, "distil.no-column"),
        ({"public": {"u": ["far"], "v": [1]}}, "plan.bad-public"),
        ({"public": None}, "plan.bad-value"),
        ({"freeze": ["nothing"]}, "model.no-layer"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_any_round(
    federation: Any, drive: Any, name: str, change: dict[str, Any], code: str
) -> None:
    with pytest.raises(PlanError) as caught:
        run(drive, name, sites(federation), **change)
    assert caught.value.code == code


def test_sites_must_predict_the_same(federation: Any, drive: Any) -> None:
    with pytest.raises(PlanError) as caught:
        run(drive, "horizontal.fedmd", sites(federation), models={"s1": {**SMALL, "family": "linear"}})
    assert (caught.value.code, caught.value.field) == ("distil.other-task", "params.models.s1")


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "linear", "family": "logistic", "features": ["u"], "target": "y"},
        {"kind": "linear", "family": "linear", "features": ["u"], "target": "z"},
        {"kind": "linear", "family": "poisson", "features": ["u"], "target": "n"},
        {"kind": "mlp", "features": ["u", "v"], "target": "y"},
        {"kind": "mlp", "features": ["u", "v"], "target": "c"},
        {"kind": "mlp", "features": ["u", "v"], "target": ["z", "w"]},
    ],
    ids=lambda spec: f"{spec['kind']}-{spec['target']}",
)
def test_labels_of_a_models_scores_are_its_predictions(federation: Any, spec: dict[str, Any]) -> None:
    if spec["kind"] == "mlp":
        pytest.importorskip("torch")
    rows = PublicParams(generated=25).rows(sites(federation)["s0"].schema)
    made = make(spec, rows.schema)
    made = made.with_weights(0.3 + 0.5 * made.initial(1))
    told = scores(made, rows)
    assert np.allclose(labels(made, rows, told), made.predict(rows), rtol=1e-6, atol=1e-9)
    assert np.allclose(labels(made, rows, told + (7 if made.task == "classes" else 0)), made.predict(rows), atol=1e-6)
    loss, gradient = made.loss_and_gradient(
        made.weights, type(made.examples(rows))(made.examples(rows).inputs, labels(made, rows, told))
    )
    assert np.abs(gradient).max() < 1e-6  # who teaches herself learns nothing
    assert np.isfinite(loss)
