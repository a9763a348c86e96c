"""FedAvg: gradient descent when it must be, the same bits after a resume, and near the optimum in the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError
from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import Round, Summed
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table, concatenate
from atoll.models.linear import LinearModel
from atoll.models.model import LearnerParams
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


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_full_batch_epoch_is_centralised_gradient_descent(
    federation: Any, drive: Any, family: str, decay: float
) -> None:
    """Written a second time: w ← w − η / (1 + decay · t) · mean over all rows of (prediction − y) · x."""
    tables, rate, rounds = sites(federation, family), 0.05, 30
    params = params_of(family, rounds=rounds, local_epochs=1, batch_size=1000, learning_rate=rate, decay=decay)
    driven = train(drive, tables, params)
    pooled = concatenate(list(tables.values()))
    x = np.column_stack([np.ones(len(pooled)), pooled["u"] / 4, (pooled["v"] - 5) / 5])
    y, w, losses = pooled["y"], np.zeros(3), []
    for number in range(rounds):
        eta = x @ w
        mean = {"linear": eta, "logistic": 1 / (1 + np.exp(-eta)), "poisson": np.exp(eta)}[family]
        loss = {
            "linear": (y - eta) ** 2 / 2,
            "logistic": np.log1p(np.exp(eta)) - y * eta,
            "poisson": np.exp(eta) - y * eta,
        }[family]
        losses.append(loss.mean())
        w = w - rate / (1 + decay * number) * x.T @ (mean - y) / len(y)
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
    assert (caught.value.code, caught.value.where["round"]) == ("cohort.too-few-left", 0)
    assert "site.diverged" in caught.value.message
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


@pytest.mark.parametrize("size", [1, 8, 64])
def test_local_steps_are_so_many_mini_batches(federation: Any, drive: Any, size: int) -> None:
    """Also beyond an epoch's end; one step of one batch is one gradient."""
    from atoll.contract.rounds import Task, TaskId

    tables = sites(federation, "logistic", (50,))
    shuffler = Task(TaskId("0" * 32, 0, 0, "reply", "s0"), {}, (0, *b"s0")).shuffler()
    x = np.column_stack([np.ones(50), tables["s0"]["u"] / 4, (tables["s0"]["v"] - 5) / 5])
    y, w, order = tables["s0"]["y"], np.zeros(3), shuffler.permutation(50)
    common = {"rounds": 1, "batch_size": size, "learning_rate": 0.3}
    found = train(drive, tables, params_of("logistic", local_steps=1, **common)).result["model"].weights
    first = order[:size]
    error = 1 / (1 + np.exp(-x[first] @ w)) - y[first]
    assert np.allclose(found, w - 0.3 * x[first].T @ error / len(first), rtol=0, atol=1e-13)
    in_epoch = -(-50 // size)
    for epochs in (1, 3):
        by_steps = train(drive, tables, params_of("logistic", local_steps=epochs * in_epoch, **common))
        by_epochs = train(drive, tables, params_of("logistic", local_epochs=epochs, **common))
        assert by_steps.result["model"].weights.tobytes() == by_epochs.result["model"].weights.tobytes()


def test_the_whole_change_is_clipped_to_its_norm(federation: Any, drive: Any) -> None:
    """The direction is kept, and the declared norm of a site holds."""
    tables = sites(federation, "linear")
    free, bound = (params_of("linear", rounds=1, learning_rate=0.2, clip_norm_l2=n) for n in (None, 0.01))
    wide, tight = train(drive, tables, free), train(drive, tables, bound)
    for site, table in tables.items():
        change, clipped = (driven.replies[0][site]["weights"] / len(table) for driven in (wide, tight))
        assert np.linalg.norm(clipped) == pytest.approx(0.01, rel=1e-12)
        assert np.allclose(clipped / 0.01, change / np.linalg.norm(change), atol=1e-9)
    program = build("horizontal.fedavg", bound)
    norms = handler_of(program, "train").site(program, tables["s0"].schema, {})  # type: ignore[misc]
    for site in tables:
        assert set(norms) == set(tight.replies[0][site])
        for name, norm in norms.items():
            assert np.linalg.norm(tight.replies[0][site][name]) <= norm.l2


def test_a_network_with_one_full_step_is_descent_on_the_pooled_rows(federation: Any, drive: Any) -> None:
    pytest.importorskip("torch")
    tables = hospitals((30, 12, 45))
    params = {"target": "y", "model": {"kind": "cnn", "image": "image", "channels": [2], "hidden": 4},
              "rounds": 4, "batch_size": 100, "learning_rate": 0.2}  # fmt: skip
    driven = train(drive, tables, params)
    pooled = concatenate(list(tables.values()))
    model = LearnerParams(target="y", model=params["model"]).unfitted(pooled.schema)  # type: ignore[arg-type]
    weights, examples = model.initial(0), model.examples(pooled)
    for number in range(4):
        loss, gradient = model.loss_and_gradient(weights, examples)
        assert driven.result["history"][number] == pytest.approx(loss, rel=1e-5)
        weights = weights - 0.2 * gradient
    assert np.allclose(driven.result["model"].weights, weights, rtol=0, atol=1e-5)
    assert "coefficients" not in driven.result


def hospitals(sizes: tuple[int, ...]) -> dict[str, Table]:
    random = np.random.default_rng(1)
    columns = {
        "image": Column(dtype="image", shape=(6, 6)),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
    }
    schema = TableSchema(name="test", columns=columns)
    tables = {}
    for i, n in enumerate(sizes):
        images = random.integers(0, 256, (n, 6, 6), np.uint8)
        tables[f"h{i}"] = Table(schema, {"image": images, "y": (images[:, 0].mean(1) > 127).astype(float)})
    return tables


def test_a_network_is_trained_evaluated_and_told_by_a_whole_federation(federation: Any) -> None:
    """Where weights begin is decided by the plan's seed."""
    pytest.importorskip("torch")
    tables = hospitals((60, 80, 70))
    params = {"target": "y", "model": {"kind": "cnn", "image": "image", "channels": [4], "hidden": 8},
              "rounds": 3, "local_epochs": 2, "batch_size": 8}  # fmt: skip

    def outcome(seed: int) -> Any:
        run = {"holdout": 0.3, "seed": seed}
        return federation.run(federation.plan("horizontal.fedavg", params, tables, run=run), tables)

    first = outcome(1)
    assert 0.5 < first["evaluation"]["pooled"]["auc"] <= 1
    assert set(first["evaluation"]["own"]) == set(tables)
    assert outcome(1)["result"]["model"].weights.tobytes() == first["result"]["model"].weights.tobytes()
    assert outcome(2)["result"]["model"].weights.tobytes() != first["result"]["model"].weights.tobytes()


def test_noise_of_a_sites_weight_does_not_stop_the_run(federation: Any) -> None:
    """With noise the weights' sum may come out below zero."""
    schema = sites(federation, "linear")["s0"].schema
    steps = build("horizontal.fedavg", params_of("linear", rounds=2)).coordinate(
        Cohort(("a", "b", "c"), schema, exact=False)
    )
    value: Any = None
    with pytest.raises(StopIteration) as stopped:
        while True:
            item = steps.send(value)
            asked = isinstance(item, Round)
            total = {"weights": np.ones(3), "loss": np.array(1.0), "weight": np.array(-5.0)}
            value = Summed(total, ("a", "b", "c")) if asked else None
    assert stopped.value.value["model"].weights.tolist() == [2, 2, 2]
