"""What taking part is worth to a site, as result.json says it."""

from __future__ import annotations

from typing import Any

from atoll.runtime.value import value_of


def result(**more: Any) -> dict[str, Any]:
    per_site = {
        "a": {"local": {"auc": 0.7, "accuracy": 0.6}, "federated": {"auc": 0.8, "accuracy": 0.5}},
        "b": {"local": {"auc": 0.9}, "federated": {"auc": 0.85}},
    }
    return {"sites": {"a": {"rows": 30}, "b": {"rows": 10}}, "metrics": {"per_site": per_site}, "output": {}, **more}


def test_gains_are_positive_where_the_shared_model_is_better() -> None:
    found = value_of(result())
    assert found["metric"] == "auc"
    assert found["sites"]["a"]["gain"] == 0.8 - 0.7
    assert found["sites"]["b"]["gain"] == 0.85 - 0.9
    assert [one["row_share"] for one in found["sites"].values()] == [0.75, 0.25]
    assert found["sites"]["a"]["contribution"] is None


def test_of_errors_less_is_more() -> None:
    per_site = {"a": {"local": {"mae": 3.0, "r2": None}, "federated": {"mae": 2.0, "r2": None}}}
    found = value_of(result(metrics={"per_site": per_site}, sites={"a": {"rows": None}}))
    assert (found["metric"], found["sites"]["a"]["gain"], found["sites"]["a"]["row_share"]) == ("mae", 1.0, None)


def test_the_model_that_a_site_ends_with_is_its_personal_one() -> None:
    own = {"a": {"local": {"auc": 0.7}, "federated": {"auc": 0.6}, "personal": {"auc": 0.9}}}
    assert value_of(result(metrics={"per_site": own}))["sites"]["a"]["federated"] == 0.9


def test_contributions_stand_beside_gains_or_alone() -> None:
    told = {
        "contribution": {"method": "gtg", "sites": {"a": {"value": 0.2, "share": 1.0}, "b": {"value": -1, "share": 0}}}
    }
    both = value_of(result(output=told))
    assert (both["sites"]["b"]["contribution"], both["sites"]["b"]["value"]) == (0, -1)
    alone = value_of(result(output=told, metrics={"per_site": {}}))
    assert (alone["metric"], alone["sites"]["a"]["gain"], alone["sites"]["a"]["contribution"]) == (None, None, 1.0)


def test_where_nothing_is_known_nothing_is_said() -> None:
    assert value_of(result(metrics={"per_site": {"a": {"federated": {"auc": 0.8}}}})) == {}
    assert value_of({"sites": {}}) == {}
