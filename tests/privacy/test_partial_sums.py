"""Sums of some of the cohort, and of sites at different work: what a coordinator could choose, and what stops it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PlanError, PrivacyBudgetError
from atoll.contract.rounds import Round, Sum
from atoll.contract.wire import Message
from atoll.data.table import Table
from atoll.horizontal.gossip import Gossip
from atoll.horizontal.shapley import ShapleyFedAvg
from atoll.ledger.contributions import CONTRIBUTION
from atoll.runtime.coordinator import Driver
from atoll.runtime.policy import Policy
from atoll.runtime.study import check_plan

SITES = tuple(f"s{i}" for i in range(6))
COLUMNS = {
    "u": {"range": [-4, 4]}, "v": {"range": [0, 10]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}  # fmt: skip
LEARNER = {"family": "logistic", "features": ["u", "v"], "target": "y", "rounds": 2, "learning_rate": 0.2}
RUN = {"min_group_size": 5, "evaluate": False, "holdout": 0.0, "deadline_s": 60}
POLICY = Policy(approval="automatic", roster="automatic")
ACTIVE = {"sum": "secagg", "adversary": "active"}


def tables(federation: Any) -> dict[str, Table]:
    random, made = np.random.default_rng(1), {}
    for number, site in enumerate(SITES):
        u, v = random.uniform(-4, 4, 40 + number), random.uniform(0, 10, 40 + number)
        made[site] = federation.table({"u": u, "v": v, "y": (u > random.normal(0, 1, len(u))).astype(int)}, COLUMNS)
    return made


def plan_of(federation: Any, program: str, params: dict[str, Any] | None = None, **more: Any) -> Any:
    more = {"run": RUN, "cohort": {"min_sites": 3, "sites": SITES}, **more}
    return federation.plan(program, {**LEARNER, **(params or {})}, tables(federation), **more)


PARTIAL = [
    ("horizontal.fedbuff", {"buffer": 3}, {}),
    ("horizontal.fedavg", {"sites_per_round": 3}, {}),
    ("horizontal.fedavg", {"aggregate": {"rule": "median", "groups": 2}}, {}),
    ("horizontal.fedavg", {}, {"priority": {"s0": 0.5}}),
    ("horizontal.fedavg", {}, {"effort_min": 0.5}),
]


@pytest.mark.parametrize(("program", "params", "schedule"), PARTIAL)
def test_against_an_active_coordinator_every_sum_is_of_the_whole_cohort(
    federation: Any, program: str, params: dict[str, Any], schedule: dict[str, Any]
) -> None:
    """It could ask such cohorts, efforts or ages that two sums, or one, tell of a single site."""
    curious = plan_of(federation, program, params, protection="secagg", schedule=schedule)
    check_plan(curious)
    with pytest.raises(PlanError, match="tell of single sites"):
        check_plan(plan_of(federation, program, params, protection=ACTIVE, schedule=schedule))


@pytest.mark.parametrize(("program", "params", "schedule"), PARTIAL[:4])
def test_a_named_key_holder_may_not_be_among_some(
    federation: Any, program: str, params: dict[str, Any], schedule: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match="the key holder may not be"):
        named = {"sum": "paillier", "key_holder": "s0"}
        check_plan(plan_of(federation, program, params, protection=named, schedule=schedule))


def test_a_round_is_not_asked_again_with_another_effort(federation: Any, monkeypatch: Any) -> None:
    """The same sum of the same sites twice, one of them at less work, would tell what that one did in between."""
    real = Driver.sum

    async def again(self: Any, asked: Any, number: int, sites: Any, replies: Any) -> Any:
        for effort in (1.0, 0.5):
            each = {site: {"effort": np.array(effort if site == "s2" else 1.0)} for site in sites}
            replies.clear()
            total = await real(self, replace(asked, send_to=each), number, sites, replies)
        return total

    monkeypatch.setattr(Driver, "sum", again)
    plan = plan_of(federation, "horizontal.fedavg", {"rounds": 1}, protection="secagg", schedule={"effort_min": 0.5})
    with pytest.raises(AtollError) as caught:
        federation.run(plan, tables(federation), dict.fromkeys(SITES, POLICY))
    assert caught.value.where["site"] == "s2"
    assert isinstance(caught.value, PrivacyBudgetError) or "asked before" in str(caught.value)


def test_a_report_of_gossip_is_of_sites_that_were_in_it(federation: Any, monkeypatch: Any) -> None:
    """Else five zeros would show the sixth."""
    told, real = [], Gossip._told

    def narrow(self: Any, model: Any, sites: Any, iteration: int) -> Any:
        steps = real(self, model, SITES, iteration + 1)
        asked = next(steps)
        told.append(asked)
        total = yield asked
        return total

    monkeypatch.setattr(Gossip, "_told", narrow)
    plan = plan_of(federation, "horizontal.gossip", {"report_every": 1}, protection="secagg")
    with pytest.raises(AtollError, match=r"task\.array"):
        federation.run(plan, tables(federation), dict.fromkeys(SITES, POLICY))
    assert isinstance(told[0], Round) and told[0].reduce == Sum()


@pytest.mark.parametrize("name", ["weights", "loss", "weight"])
def test_a_site_that_sends_nan_is_named(federation: Any, monkeypatch: Any, name: str) -> None:
    real = ShapleyFedAvg.train

    def spoilt(self: Any, site: Any, task: Any) -> Any:
        reply = dict(real(self, site, task))
        return {**reply, name: np.full_like(np.asarray(reply[name], float), np.nan)} if site.name == "s3" else reply

    monkeypatch.setattr(ShapleyFedAvg, "train", spoilt)
    plan = plan_of(federation, "horizontal.shapley", {"method": "leave_one_out"}, protection="plain")
    with pytest.raises(AtollError) as caught:
        federation.run(plan, tables(federation))
    assert caught.value.code == "reply.not-finite" and caught.value.where["site"] == "s3"


def test_contributions_are_recorded_once_a_run(federation: Any) -> None:
    plan = plan_of(federation, "horizontal.shapley", {"method": "leave_one_out"}, protection="plain")
    federation.run(plan, tables(federation))
    federation.ledgers()
    first = federation.store.entry_of(CONTRIBUTION, federation.run_id)["body"]
    federation.ledger.record(CONTRIBUTION, {**first, "shares": {**dict.fromkeys(SITES, 0.0), "s0": 1.0}})
    with pytest.raises(AtollError, match="two records"):
        federation.ledgers()


def test_ages_are_of_steps_that_the_plan_has(federation: Any) -> None:
    """A version of 10³⁰⁰ would make all other changes nothing."""

    def wrap(name: str, endpoint: Any) -> Any:
        def answer(message: Message, progress: Any) -> Message:
            if message.kind == "task" and message.meta["name"] == "begin":
                arrays = {**message.arrays, "version": np.array(1e300)}
                message = Message(message.kind, message.meta, arrays)
            return endpoint(message, progress)

        return answer

    plan = plan_of(federation, "horizontal.fedbuff", {"buffer": 3}, protection="secagg")
    with pytest.raises(AtollError, match=r"task\.array"):
        federation.run(plan, tables(federation), dict.fromkeys(SITES, POLICY), wrap=wrap)


REMEMBERED = [
    ("horizontal.scaffold", {}),
    ("horizontal.feddyn", {}),
    ("horizontal.online", {"time": "v", "start": 0, "every": 5}),
    ("horizontal.fedavg", {"compress": {"bits": 8}}),
    ("horizontal.gossip", {}),
    ("horizontal.finetune", {}),
]


@pytest.mark.parametrize(("program", "params"), REMEMBERED)
def test_against_an_active_coordinator_no_sum_is_of_what_sites_remember(
    federation: Any, program: str, params: dict[str, Any]
) -> None:
    """Rounds that it begins among all but one site, and never ends, move what the others keep."""
    run = {**RUN, "evaluate": True, "holdout": 0.2}
    check_plan(plan_of(federation, program, params, protection="secagg", run=run))
    with pytest.raises(PlanError, match="what sites remember"):
        check_plan(plan_of(federation, program, params, protection=ACTIVE, run=run))


def test_a_hidden_share_is_not_cut_to_many_bounds(federation: Any, monkeypatch: Any) -> None:
    """Σ min(x, b) over many bounds b, or Σ of x rounded to many steps, would tell every site's x."""
    codes, real = list[str](), Driver.reduce

    async def again(self: Any, asked: Any, number: int) -> Any:
        await real(self, asked, number)
        for name, other in (("rows", {"bound": 43}), ("s1", {"step": 64.0}), ("rows", {"bound": 44})):
            changed = {**asked.reply, name: replace(asked.reply[name], **other)}
            try:
                await real(self, replace(asked, reply=changed), number + len(codes) + 1)
                codes.append("")
            except AtollError as error:
                codes.append(error.code)
        return await real(self, asked, number + 4)

    monkeypatch.setattr(Driver, "reduce", again)
    plan = plan_of(federation, "horizontal.fedavg", protection="secagg")
    plan = plan.model_copy(update={"program": "statistics.describe", "params": {"columns": ["u"]}})
    federation.run(plan, tables(federation), dict.fromkeys(SITES, POLICY))
    assert codes == ["", "task.bounds", "task.bounds"]


