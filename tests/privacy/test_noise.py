"""Differential privacy in a whole federation: what the noise is, who adds it, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError
from atoll.data.table import Table
from atoll.runtime.budget import Budget
from atoll.runtime.policy import Policy

COLUMNS: dict[str, dict[str, Any]] = {"x": {"range": [-50, 100]}, "sick": {"dtype": "integer", "values": [0, 1]}}


def tables_of(federation: Any, sites: int = 4, rows: int = 500) -> dict[str, Table]:
    random = np.random.default_rng(5)
    made = {}
    for i in range(sites):
        x = random.normal(i, 9, rows).clip(-50, 100)
        made[f"s{i}"] = federation.table({"x": x, "sick": (x > i).astype(float)}, COLUMNS, max_rows=1000)
    return made


def asked(federation: Any, tables: Any, privacy: dict[str, Any], protection: Any = "secagg", **more: Any) -> Any:
    cohort = {"min_sites": len(tables)}
    privacy = {"unit": "record", "epsilon": 1.0, "delta": 1e-6, **privacy}
    program = more.pop("program", "statistics.frequency")
    params = more.pop("params", {"columns": ["sick"]})
    return federation.plan(program, params, tables, protection=protection, cohort=cohort, privacy=privacy, **more)


@pytest.mark.parametrize(
    ("mechanism", "protection"),
    [*((m, p) for m in ("discrete_gaussian", "laplace", "geometric") for p in ("plain", "secagg")), ("gaussian", "plain")],
)
def test_counts_carry_noise_and_a_price(federation: Any, mechanism: str, protection: str) -> None:
    tables = tables_of(federation)
    federation.run(asked(federation, tables, {"mechanism": mechanism}, protection), tables)
    charged = [body["epsilon"] for body in federation.releases() if body["step"] == "reply"]
    assert charged and all(0 < epsilon <= 1 for epsilon in charged)


def test_a_budget_that_is_spent_refuses(federation: Any) -> None:
    tables = tables_of(federation)
    open_ = Policy.sandbox().model_copy(update={"budgets": {"*": Budget(epsilon=1.5)}})
    federation.run(asked(federation, tables, {}), tables, dict.fromkeys(tables, open_))
    federation.submit(asked(federation, tables, {}))
    with pytest.raises(AtollError) as caught:
        federation.drive()
    assert [part.code for part in caught.value.parts] == ["budget.spent"] * len(tables)
