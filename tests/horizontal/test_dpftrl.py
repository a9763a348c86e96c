"""DP-FTRL: without noise it is gradient descent over a partition; with it, the noise of the rounds is a tree's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PlanError
from atoll.contract.privacy import Privacy
from atoll.contract.rounds import real
from atoll.contract.sensitivity import within
from atoll.crypto.prg import Stream, derive
from atoll.data.table import Table
from atoll.models.linear import LinearModel
from atoll.privacy.dp.release import Noise

COLUMNS: dict[str, dict[str, Any]] = {
    "day": {"range": [0, 10]},
    "x": {"range": [-3, 3]},
    "sick": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
PARAMS = {
    "family": "logistic", "target": "sick", "features": ["x"], "rounds": 10, "expected_rows": 1200, "time": "day",
    "learning_rate": 2.0,
}  # fmt: skip


def tables_of(federation: Any) -> dict[str, Table]:
    random = np.random.default_rng(11)
    made = {}
    for i in range(3):
        x, day = random.normal(0, 1, 400).clip(-3, 3), random.uniform(0, 10, 400)
        sick = (random.random(400) < 1 / (1 + np.exp(-2 * x))).astype(float)
        made[f"s{i}"] = federation.table({"day": day, "x": x, "sick": sick}, COLUMNS, max_rows=1000)
    return made


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_without_noise_it_is_descent_over_the_periods(federation: Any, protection: str) -> None:
    tables = tables_of(federation)
    plan = federation.plan("horizontal.dpftrl", PARAMS, tables, protection=protection)
    found = federation.run(plan, tables)["result"]["model"].weights
    x = np.concatenate([table["x"] for table in tables.values()])
    y = np.concatenate([table["sick"] for table in tables.values()])
    day = np.concatenate([table["day"] for table in tables.values()])
    model = LinearModel.zero("logistic", next(iter(tables.values())).schema, ("x",), "sick")
    weights = np.zeros(2)
    for period in range(10):
        rows = (day >= period) & (day < period + 1)
        design = model.design(x[rows, None])
        gradients = design * (model.mean(design @ weights) - y[rows])[:, None]
        gradients /= np.maximum(1, np.linalg.norm(gradients, axis=1))[:, None]
        weights = weights - 2.0 * gradients.sum(axis=0) * 10 / 1200
    assert np.allclose(found, weights, atol=1e-4)


def test_the_noise_of_running_sums_is_that_of_few_nodes() -> None:
    privacy = Privacy(unit="record", epsilon=1, delta=1e-6)
    steps, size, secret = 32, 4000, b"s" * 32
    noise = Noise(privacy, [1.0] * steps, 1, shared=False, once=range(steps))
    declared = {"g": real(size, bound=10.0, step=1e-6)}
    running, spread = np.zeros(size), []
    for number in range(steps):
        fields, scales = noise.fitted(number, declared, {"g": within(1.0, size)})
        told = noise.add(number, {"g": np.zeros(size)}, fields, scales, lambda what: Stream(derive(secret, what)))
        assert np.abs(told["g"]).max() <= fields["g"].bound
        running += told["g"]
        spread.append(running.std() / (scales["g"] * fields["g"].step))
    nodes = [bin(number + 1).count("1") for number in range(steps)]
    assert np.allclose(spread, np.sqrt(nodes), rtol=0.05)
    assert noise.costs[0] == pytest.approx(noise.costs[-1]) and noise.costs[-1] <= 1
    single = Noise(privacy, [1.0] * steps, 1, shared=False)
    assert noise.multipliers[0] < 0.6 * single.multipliers[0]


def test_a_tree_needs_the_same_sites_throughout(federation: Any) -> None:
    tables = tables_of(federation)
    privacy = {"unit": "record", "epsilon": 5, "delta": 1e-5}
    few = federation.plan(
        "horizontal.dpftrl", PARAMS, tables, protection="secagg", privacy=privacy, cohort={"min_sites": 2}
    )
    with pytest.raises(AtollError) as caught:
        federation.run(few, tables)
    assert isinstance(caught.value, PlanError) and caught.value.code == "privacy.tree-dropouts"
    whole = federation.plan(
        "horizontal.dpftrl", PARAMS, tables, protection="secagg", privacy=privacy, cohort={"min_sites": 3}
    )
    learned = federation.run(whole, tables)["result"]["model"].weights
    assert learned[1] > 0.5  # it learns that x matters, through the noise
