"""Combinations that cannot work are refused at once, with all their conflicts."""

from __future__ import annotations

import pytest

from atoll.contract.capabilities import MEANING, Capabilities, conflicts
from atoll.contract.errors import PlanError


def part(name: str, needs: str = "", offers: str = "") -> Capabilities:
    return Capabilities(name, frozenset(needs.split()), frozenset(offers.split()))


def test_a_legal_combination_has_no_conflicts() -> None:
    program = part("mean", "sum", "bounded resolution")
    assert conflicts([program, part("secagg", "bounded resolution", "sum")]) == []
    assert conflicts([part("mean"), part("plain")]) == []
    assert conflicts([]) == []


def test_all_conflicts_are_listed() -> None:
    found = conflicts([part("krum", "gather stream", "bounded"), part("secagg", "bounded resolution", "sum")])
    assert [(error.field, type(error), error.code) for error in found] == [
        ("gather", PlanError, "plan.illegal-combination"),
        ("stream", PlanError, "plan.illegal-combination"),
        ("resolution", PlanError, "plan.illegal-combination"),
    ]
    for error, (needing, other) in zip(found, [("krum", "secagg")] * 2 + [("secagg", "krum")], strict=True):
        assert str(error).startswith(f"{needing} needs {MEANING[error.field]}") and other in str(error)
        assert error.remedy


def test_no_part_satisfies_itself() -> None:
    assert [e.field for e in conflicts([part("a", "sum", "sum"), part("b")])] == ["sum"]


def test_a_third_part_may_offer_what_is_needed() -> None:
    parts = [part("dp", "bounded-weight"), part("mean", "sum", "bounded"), part("both", "", "sum bounded-weight")]
    assert conflicts(parts) == []
    assert [e.field for e in conflicts(parts[:2])] == ["bounded-weight", "sum"]


@pytest.mark.parametrize("given", [{"needs": "magic"}, {"offers": "magic sum"}])
def test_unknown_tags_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(PlanError, match="magic") as error:
        part("odd", **given)
    assert error.value.code == "capability.unknown"
