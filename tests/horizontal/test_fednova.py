"""FedNova: the paper's quadratic toy, whose fixed points are known in closed form, and FedAvg where work is equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.program import Cohort, build
from atoll.data.table import Table
from atoll.horizontal.local import effort

RATE = 0.02
GOALS = {"s0": -3.0, "s1": 1.0, "s2": 6.0}
ROWS = {"s0": 40, "s1": 10, "s2": 20}


def quadratics(federation: Any, rows: dict[str, int] = ROWS) -> dict[str, Table]:
    """Fₖ(w) = (w − eₖ)²/2 of the intercept alone: the feature is at the middle of its range, and every label is eₖ."""
    columns = {"u": {"range": [-1, 1]}, "y": {"range": [-20, 20], "role": "label"}}
    return {
        site: federation.table({"u": np.zeros(n), "y": np.full(n, GOALS[site])}, columns, max_rows=1000)
        for site, n in rows.items()
    }


def train(drive: Any, name: str, tables: dict[str, Table], **more: Any) -> Any:
    params = {"family": "linear", "features": ["u"], "target": "y", "batch_size": 5, "learning_rate": RATE, **more}
    return drive(build(name, params).coordinate(Cohort(tuple(tables), tables["s0"].schema)), tables)


@pytest.mark.parametrize("weighting", ["rows", "sites"])
def test_it_mends_the_inconsistent_objective(federation: Any, drive: Any, weighting: str) -> None:
    """§3, on quadratics. A site that takes τ steps comes 1 − (1 − η)^τ of the way to eₖ: FedAvg
    rests at the mean of eₖ with weights pₖ·(1 − (1 − η)^τₖ), FedNova with these divided by τₖ: as η → 0, with pₖ."""
    tables = quadratics(federation)
    steps = np.array([8, 2, 4])
    share = np.array(list(ROWS.values()) if weighting == "rows" else [1, 1, 1])
    way, goals = 1 - (1 - RATE) ** steps, np.array(list(GOALS.values()))
    resting = {
        "horizontal.fedavg": np.average(goals, weights=share * way),
        "horizontal.fednova": np.average(goals, weights=share * way / steps),
    }
    wanted = np.average(goals, weights=share)
    off = {}
    for name, point in resting.items():
        model = train(drive, name, tables, rounds=250, weighting=weighting).result["model"]
        assert model.weights[0] == pytest.approx(point, abs=1e-9)
        off[name] = abs(model.weights[0] - wanted)
    assert off["horizontal.fednova"] < 0.15 * off["horizontal.fedavg"]


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_each_round_is_normalised_averaging(federation: Any, drive: Any, momentum: float) -> None:
    """§4, with ‖a‖₁ by adding up, step by step, how often each gradient stands in the change."""
    tables = quadratics(federation)
    driven = train(drive, "horizontal.fednova", tables, rounds=6, local_epochs=2, momentum=momentum)
    w, share = 0.0, np.array([4, 1, 2]) / 7
    for asked in driven.rounds:
        assert asked.send["weights"][0] == pytest.approx(w, abs=1e-12)
        normed, efforts = [], []
        for site, rows in ROWS.items():
            local, velocity, often = w, 0.0, 0.0
            counted = 0.0
            for _ in range(2 * rows // 5):
                velocity = momentum * velocity + (local - GOALS[site])
                often = momentum * often + 1
                counted += often
                local -= RATE * velocity
            normed.append((w - local) / counted)
            efforts.append(counted)
        w = w - (share @ efforts) * (share @ normed)
    assert driven.result["model"].weights[0] == pytest.approx(w, abs=1e-12)


def test_effort_counts_how_often_gradients_stand_in_a_change() -> None:
    for momentum in (0.0, 0.3, 0.99):
        for steps in (1, 2, 17):
            written = sum(momentum ** (later - step) for step in range(steps) for later in range(step, steps))
            assert effort(steps, momentum) == pytest.approx(written, rel=1e-9)
    assert effort(7, 0.0) == 7


def test_with_equal_steps_it_is_fedavg(federation: Any, drive: Any) -> None:
    tables = quadratics(federation)
    for more in ({"local_steps": 6}, {"local_steps": 6, "momentum": 0.5, "weighting": "sites"}):
        ours, fedavg = (
            train(drive, name, tables, rounds=8, **more).result["model"].weights
            for name in ("horizontal.fednova", "horizontal.fedavg")
        )
        assert np.allclose(ours, fedavg, rtol=0, atol=1e-12)
        assert np.abs(ours).max() > 0.05


def test_steps_beyond_the_bound_count_as_fedavg_has_them(federation: Any, drive: Any) -> None:
    """Where all sites take more, FedNova is FedAvg with the same bound on all."""
    tables = quadratics(federation)
    ours, fedavg = (
        train(drive, name, tables, rounds=8, **more)
        for name, more in (("horizontal.fednova", {"most_steps": 2}), ("horizontal.fedavg", {}))
    )
    assert np.allclose(ours.result["model"].weights, fedavg.result["model"].weights, rtol=0, atol=1e-12)
    assert ours.replies[0]["s0"]["steps"] == 2 * ROWS["s0"]


def test_a_site_without_rows_changes_nothing(federation: Any, drive: Any) -> None:
    tables = quadratics(federation)
    empty = {**tables, "none": tables["s0"].rows(np.zeros(40, bool))}
    for weighting in ("rows", "sites"):
        alone, beside = (
            train(drive, "horizontal.fednova", some, rounds=5, weighting=weighting).result for some in (tables, empty)
        )
        assert alone["model"].weights.tobytes() == beside["model"].weights.tobytes()
        assert alone["history"] == beside["history"]


def test_noise_of_the_steps_does_not_turn_the_federation_round(federation: Any) -> None:
    """With noise their mean may come out below zero."""
    from atoll.contract.rounds import Round, Summed

    schema = quadratics(federation)["s0"].schema
    params = {"family": "linear", "features": ["u"], "target": "y", "rounds": 2, "weighting": "sites"}
    steps = build("horizontal.fednova", params).coordinate(Cohort(("a", "b", "c"), schema, exact=False))
    item, asked = next(steps), []
    sums = {"weights": np.array([0.3, -0.6]), "loss": np.array(0.1), "steps": np.array(-5.0), "weight": np.array(3.0)}
    with pytest.raises(StopIteration):
        while True:
            asked += [item] if isinstance(item, Round) else []
            item = steps.send(Summed(sums, ("a", "b", "c")) if isinstance(item, Round) else None)
    assert np.allclose(asked[1].send["weights"], [0.1, -0.2])


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_it_runs_in_a_whole_federation_with_few_sites_a_round(federation: Any, drive: Any, protection: str) -> None:
    tables = quadratics(federation, {"s0": 40, "s1": 10, "s2": 20})
    params = {"family": "linear", "features": ["u"], "target": "y", "batch_size": 5, "learning_rate": RATE,
              "rounds": 5, "sites_per_round": 2}  # fmt: skip
    cohort = {"min_sites": 1} if protection == "plain" else {"min_sites": 2}
    plan = federation.plan("horizontal.fednova", params, tables, protection=protection, cohort=cohort)
    found = federation.run(plan, tables)["result"]["model"].weights
    by_hand = train(drive, "horizontal.fednova", tables, rounds=5, sites_per_round=2).result["model"].weights
    assert np.allclose(found, by_hand, rtol=0, atol=1e-6 if protection == "secagg" else 1e-12)


def test_what_follows_the_data_is_not_normalised(federation: Any, drive: Any) -> None:
    """Its mean change is taken as it is, however many steps there were."""
    pytest.importorskip("torch")
    random = np.random.default_rng(1)
    columns = {"u": {"range": [-1, 1]}, "y": {"range": [-20, 20], "role": "label"}}
    tables = {
        site: federation.table({"u": random.uniform(-1, 1, n), "y": random.normal(0, 1, n)}, columns, max_rows=1000)
        for site, n in ROWS.items()
    }
    params = {"target": "y", "model": {"kind": "mlp", "features": ["u"], "hidden": [3], "norm": "batch"},
              "rounds": 2, "batch_size": 5}  # fmt: skip
    trained = {}
    for name in ("horizontal.fednova", "horizontal.fedavg"):
        program = build(name, params)
        running = program.model(tables["s0"].schema).running  # type: ignore[attr-defined]
        driven = drive(program.coordinate(Cohort(tuple(tables), tables["s0"].schema)), tables)
        trained[name] = driven.rounds[1].send["weights"]
    ours, fedavg = trained["horizontal.fednova"], trained["horizontal.fedavg"]
    assert np.allclose(ours[running], fedavg[running], atol=1e-6)
    assert np.abs(ours - fedavg).max() > 1e-3
