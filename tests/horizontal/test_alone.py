"""What a site would have by itself: a run of its own, told only where its policy says so, and once."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PolicyError, ProtocolError
from atoll.contract.program import build, handler_of
from atoll.contract.rounds import Task, TaskId
from atoll.data.site_data import SiteData
from atoll.runtime.policy import Policy
from atoll.statistics.scores import binary_metrics

RATE, SIZE = 0.5, 8


def plan_of(federation: Any, study: Any, **more: Any) -> Any:
    params = study.params(rounds=3, batch_size=SIZE, learning_rate=RATE, alone=True, **more)
    run = {"holdout": 0.4, "seed": 5}
    return federation.plan("horizontal.fedavg", params, study.tables, run=run, protection="secagg")


def test_a_real_federation_tells_local_beside_federated(federation: Any, hospitals: Any) -> None:
    """As many passes over a site's own rows, written a second time."""
    study = hospitals()
    plan = plan_of(federation, study)
    shy = Policy.sandbox().model_copy(update={"share": ("rows",)})
    outcome = federation.run(plan, study.tables, {"s1": shy})
    assert set(outcome["result"]["alone"]) == {"s0", "s2"}
    number = next(e["round"] for e in federation.events if e.get("name") == "horizontal.fedavg/alone")
    result = federation.store.result(federation.run_id)[0]
    assert "local" not in result["metrics"]["per_site"]["s1"]
    assert "alone" not in result["output"]
    for site in ("s0", "s2"):
        local = result["metrics"]["per_site"][site]["local"]
        training, held = SiteData.of(study.tables[site], plan, site).parts({})
        seed = np.frombuffer(hashlib.sha256(f"atoll shuffle\0{5}\0{site}\0{number}".encode()).digest(), "<u4")
        shuffler = np.random.Generator(np.random.Philox(np.random.SeedSequence(tuple(seed.tolist()))))
        x = np.column_stack([np.ones(len(training)), training["u"] / 4, (training["v"] - 5) / 5])
        w = np.zeros(3)
        for _ in range(3):
            order = shuffler.permutation(len(training))
            for rows in np.split(order, range(SIZE, len(order), SIZE)):
                p = 1 / (1 + np.exp(-x[rows] @ w))
                w = w - RATE * x[rows].T @ (p - training["y"][rows]) / len(rows)
        eta = np.column_stack([np.ones(len(held)), held["u"] / 4, (held["v"] - 5) / 5]) @ w
        wanted = binary_metrics(held["y"], 1 / (1 + np.exp(-eta)))
        assert local["log_loss"] == float(f"{wanted['log_loss']:.3g}")
        assert local["auc"] == float(f"{wanted['auc']:.3g}")
        told = result["value"]["sites"][site]
        assert told["gain"] == pytest.approx(told["federated"] - told["local"])
    assert result["value"]["sites"]["s1"]["gain"] is None


def test_it_is_asked_once_and_only_where_the_plan_says_so(hospitals: Any, drive: Any) -> None:
    study = hospitals()
    made = build("horizontal.fedavg", study.params(rounds=3, alone=True))
    driven = study.train(drive, "horizontal.fedavg", study.params(rounds=3, alone=True))
    asked = handler_of(made, "alone")
    arrays = {"weights": np.zeros(3), "rounds": np.array(3)}
    task = Task(TaskId("0" * 32, 9, 0, "reply", "s0"), arrays, (1,))
    with pytest.raises(PolicyError) as again:
        asked.answer(made, driven.desks["s0"], task)
    driven.desks["s0"].state.clear()
    other = build("horizontal.fedavg", study.params(rounds=3))
    with pytest.raises(PolicyError) as never:
        asked.answer(other, driven.desks["s0"], task)
    assert again.value.code == never.value.code == "policy.not-in-plan"
    longer = Task(task.id, {**arrays, "rounds": np.array(4)}, (1,))
    with pytest.raises(ProtocolError):
        asked.answer(made, driven.desks["s0"], longer)
    driven.desks["s0"].share = ("rows",)
    with pytest.raises(PolicyError) as withheld:
        asked.answer(made, driven.desks["s0"], task)
    assert withheld.value.code == "policy.withheld"
