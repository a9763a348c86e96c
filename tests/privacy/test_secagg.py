"""Secure aggregation in a whole federation: the same numbers as plain, whoever drops out, and nothing but the sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import TransportError
from atoll.contract.wire import Message
from atoll.data.table import Table
from atoll.transport.base import Endpoint, Progress

COLUMNS: dict[str, dict[str, Any]] = {
    "x": {"range": [-50, 100]},
    "sick": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
STEPS = ("shares", "reply", "agree", "unmask")


def tables_of(federation: Any, sites: int = 5, rows: int = 40) -> dict[str, Table]:
    random = np.random.default_rng(5)
    made = {}
    for i in range(sites):
        x = random.normal(i, 9, rows).clip(-50, 100)
        made[f"s{i}"] = federation.table({"x": x, "sick": (x + random.normal(0, 9, rows) > i).astype(float)}, COLUMNS)
    return made


def glm(federation: Any, tables: Mapping[str, Table], protection: Any, **more: Any) -> Any:
    params = {"family": "logistic", "target": "sick", "features": ["x"]}
    return federation.plan("horizontal.glm", params, tables, protection=protection, **more)


def gone_at(step: str, who: tuple[str, ...], number: int = 1) -> Any:
    """Sites *who* cannot be reached from *step* of round *number* on."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        lost = False

        def handle(message: Message, progress: Progress) -> Message:
            nonlocal lost
            at = (message.meta.get("round"), message.meta.get("step"))
            lost = lost or (name in who and at == (number, step))
            if lost:
                raise TransportError("link.lost", "gone", field=name)
            return endpoint(message, progress)

        return handle

    return wrap


@pytest.mark.parametrize("adversary", ["curious", "active"])
def test_it_gives_what_plain_gives(federation: Any, adversary: str) -> None:
    tables = tables_of(federation)
    plain = federation.run(glm(federation, tables, "plain"), tables)["result"]
    hidden = federation.run(glm(federation, tables, {"sum": "secagg", "adversary": adversary}), tables)["result"]
    assert hidden["rows"] == plain["rows"] == 200
    assert np.allclose(hidden["model"].weights, plain["model"].weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("step", STEPS)
def test_sites_that_drop_out_at_any_step(federation: Any, step: str) -> None:
    tables = tables_of(federation)
    plan = glm(federation, tables, "secagg", cohort={"min_sites": 3}, run={"deadline_s": 20})
    outcome = federation.run(plan, tables, wrap=gone_at(step, ("s1", "s3")))["result"]
    left = {name: tables[name] for name in ("s0", "s2", "s4")}
    alone = federation.run(glm(federation, left, "plain"), left)["result"]
    assert outcome["rows"] == 120
    assert np.allclose(outcome["model"].weights, alone["model"].weights, rtol=1e-6)
