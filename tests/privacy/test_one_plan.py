"""A coordinator that tells the sites of one run different plans, or another roster than the plan's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, IntegrityError, PlanError
from atoll.contract.plan import Plan
from atoll.contract.wire import Message
from atoll.data.table import Table
from atoll.runtime import courier
from atoll.runtime.policy import Policy
from atoll.runtime.roster import among
from atoll.runtime.study import check_plan, settled

SITES = tuple("vwxyz")


def tables_of(federation: Any) -> dict[str, Table]:
    random, told = np.random.default_rng(3), {"x": {"dtype": "real", "range": [0, 100]}}
    return {name: federation.table({"x": list(random.uniform(0, 100, 40))}, told) for name in SITES}


def describe(federation: Any, tables: dict[str, Table], protection: str | dict[str, Any], **more: Any) -> Plan:
    cohort = {"min_sites": 5, "sites": list(SITES), "on_dropout": "fail"}
    plan: Plan = federation.plan(
        "statistics.describe", {"columns": ["x"]}, tables, protection=protection, cohort=cohort, **more
    )
    return plan


def automatic() -> dict[str, Policy]:
    return {name: Policy(approval="automatic", roster="automatic") for name in SITES}


def told_another(plan: Plan) -> Callable[..., Any]:
    """All sites but v are told *plan* when the run is opened."""

    def wrap(name: str, endpoint: Any) -> Any:
        def answer(message: Message, progress: Any) -> Message:
            if message.kind == "open" and name != "v":
                message = Message("open", {**message.meta, "plan": plan.to_json()})
            found: Message = endpoint(message, progress)
            return found

        return answer

    return wrap


@pytest.mark.parametrize(
    "protection", ["secagg", {"sum": "secagg", "adversary": "active"}, {"sum": "paillier", "key_bits": 2048}],
    ids=["secagg", "active", "paillier"],
)  # fmt: skip
@pytest.mark.parametrize("private", [False, True])
def test_sites_with_different_plans_are_never_in_one_sum(
    federation: Any, monkeypatch: pytest.MonkeyPatch, protection: Any, private: bool
) -> None:
    """Else the others could be given a plan by which they add nothing, or no noise, and v's own numbers remain."""
    tables, promised = tables_of(federation), {"unit": "record", "epsilon": 1.0, "delta": 1e-6}
    if private:
        plan = describe(federation, tables, protection, privacy=promised)
        other = describe(federation, tables, protection, privacy={**promised, "epsilon": 9.0})
    else:
        plan = describe(federation, tables, protection)
        other = plan.model_copy(update={"run": plan.run.model_copy(update={"holdout": 0.9999})})
    monkeypatch.setattr(courier, "verify_release", lambda *_, **__: None)  # what an honest coordinator would notice
    federation.build(tables, automatic(), wrap=told_another(other))
    federation.submit(plan)
    with pytest.raises(AtollError) as caught:
        federation.drive()
    assert isinstance(caught.value, IntegrityError), caught.value
    assert caught.value.code in ("secagg.signature", "session.not-signed", "he.key-signature")


@pytest.mark.parametrize("roster", [SITES[:4], (*SITES, "stranger")])
def test_a_roster_that_is_not_of_the_plans_sites_is_refused(federation: Any, roster: tuple[str, ...]) -> None:
    tables = tables_of(federation)
    plan = describe(federation, tables, "secagg")
    more = {**tables, "stranger": tables["v"]}
    federation.build(more, {name: Policy(approval="automatic", roster="automatic") for name in more})
    keys = {name: federation.sites[name]._identity.public.hex() for name in roster}
    meta = {"id": "o", "run": "ab" * 16, "plan": settled(plan).to_json(), "roster": keys}
    told = federation.sites["v"].handle(Message("open", meta), lambda _: None)
    assert (told.kind, told.meta["code"]) == ("failure", "roster.other-sites")


def test_clusters_are_refused_against_an_active_coordinator(federation: Any) -> None:
    """Sites choose themselves of which sum they are, by weights that the coordinator made."""
    told = {name: {"dtype": "real", "range": [0, 100]} for name in "xy"}
    tables = {"v": federation.table({"x": [1.0, 2.0], "y": [3.0, 4.0]}, told)}
    params = {"target": "y", "family": "linear", "features": ["x"], "rounds": 1, "clusters": 2}
    protection = {"sum": "secagg", "adversary": "active"}
    with pytest.raises(PlanError) as caught:
        check_plan(federation.plan("horizontal.ifca", params, tables, protection=protection))
    assert caught.value.code == "plan.active-choice"
    check_plan(federation.plan("horizontal.ifca", {**params, "clusters": 1}, tables, protection=protection))


def test_a_sandbox_rehearses_a_plan_of_other_sites(federation: Any) -> None:
    plan = describe(federation, tables_of(federation), "secagg")
    assert among(plan, SITES) is plan
    assert among(plan, ("one", "two")).cohort.sites == ()
    assert among(plan, ("one", "two")).cohort.min_sites == plan.cohort.min_sites
