"""The plan's schedule: who is asked, for how much, and for how long; alone, and in whole federations."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.rounds import Gather, Round, Sum, real
from atoll.contract.schedule import Schedule
from atoll.contract.wire import Message, decode
from atoll.data.table import Table
from atoll.runtime.policy import Policy
from atoll.runtime.scheduler import Pace, Scheduler
from atoll.runtime.store import RunStore
from atoll.transport.base import Endpoint, Progress

SITES = ("s0", "s1", "s2", "s3")
COLUMNS = {
    "u": {"range": [-4, 4]},
    "v": {"range": [0, 10]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
TRAINING = Round("train", Sum(), {"x": real()}, paced=True)
DRAWN = Round("train", Sum(), {"x": real()}, draw=2, paced=True)


class Died(BaseException):
    """Stands for the process being killed: nothing catches it."""


def tables_of(federation: Any, missing: dict[str, float] | None = None) -> dict[str, Table]:
    random = np.random.default_rng(4)
    tables = {}
    for i, n in enumerate((40, 25, 33, 28)):
        u, v = random.uniform(-4, 4, n), random.uniform(0, 10, n)
        y = (random.random(n) < 1 / (1 + np.exp(-u))).astype(float)
        u[: round(n * (missing or {}).get(f"s{i}", 0.0))] = np.nan
        tables[f"s{i}"] = federation.table({"u": u, "v": v, "y": y}, COLUMNS)
    return tables


def plan_of(federation: Any, schedule: dict[str, Any], protection: str = "plain", **more: Any) -> Plan:
    params = {"family": "logistic", "target": "y", "features": ["u", "v"], "rounds": 6, "batch_size": 4}
    params["checkpoint_every"] = 99
    params |= more.pop("params", {})
    cohort = {"min_sites": 2, "sites": SITES, **more.pop("cohort", {})}
    made: Plan = federation.plan(
        "horizontal.fedavg", params, tables_of(federation), schedule=schedule, protection=protection, cohort=cohort,
        run={"deadline_s": 20, "holdout": 0.2, **more.pop("run", {})}, **more,
    )  # fmt: skip
    return made


def scheduler(federation: Any, schedule: dict[str, Any], **cohort: Any) -> Scheduler:
    return Scheduler(plan_of(federation, schedule, cohort=cohort), "r")


# ---------------------------------------------------------------- who is asked


def test_a_priority_says_how_often_whatever_else_is_asked_in_between(federation: Any) -> None:
    """Evaluation's rounds, and others that are none of the schedule's, do not count."""
    made = scheduler(federation, {"priority": {"s1": 0.5, "s3": 0.25}})
    asked = Counter[str]()
    for number in range(0, 80, 2):
        sites = made.chosen(TRAINING, number, SITES)
        assert made.chosen(Round("evaluate", Sum(), {}), number + 1, SITES) == SITES
        asked.update(sites)
        made.note(dict.fromkeys(sites, 1.0), {})
    assert asked == {"s0": 40, "s1": 20, "s2": 40, "s3": 10}


def test_there_are_never_fewer_than_the_cohorts_rule_demands(federation: Any) -> None:
    made = scheduler(federation, {"priority": dict.fromkeys(SITES, 0.1)}, min_sites=3)
    for _ in range(30):
        sites = made.chosen(TRAINING, 0, SITES)
        assert len(sites) >= 3
        made.note(dict.fromkeys(sites, 1.0), {})


def drawn_often(made: Scheduler, times: int = 4000) -> dict[str, float]:
    found = Counter(site for number in range(times) for site in made.chosen(DRAWN, number, SITES))
    return {site: found[site] / times for site in SITES}


@pytest.mark.parametrize(
    ("factor", "paces", "quality", "priority", "least"),
    [
        ("availability", {"s2": Pace(99, 0)}, {}, {}, "s2"),
        ("speed", {"s0": Pace(9, 9, 1.0), "s1": Pace(9, 9, 1.0), "s2": Pace(9, 9, 50.0)}, {}, {}, "s2"),
        ("quality", {}, {"s2": 0.02}, {}, "s2"),
    ],
)
def test_a_draw_favours_whom_the_plan_says(
    federation: Any, factor: str, paces: Any, quality: Any, priority: Any, least: str
) -> None:
    made = scheduler(federation, {"sample": [factor], "priority": priority})
    made.paces, made.quality = paces, quality
    often = drawn_often(made)
    assert often[least] < 0.1 < 0.5 < min(often[site] for site in SITES if site != least)
    assert sum(often.values()) == pytest.approx(2)


def test_a_draw_by_priority_takes_those_whose_turn_it_is_the_likelier_the_higher_theirs(federation: Any) -> None:
    made = scheduler(federation, {"sample": ["priority"], "priority": {"s1": 0.999, "s2": 0.05}})
    made.turn = 18  # the turn of all of them
    often = drawn_often(made, 1000)
    assert often.get("s2", 0) < 0.15


def test_without_a_factor_the_draw_is_everybodys_who_knows_the_seed(federation: Any) -> None:
    made = scheduler(federation, {"within_s": 5})
    for number in range(50):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((0, number, 1))))
        places = sorted(random.choice(4, 2, replace=False))
        assert made.chosen(DRAWN, number, SITES) == tuple(SITES[place] for place in places)


# ---------------------------------------------------------------- for how much, and for how long


def test_slow_sites_are_asked_for_less_so_that_all_take_as_long(federation: Any) -> None:
    made = scheduler(federation, {"effort_min": 0.1})
    assert [made.effort(site) for site in SITES] == [1.0] * 4, "nothing is known yet"
    made.note(dict.fromkeys(SITES, 1.0), {"s0": 1.0, "s1": 1.0, "s2": 4.0, "s3": 100.0})
    assert [made.effort(site) for site in SITES] == [1.0, 1.0, 0.62, 0.1]
    made.note({"s2": 0.62}, {"s2": 2.5})  # as quick, per unit of work, as before
    assert made.effort("s2") == pytest.approx(0.62, abs=0.01)
    assert scheduler(federation, {}).effort("s3") == 1.0


def test_who_is_late_is_taken_for_slower_each_time(federation: Any) -> None:
    made = scheduler(federation, {"effort_min": 0.01, "within_s": 2.0})
    efforts = []
    for _ in range(4):
        asked = {site: made.effort(site) for site in SITES}
        efforts.append(asked["s3"])
        made.note(asked, dict.fromkeys(SITES[:3], 1.0))
    assert efforts[0] == 1.0
    assert all(after < before for before, after in itertools.pairwise(efforts))


def test_a_round_waits_for_as_many_as_its_protection_needs(federation: Any) -> None:
    plain = Scheduler(plan_of(federation, {"within_s": 1}), "r")
    hidden = Scheduler(plan_of(federation, {"within_s": 1}, "secagg"), "r")
    assert (plain.least(TRAINING, 9), hidden.least(TRAINING, 9)) == (2, 5)
    few = Round("train", Sum(), {}, sites=SITES[:3], among=True)
    assert (hidden.least(few, 9), hidden.least(Round("own", Gather(), {}), 9)) == (2, 2)


def test_a_site_takes_no_other_effort_than_its_plan_allows() -> None:
    half = Schedule(effort_min=0.5)
    x = np.ones(3)
    for told, wanted in ((0.7, 0.7), (0.1, 0.5), (9.0, 1.0), (float("nan"), 1.0)):
        taken = half.allowed({"x": x, "effort": np.array(told)})
        assert float(taken["effort"]) == wanted
        assert taken["x"] is x
    assert float(half.allowed({"effort": np.ones(4)})["effort"]) == 1.0
    assert Schedule().allowed({"x": x, "effort": np.array(0.01)}).keys() == {"x"}


def test_it_knows_after_a_restart_what_it_knew(federation: Any, tmp_path: Path) -> None:
    plan = plan_of(federation, {"effort_min": 0.1, "within_s": 1.0, "sample": ["speed"], "priority": {"s1": 0.5}})
    store = RunStore(f"sqlite:///{tmp_path / 'store.db'}")
    run = store.create_run(plan, SITES)
    made, random = Scheduler.resumed(plan, run, store), np.random.default_rng(1)
    for number in range(9):
        asked, sites = made.choose(TRAINING, number, SITES)
        for site in sites:
            if random.random() < 0.8:
                made.answered(number, site, "shares", 99.0)
                made.answered(number, site, "reply", float(random.uniform(0.1, 3)))
        paces = made.over(asked, number, sites)
        store.finish_round(run, number, "program", "x/train", 1.0, Message("reduced"), [], {}, paces)
    store.close()
    store = RunStore(f"sqlite:///{tmp_path / 'store.db'}")
    again = Scheduler.resumed(plan, run, store)
    assert again.paces.keys() == made.paces.keys()
    assert [str(again.paces[site]) for site in SITES] == [str(made.paces[site]) for site in SITES]
    assert again.turn == made.turn == 9
    assert again.choose(DRAWN, 9, SITES) == made.choose(DRAWN, 9, SITES)
    store.close()


def test_a_priority_of_a_site_that_is_not_there_is_refused(federation: Any) -> None:
    with pytest.raises(PlanError, match="unknown-site"):
        federation.run(plan_of(federation, {"priority": {"elsewhere": 0.5}}), tables_of(federation))


# ---------------------------------------------------------------- whole federations


def sums(federation: Any, run: str = "") -> list[list[str]]:
    """The sites in the sum of each training round."""
    run = run or federation.run_id
    names = [row["name"] for row in federation.store.rounds(run)]
    return [
        [str(site) for site in federation.store.reduced(run, number).meta["sites"]]
        for number, name in enumerate(names) if name == "horizontal.fedavg/train"
    ]  # fmt: skip


def tasks(federation: Any, site: str) -> list[Message]:
    """The training tasks that a site was sent, in order."""
    found = [decode(content) for name, way, content in federation.wire if (name, way) == (site, "to")]
    return [m for m in found if m.kind == "task" and m.meta["name"] == "train" and m.meta["step"] == "reply"]


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_a_site_that_is_late_is_left_out_of_that_round_only(federation: Any, protection: str) -> None:
    """s3 computes for as long as the coordinator has not made two more steps; then it takes part again."""
    gone_on = threading.Event()

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            training = message.meta.get("name") == "train" and message.meta.get("step") == "reply"
            if name == "s3" and training and not gone_on.is_set():
                gone_on.wait(30)
            return endpoint(message, progress)

        return answer

    def listen(event: dict[str, Any]) -> None:
        if event.get("step") == 2:
            gone_on.set()

    federation.build(tables_of(federation), wrap=wrap, threads=12)
    federation.submit(plan_of(federation, {"within_s": 1.5}, protection, params={"rounds": 20}))
    outcome = federation.drive(on_event=listen)
    seen = sums(federation)
    assert seen[0] == seen[1] == ["s0", "s1", "s2"]
    assert ["s0", "s1", "s2", "s3"] in seen[3:]
    assert not [event for event in federation.events if "dropout" in event]
    assert outcome["evaluation"]["pooled"]["auc"] > 0.5
    for ledger in federation.ledgers().values():
        late = {ledger.entries[seq]["body"]["round"] for seq in ledger.unacknowledged}
        assert late <= set(range(20)), "what came too late is in no sum, and is not acknowledged"


def slow(seconds: float) -> Callable[[str, Endpoint], Endpoint]:
    """s3 takes so long for a whole round's work, and less for less."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            if message.meta.get("name") == "train" and message.meta.get("step") == "reply":
                time.sleep((seconds if name == "s3" else 0.02) * float(message.arrays.get("effort", 1.0)))
            return endpoint(message, progress)

        return answer

    return wrap


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_a_slow_site_is_asked_for_fewer_steps(federation: Any, protection: str) -> None:
    federation.build(tables_of(federation), wrap=slow(1.0), threads=8)
    federation.submit(plan_of(federation, {"effort_min": 0.2}, protection, params={"rounds": 4}))
    federation.drive()
    efforts = [float(message.arrays["effort"]) for message in tasks(federation, "s3")]
    assert efforts[0] == 1.0
    assert max(efforts[1:]) <= 0.5
    assert sums(federation) == [list(SITES)] * 4


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_a_coordinator_that_dies_asks_for_the_same_again(federation: Any, protection: str) -> None:
    federation.build(tables_of(federation), wrap=slow(0.3), threads=8)
    schedule = {"effort_min": 0.1, "sample": ["speed", "availability"], "priority": {"s1": 0.5}}
    run = federation.submit(plan_of(federation, schedule, protection))
    finish = federation.store.finish_round

    def dies(run_id: str, number: int, *rest: Any) -> None:
        if number == 3:
            raise Died
        finish(run_id, number, *rest)

    federation.store.finish_round = dies
    with pytest.raises(Died):
        federation.drive()
    federation.start_coordinator()
    federation.drive(run)
    again = 0
    for site in SITES:
        asked = [message for message in tasks(federation, site) if message.meta["round"] == 3]
        assert len(asked) in (0, 2)
        again += len(asked)
        assert len({float(message.arrays["effort"]) for message in asked}) <= 1
    assert again >= 4
    seen = sums(federation)
    assert ["s1" in sites for sites in seen] == [False, True] * 3