def test_bounds_that_follow_from_what_is_sent_are_not_made_narrower(federation: Any, monkeypatch: Any) -> None:
    real = Driver.reduce

    async def narrow(self: Any, asked: Any, number: int) -> Any:
        if asked.name == "newton":
            asked = replace(asked, reply={**asked.reply, "loss": replace(asked.reply["loss"], bound=1.0)})
        return await real(self, asked, number)

    monkeypatch.setattr(Driver, "reduce", narrow)
    plan = plan_of(federation, "horizontal.fedavg", protection="secagg")
    params = {name: LEARNER[name] for name in ("family", "features", "target")}
    plan = plan.model_copy(update={"program": "horizontal.glm", "params": params})
    with pytest.raises(AtollError, match=r"task\.bounds"):
        federation.run(plan, tables(federation), dict.fromkeys(SITES, POLICY))


def test_nor_in_one_run_after_another(federation: Any, monkeypatch: Any) -> None:
    real, bounds = Driver.reduce, [43, 44, 43, 45]

    async def within(self: Any, asked: Any, number: int) -> Any:
        rows = replace(asked.reply["rows"], bound=bounds[0])
        return await real(self, replace(asked, reply={**asked.reply, "rows": rows}), number)

    monkeypatch.setattr(Driver, "reduce", within)
    plan = plan_of(federation, "horizontal.fedavg", protection="secagg")
    plan = plan.model_copy(update={"program": "statistics.describe", "params": {"columns": ["u"]}})
    federation.build(tables(federation), dict.fromkeys(SITES, POLICY))
    while len(bounds) > 1:
        federation.drive(federation.submit(plan))
        del bounds[0]
    with pytest.raises(AtollError, match=r"task\.bounds"):
        federation.drive(federation.submit(plan))


def test_ranks_are_of_the_histogram_that_all_sites_were_asked_for(federation: Any, monkeypatch: Any) -> None:
    """Else all but one could be asked for one in which their rows are in one bin, and rank alike."""
    real = Driver.reduce

    async def another(self: Any, asked: Any, number: int) -> Any:
        if asked.name == "rank_products":
            asked = replace(asked, send={**asked.send, "edges": np.zeros_like(asked.send["edges"])})
        return await real(self, asked, number)

    monkeypatch.setattr(Driver, "reduce", another)
    plan = plan_of(federation, "horizontal.fedavg", protection="secagg")
    params = {"columns": ["u", "v"], "method": "spearman"}
    plan = plan.model_copy(update={"program": "statistics.correlation", "params": params})
    with pytest.raises(AtollError, match=r"task\.array"):
        federation.run(plan, tables(federation), dict.fromkeys(SITES, POLICY))
