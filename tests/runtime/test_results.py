"""What result.json says of a run's protection: true sentences, and what was spent."""

from __future__ import annotations

from typing import Any

import pytest

from atoll.contract.protection import PROTECTIONS
from atoll.runtime.results import PROTECTED, Seen, told_privacy

COLUMNS: dict[str, dict[str, Any]] = {"x": {"dtype": "integer", "values": [0, 1]}, "y": {"range": [0, 9]}}
PRIVACY = {"unit": "record", "epsilon": 2.0, "delta": 1e-6}


def tables_of(federation: Any, sites: int = 4) -> dict[str, Any]:
    data = {"x": [0, 1] * 20, "y": list(range(8)) * 5}
    return {f"s{i}": federation.table(data, COLUMNS, max_rows=1000) for i in range(sites)}


def frequency(federation: Any, tables: Any, protection: Any = "secagg", **more: Any) -> Any:
    return federation.plan("statistics.frequency", {"columns": ["x"]}, tables, protection=protection, **more)


def told(federation: Any, plan: Any, tables: Any, **options: Any) -> dict[str, Any]:
    federation.run(plan, tables, **options)
    return dict(federation.store.result(federation.run_id)[0]["privacy"])


def test_every_protection_says_who_learned_what() -> None:
    assert set(PROTECTED) == set(PROTECTIONS)


def test_masked_sums(federation: Any) -> None:
    tables = tables_of(federation)
    found = told(federation, frequency(federation, tables), tables)
    assert found["statement"] == (
        "Sums were masked: the coordinator saw only the sum of 4 sites, and no site saw another's numbers."
    )
    assert found["survivors"] == 4 and found["noised"] is False and found["warnings"] == []
    assert found["unit"] is found["epsilon"] is found["delta"] is found["spent"] is None


def test_fewest_survivors_are_told(federation: Any) -> None:
    tables = tables_of(federation)
    plan = frequency(federation, tables)
    found = told_privacy(plan, dict.fromkeys(tables, 40), seen=Seen(survivors=3))
    assert "the sum of at least 3 of 4 sites" in found["statement"]


def test_the_key_holder_is_named(federation: Any) -> None:
    tables = tables_of(federation)
    for name in ("paillier", "ckks"):
        named = frequency(federation, tables, {"sum": name, "key_holder": "s2"})
        assert "Site s2, which held the key" in told_privacy(named, dict.fromkeys(tables, 40))["statement"]
        unnamed = told_privacy(frequency(federation, tables, name), dict.fromkeys(tables, 40))["statement"]
        assert "One of the sites, which held the key" in unnamed and "{" not in unnamed


def test_single_replies_are_not_hidden_behind_a_masked_sum(federation: Any) -> None:
    tables = tables_of(federation)
    plan = federation.plan("statistics.quality", {}, tables, protection="secagg")
    found = told(federation, plan, tables)
    assert "single sites' replies to statistics.quality" in found["statement"]


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_noise_its_unit_and_what_was_spent(federation: Any, protection: str) -> None:
    tables = tables_of(federation)
    found = told(federation, frequency(federation, tables, protection, privacy=PRIVACY), tables)
    assert found["noised"] is True and "noise" in found["statement"]
    assert {key: found[key] for key in PRIVACY} == PRIVACY and found["mechanism"] == "discrete_gaussian"
    charged = [body["epsilon"] for body in federation.releases() if body["step"] == "reply"]
    assert max(charged) == found["spent"] <= 2.0


def test_a_delta_of_one_in_all_units_or_more_is_warned_of(federation: Any) -> None:
    tables = tables_of(federation)
    large = frequency(federation, tables, privacy={**PRIVACY, "delta": 0.01})
    rows = dict.fromkeys(tables, 40)
    assert "not below 1/160" in told_privacy(large, rows)["warnings"][0]
    assert told_privacy(frequency(federation, tables, privacy=PRIVACY), rows)["warnings"] == []
    sites = frequency(federation, tables, privacy={**PRIVACY, "unit": "site", "delta": 0.3})
    assert "not below 1/4" in told_privacy(sites, dict.fromkeys(tables))["warnings"][0]
    assert told_privacy(large, {**rows, "s0": None})["warnings"] == [], "a site that does not tell its rows"
