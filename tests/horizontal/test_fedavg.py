"""FedAvg: gradient descent when it must be, the same bits after a resume, and near the optimum in the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError
from atoll.contract.program import Cohort, build
from atoll.data.table import Table, concatenate
from atoll.models.linear import LinearModel
from atoll.runtime.policy import Policy

FAMILIES = ("linear", "logistic", "poisson")
TARGETS: dict[str, dict[str, Any]] = {
    "linear": {"range": [-20, 20]},
    "logistic": {"dtype": "integer", "values": [0, 1]},
    "poisson": {"dtype": "integer", "range": [0, 30]},
}
FEATURES = ("u", "v")


def sites(federation: Any, family: str, sizes: tuple[int, ...] = (40, 25, 100), seed: int = 2) -> dict[str, Table]:
    random = np.random.default_rng(seed)
    columns = {"u": {"range": [-4, 4]}, "v": {"range": [0, 10]}, "y": {**TARGETS[family], "role": "label"}}
    tables = {}
    for i, n in enumerate(sizes):
        u, v = np.clip(random.normal(i - 1, 1.5, n), -4, 4), random.uniform(0, 4 + 3 * i, n).clip(0, 10)
        eta = 0.5 + 0.4 * u - 0.1 * v
        y = {
            "linear": np.clip(3 * eta + random.normal(0, 1, n), -20, 20),
            "logistic": (random.random(n) < 1 / (1 + np.exp(-eta))).astype(float),
            "poisson": np.minimum(random.poisson(np.exp(eta)), 30).astype(float),
        }[family]
        tables[f"s{i}"] = federation.table({"u": u, "v": v, "y": y}, columns)
    return tables


def params_of(family: str, **more: Any) -> dict[str, Any]:
    return {"family": family, "target": "y", "features": list(FEATURES), **more}


def train(drive: Any, tables: dict[str, Table], params: dict[str, Any], start: Any = None, **options: Any) -> Any:
    schema = next(iter(tables.values())).schema
    return drive(build("horizontal.fedavg", params).coordinate(Cohort(tuple(tables), schema), start), tables, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_full_batch_epoch_is_centralised_gradient_descent(federation: Any, drive: Any, family: str) -> None:
    """Written a second time: w ← w − η · mean over all rows of (prediction − y) · x."""
    tables, rate, rounds = sites(federation, family), 0.05, 30
    params = params_of(family, rounds=rounds, local_epochs=1, batch_size=1000, learning_rate=rate)
    driven = train(drive, tables, params)
    pooled = concatenate(list(tables.values()))
    x = np.column_stack([np.ones(len(pooled)), pooled["u"] / 4, (pooled["v"] - 5) / 5])
    y, w, losses = pooled["y"], np.zeros(3), []
    for _ in range(rounds):
        eta = x @ w
        mean = {"linear": eta, "logistic": 1 / (1 + np.exp(-eta)), "poisson": np.exp(eta)}[family]
        loss = {
            "linear": (y - eta) ** 2 / 2,
            "logistic": np.log1p(np.exp(eta)) - y * eta,
            "poisson": np.exp(eta) - y * eta,
        }[family]
        losses.append(loss.mean())
        w = w - rate * x.T @ (mean - y) / len(y)
    assert np.allclose(driven.result["model"].weights, w, rtol=0, atol=1e-12)
    assert np.allclose(driven.result["history"], losses, rtol=1e-12)
    assert [m.values["loss"] for m in driven.metrics] == driven.result["history"]
    named = driven.result["coefficients"]
    assert named["u"] == pytest.approx(w[1] / 4, abs=1e-12)
    assert named["intercept"] == pytest.approx(w[0] - w[2], abs=1e-12)  # the middle of v is 5, its half range too


def test_one_site_with_mini_batches_is_plain_sgd(federation: Any, drive: Any) -> None:
    """Algorithm 1 for K = 1, with the task's own shuffles."""
    from atoll.contract.rounds import Task, TaskId

    tables = sites(federation, "logistic", (50,))
    params = params_of("logistic", rounds=3, local_epochs=2, batch_size=8, learning_rate=0.3)
    driven = train(drive, tables, params)
    x = np.column_stack([np.ones(50), tables["s0"]["u"] / 4, (tables["s0"]["v"] - 5) / 5])
    y, w = tables["s0"]["y"], np.zeros(3)
    for number in range(3):
        shuffler = Task(TaskId("0" * 32, number, 0, "reply", "s0"), {}, (number, *b"s0")).shuffler()
        for _ in range(2):
            order = shuffler.permutation(50)
            for batch in np.split(order, range(8, 50, 8)):
                p = 1 / (1 + np.exp(-x[batch] @ w))
                w = w - 0.3 * x[batch].T @ (p - y[batch]) / len(batch)
    assert np.allclose(driven.result["model"].weights, w, rtol=0, atol=1e-13)


