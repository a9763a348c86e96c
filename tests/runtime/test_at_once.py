"""Two runs at once that demand the same: one site's whole privacy budget. One gets it, and nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PrivacyBudgetError
from atoll.data.table import Table
from atoll.runtime.budget import Budget
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.policy import Policy

LABEL = {"dtype": "integer", "values": [0, 1], "role": "label"}
EPSILON = 3.0


def tables_of(federation: Any) -> dict[str, Table]:
    random, made = np.random.default_rng(1), {}
    for i in range(3):
        u = random.uniform(-4, 4, 60)
        made[f"s{i}"] = federation.table({"u": u, "y": (u > 0) * 1.0}, {"u": {"range": [-4, 4]}, "y": LABEL})
    return made


@pytest.mark.parametrize("number", [2, 4])
def test_exactly_one_gets_a_budget_that_is_enough_for_one(federation: Any, number: int) -> None:
    tables = tables_of(federation)
    budget = Budget(epsilon=EPSILON, delta=1e-3, exact_releases=None)
    policies = {"s1": Policy.sandbox().model_copy(update={"budgets": {"*": budget}})}
    params = {"family": "logistic", "target": "y", "features": ["u"], "rounds": 3, "clip": 0.5, "clip_norm_l2": 0.5}
    plan = federation.plan(
        "horizontal.fedavg", params, tables, protection="secagg", cohort={"min_sites": 3}, dataset="d",
        privacy={"unit": "site", "epsilon": EPSILON, "delta": 1e-6}, run={"evaluate": False, "holdout": 0},
    )  # fmt: skip
    federation.build(tables, policies, threads=12)
    runs = [federation.submit(plan) for _ in range(number)]
    coordinator = Coordinator(federation.transport, federation.store, federation.ledger)

    async def together() -> list[Any]:
        return await asyncio.gather(*(coordinator.run(run) for run in runs), return_exceptions=True)

    found = asyncio.run(together())
    refused = [one for one in found if isinstance(one, AtollError)]
    assert len(refused) == number - 1
    for error in refused:
        assert isinstance(error, PrivacyBudgetError)
        parts = error.parts or (error,)
        assert {(part.code, part.where["site"]) for part in parts} == {("budget.spent", "s1")}
        assert all(part.remedy for part in parts)
    ended = [federation.store.run(run)["status"] for run in runs]
    assert sorted(ended) == ["failed"] * (number - 1) + ["finished"]
    winner = runs[ended.index("finished")]
    assert len(federation.store.rounds(winner)) == 3
    spent = federation.journals["s1"].spent("d", budget)
    assert 0.9 * EPSILON < spent.epsilon <= EPSILON
    for name, journal in federation.journals.items():
        for run in runs:
            assert journal.status(run) == federation.store.run(run)["status"], name
        assert journal.spent("d", Budget()).epsilon <= EPSILON, "what the others reserved at other sites is free again"
    for ledger in federation.ledgers().values():
        assert not ledger.unacknowledged
