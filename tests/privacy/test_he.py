"""Homomorphic encryption in a whole federation: the same numbers as plain, whoever drops out but the key holder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, IntegrityError, PlanError, ProtocolError, TransportError
from atoll.contract.protection import OWN
from atoll.contract.rounds import count, real
from atoll.contract.wire import Message
from atoll.data.table import Table
from atoll.privacy.he.slots import Slots
from atoll.transport.base import Endpoint, Progress

COLUMNS: dict[str, dict[str, Any]] = {
    "x": {"range": [-50, 100]},
    "sick": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
PAILLIER = {"sum": "paillier", "key_bits": 2048}


def tables_of(federation: Any, sites: int = 4, rows: int = 40) -> dict[str, Table]:
    random = np.random.default_rng(5)
    made = {}
    for i in range(sites):
        x = random.normal(i, 9, rows).clip(-50, 100)
        made[f"s{i}"] = federation.table({"x": x, "sick": (x + random.normal(0, 9, rows) > i).astype(float)}, COLUMNS)
    return made


def glm(federation: Any, tables: Mapping[str, Table], protection: Any, **more: Any) -> Any:
    params = {"family": "logistic", "target": "sick", "features": ["x"]}
    return federation.plan("horizontal.glm", params, tables, protection=protection, **more)


def test_it_gives_what_plain_gives(federation: Any) -> None:
    tables = tables_of(federation)
    plain = federation.run(glm(federation, tables, "plain"), tables)["result"]
    hidden = federation.run(glm(federation, tables, PAILLIER), tables)["result"]
    assert hidden["rows"] == plain["rows"]
    assert np.allclose(hidden["model"].weights, plain["model"].weights, rtol=0, atol=1e-9)