@pytest.mark.parametrize("every", [1, 3, 7])
def test_resuming_from_any_checkpoint_gives_the_same_bits(federation: Any, drive: Any, every: int) -> None:
    tables = sites(federation, "logistic")
    params = params_of("logistic", rounds=10, local_epochs=2, batch_size=16, checkpoint_every=every)
    whole = train(drive, tables, params)
    assert len(whole.checkpoints) == 10 // every
    for done, checkpoint in whole.checkpoints:
        resumed = train(drive, tables, params, start=dict(checkpoint.state), first_round=done)
        assert len(resumed.rounds) == 10 - done
        assert resumed.result["model"].weights.tobytes() == whole.result["model"].weights.tobytes()
        assert resumed.result["history"] == whole.result["history"]


def test_a_site_without_rows_changes_nothing(federation: Any, drive: Any) -> None:
    tables = sites(federation, "linear")
    params = params_of("linear", rounds=5)
    alone = train(drive, tables, params).result
    with_empty = train(drive, {**tables, "none": tables["s0"].rows(np.zeros(40, bool))}, params).result
    assert with_empty["model"].weights.tobytes() == alone["model"].weights.tobytes()
    assert with_empty["history"] == alone["history"]


def test_no_rows_at_all_is_an_error(federation: Any, drive: Any) -> None:
    tables = {n: t.rows(np.zeros(len(t), bool)) for n, t in sites(federation, "linear").items()}
    with pytest.raises(AtollError) as caught:
        train(drive, tables, params_of("linear"))
    assert caught.value.code == "update.no-weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_comes_near_the_pooled_optimum(federation: Any, drive: Any, family: str) -> None:
    tables = sites(federation, family)
    optimum = drive(
        build("horizontal.glm", params_of(family)).coordinate(Cohort(tuple(tables), tables["s0"].schema)), tables
    ).result["model"]
    start = LinearModel.zero(family, tables["s0"].schema, FEATURES, "y")  # type: ignore[arg-type]
    params = params_of(family, rounds=300, local_epochs=2, batch_size=20, learning_rate=0.06)
    reached = train(drive, tables, params).result["model"]
    pooled = concatenate(list(tables.values()))

    def loss(model: LinearModel) -> float:
        eta = model.design(np.column_stack([pooled[f] for f in FEATURES])) @ model.weights
        return float(model.loss(eta, pooled["y"]).mean())

    assert loss(reached) - loss(optimum) < 0.02 * (loss(start) - loss(optimum))
    assert np.abs(reached.weights - optimum.weights).max() < 0.1 * np.abs(optimum.weights).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_and_losses_are_clipped_to_the_declared_bound(federation: Any, family: str) -> None:
    """Targets far away and a high rate: what leaves is what the site clipped, not what the gate had to."""
    tables = sites(federation, family)
    top = {"linear": 20.0, "logistic": 1.0, "poisson": 30.0}[family]
    tables = {n: Table(t.schema, {**t.columns, "y": np.full(len(t), top)}) for n, t in tables.items()}
    rate = 0.02 if family == "poisson" else 5.0  # its loss, up to log(y!), then falls far below zero
    params = params_of(family, rounds=4, clip=0.05, learning_rate=rate)
    outcome = federation.run(federation.plan("horizontal.fedavg", params, tables), tables)
    assert np.abs(outcome["result"]["model"].weights).max() <= 4 * 0.05 + 1e-12
    assert np.abs(outcome["result"]["history"]).max() <= 0.05 + 1e-12
    bodies = federation.releases()
    assert len(bodies) == 12
    assert all(body["clipped"] == 0 for body in bodies)


def test_divergence_is_an_error_that_says_what_to_look_for(federation: Any) -> None:
    tables = sites(federation, "linear")
    params = params_of("linear", rounds=50, local_epochs=200, learning_rate=1e9, batch_size=4)
    with pytest.raises(AtollError) as caught:
        federation.run(federation.plan("horizontal.fedavg", params, tables), tables)
    assert caught.value.code == "reply.not-finite"
    assert "learning rate" in caught.value.remedy


def test_a_site_below_the_minimum_group_size_is_refused(federation: Any) -> None:
    """One person's gradient is that person's row."""
    tables = sites(federation, "linear", (40, 1, 30))
    policies = {"s1": Policy.sandbox().model_copy(update={"min_group_size": 5})}
    with pytest.raises(AtollError) as caught:
        federation.run(federation.plan("horizontal.fedavg", params_of("linear"), tables), tables, policies)
    assert (caught.value.code, caught.value.where["site"]) == ("disclosure.small-group", "s1")
    assert not [body for body in federation.releases() if body["site"] == "s1"]


def test_the_seed_decides_the_shuffles_and_nothing_else_does(federation: Any) -> None:
    tables = sites(federation, "logistic")

    def weights(seed: int) -> bytes:
        plan = federation.plan(
            "horizontal.fedavg", params_of("logistic", rounds=3, batch_size=8), tables, run={"seed": seed}
        )
        return federation.run(plan, tables)["result"]["model"].weights.tobytes()

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)
