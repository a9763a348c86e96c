"""What ends a run and what does not: a sum that fails at the coordinator, and a site that drops out as it opens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import DisclosureError, ProtocolError
from atoll.runtime.cohort import Attendance

COLUMNS: dict[str, dict[str, Any]] = {
    "x": {"dtype": "real", "range": [0, 1]},
    "g": {"dtype": "integer", "values": [0, 1]},
}


def test_a_total_of_too_few_people_names_round_and_step(federation: Any) -> None:
    data = {name: federation.table({"x": np.ones(1), "g": np.ones(1)}, COLUMNS) for name in ("a", "b", "c")}
    plan = federation.plan("statistics.describe", {"columns": ["x"]}, data, protection="secagg")
    with pytest.raises(DisclosureError) as caught:
        federation.run(plan, data)
    assert (caught.value.code, caught.value.where["round"]) == ("disclosure.small-group", 0)
    assert caught.value.where["step"].startswith("statistics.describe/")


def test_a_site_without_memory_at_the_opening_drops_out(federation: Any) -> None:
    data = {name: federation.table({"x": np.ones(9), "g": np.ones(9)}, COLUMNS) for name in ("a", "b", "c")}
    plan = federation.plan("statistics.describe", {"columns": ["x"]}, data, protection="plain")
    federation.run(plan, data)
    told: list[dict[str, Any]] = []
    cohort = Attendance(
        federation.run_id, plan, tuple(data), federation.transport, federation.store, lambda **event: told.append(event)
    )
    cohort.opening({"a": ProtocolError("site.out-of-memory", "not enough memory at the site")})
    assert told[0]["dropout"] == "a" and "a dropped out" in cohort.note()