def test_a_run_ends_when_its_bytes_are_used_up_also_after_a_restart(federation: Any) -> None:
    federation.run(plan_of(federation, {}, run={"evaluate": False}), tables_of(federation))
    whole = sum(len(content) for _, _, content in federation.wire)

    def listen(event: dict[str, Any]) -> None:
        if event.get("round") == 2:
            raise Died

    federation.build(tables_of(federation))
    run = federation.submit(plan_of(federation, {"stop_after_bytes": whole // 2}, run={"evaluate": False}))
    with pytest.raises(Died):
        federation.drive(on_event=listen)
    federation.start_coordinator()
    federation.start_transport()
    outcome = federation.drive(run)
    assert 2 <= outcome["result"]["iterations"] < 6


def test_a_run_ends_when_its_time_is_used_up(federation: Any) -> None:
    federation.build(tables_of(federation), wrap=slow(0.2), threads=8)
    federation.submit(plan_of(federation, {"stop_after_s": 0.5}, params={"rounds": 50}))
    outcome = federation.drive()
    assert outcome["result"]["iterations"] <= 3
    assert outcome["evaluation"] is not None, "it is scored all the same"


def test_sites_tell_how_complete_their_rows_are_if_their_policy_shares_it(federation: Any) -> None:
    """Before anything is imputed; to two digits; and those with more are drawn more often."""
    tables = tables_of(federation, {"s1": 0.5, "s2": 0.9})
    policies = {"s2": Policy.sandbox().model_copy(update={"share": ("rows", "metrics")})}
    recipe = {"steps": [{"step": "impute", "columns": ["u"]}]}
    schedule = {"sample": ["quality"]}
    plan = plan_of(federation, schedule, recipe=recipe, run={"holdout": 0}, params={"sites_per_round": 2})
    plan = Plan.from_json({**plan.to_json()})
    federation.run(plan, tables, policies)
    opened = {
        name: decode(content).meta.get("quality") for name, way, content in federation.wire
        if way == "from" and decode(content).kind == "opened"
    }  # fmt: skip
    assert opened == {"s0": 1.0, "s1": pytest.approx(0.76, abs=0.011), "s2": None, "s3": 1.0}


def test_what_a_site_tells_of_its_rows_it_does_not_tell_under_privacy(federation: Any) -> None:
    privacy = {"unit": "site", "epsilon": 1e6, "delta": 1e-6}
    plan = plan_of(federation, {}, "secagg", privacy=privacy, cohort={"min_sites": 4}, params={"rounds": 2})
    federation.run(plan, tables_of(federation))
    opened = [decode(content) for _, way, content in federation.wire if way == "from"]
    assert not [m for m in opened if m.kind == "opened" and (m.meta.get("quality") or m.meta.get("rows"))]
