"""Rounds that are asked at the same time, sites that only say that they are ready, and programs told to come to an end.

The programs here are registered under ``test.together.*``; they exist only in this file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError
from atoll.contract.program import ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Metrics, Ready, Reply, Round, Steps, Sum, Task, Together, count, real
from atoll.contract.wire import Message
from atoll.data.table import Table
from atoll.transport.base import Endpoint, Progress

COLUMNS = {"x": {"range": [0, 1000]}}
CALLS: list[tuple[str, int]] = []


class Died(BaseException):
    """Stands for the process being killed: nothing catches it."""


class Params(ProgramParams):
    rounds: int = 3


@program("test.together.pairs", needs={"sum"}, offers={"bounded", "resolution"})
class Pairs:
    """Each step asks two groups of the cohort at the same time."""

    Params = Params

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Any, start: Any = None) -> Steps:
        fields, seen = {"x": real(bound=1e9, step=1e-6), "n": count(bound=10**6)}, []
        for _ in range(self.params.rounds):
            groups = cohort.sites[:3], cohort.sites[3:]
            sums = yield Together(tuple(Round("sum", Sum(), fields, sites=group, among=True) for group in groups))
            seen.append([(one.sites, float(one["x"]), int(one["n"])) for one in sums])
            if (yield Metrics(len(seen), {"n": 1.0})):
                break
        return {"seen": seen}

    def fewest(self, num_sites: int) -> int:
        return num_sites // 2

    @handler("sum")
    def sum(self, site: SiteView, task: Task) -> Reply:
        CALLS.append((site.name, task.id.round))
        return {"x": site.table["x"].sum(), "n": len(site.table)}


@program("test.together.narrow", needs={"sum"}, offers={"bounded", "resolution"})
class Narrow(Pairs):
    """A coordinator that asks other cohorts than the plan leads to."""

    class Params(ProgramParams):
        cohort: tuple[str, ...]

    def coordinate(self, cohort: Any, start: Any = None) -> Steps:
        fields = {"x": real(bound=1e9, step=1e-6), "n": count(bound=10**6)}
        total = yield Round("sum", Sum(), fields, sites=self.params.cohort, among=True)
        return {"sites": total.sites}


@program("test.together.ready", needs={"sum", "ready"}, offers={"bounded", "resolution"})
class Waiting:
    """Sites compute and say so; a sum is made of the first three."""

    Params = Params

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Any, start: Any = None) -> Steps:
        order: list[str] = []
        ask: tuple[str, ...] = cohort.sites
        while len(order) < 3:
            arrived = yield Round("compute", Ready(), {}, sites=ask)
            assert not arrived.values
            order.append(arrived.site)
            ask = ()
        total = yield Round("tell", Sum(), {"x": real(bound=1e9, step=1e-6)}, sites=tuple(sorted(order)), among=True)
        return {"order": order, "x": float(total["x"]), "sites": total.sites}

    def fewest(self, num_sites: int) -> int:
        return 3

    @handler("compute", reduce="ready")
    def compute(self, site: SiteView, task: Task) -> Reply:
        site.state["x"] = np.array(site.table["x"].sum())
        return {}

    @handler("tell")
    def tell(self, site: SiteView, task: Task) -> Reply:
        return {"x": site.state["x"]}


@program("test.together.telling", needs={"sum", "ready"}, offers={"bounded", "resolution"})
class Telling(Waiting):
    """A coordinator that wants to see more of who is ready."""

    def coordinate(self, cohort: Any, start: Any = None) -> Steps:
        arrived = yield Round("compute", Ready(), {"x": real()})
        return {"x": float(arrived.values["x"])}

    @handler("compute", reduce="ready")
    def compute(self, site: SiteView, task: Task) -> Reply:
        return {"x": site.table["x"].sum()}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    CALLS.clear()
    yield


def tables_of(federation: Any, sites: int = 6) -> dict[str, Table]:
    random = np.random.default_rng(4)
    return {f"s{i}": federation.table({"x": random.uniform(0, 1000, 10 + i)}, COLUMNS) for i in range(sites)}


def plan_of(federation: Any, name: str, protection: str = "plain", **more: Any) -> Any:
    params, more = more.pop("params", {}), {"run": {"deadline_s": 60}, **more}
    return federation.plan(f"test.together.{name}", params, tables_of(federation), protection=protection, **more)


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_groups_are_summed_each_by_itself(federation: Any, protection: str) -> None:
    tables = tables_of(federation)
    seen = federation.run(plan_of(federation, "pairs", protection), tables)["result"]["seen"]
    for step in seen:
        for (sites, x, n), group in zip(step, (("s0", "s1", "s2"), ("s3", "s4", "s5")), strict=True):
            assert sites == group
            assert x == pytest.approx(sum(tables[site]["x"].sum() for site in group), abs=1e-4)
            assert n == sum(len(tables[site]) for site in group)
    assert sorted(CALLS) == sorted((f"s{i}", 2 * step + (i > 2)) for i in range(6) for step in range(3))
    for ledger in federation.ledgers().values():
        assert not ledger.unacknowledged


def test_both_groups_are_at_work_at_the_same_time(federation: Any) -> None:
    """Every site waits until all six have been asked."""
    barrier = threading.Barrier(6)

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            if message.kind == "task":
                barrier.wait(30)
            return endpoint(message, progress)

        return answer

    outcome = federation.run(plan_of(federation, "pairs"), tables_of(federation), wrap=wrap, threads=12)
    assert len(outcome["result"]["seen"]) == 3


@pytest.mark.parametrize(("cohort", "code"), [(("s0", "s1"), "policy.narrow-sum"), (("s0", "s1", "s0"), "task.cohort")])
def test_a_site_refuses_a_sum_among_fewer_than_the_plan_leads_to(
    federation: Any, cohort: tuple[str, ...], code: str
) -> None:
    plan = plan_of(federation, "narrow", "secagg", params={"cohort": cohort}, cohort={"min_sites": 2})
    with pytest.raises(AtollError, match=code.replace(".", r"\.")):
        federation.run(plan, tables_of(federation))


@pytest.mark.parametrize("protection", ["secagg", "paillier", "ckks"])
def test_a_sum_may_be_among_few_where_the_plan_leads_to_it(federation: Any, protection: str) -> None:
    plan = plan_of(federation, "narrow", protection, params={"cohort": ("s1", "s3", "s4")})
    assert federation.run(plan, tables_of(federation))["result"]["sites"] == ("s1", "s3", "s4")


@pytest.mark.parametrize("dies_at", [1, 2, 5])
def test_a_coordinator_that_dies_within_them_asks_only_what_is_missing(federation: Any, dies_at: int) -> None:
    def listen(event: dict[str, Any]) -> None:
        if event.get("round") == dies_at:
            raise Died

    tables = tables_of(federation)
    whole = federation.run(plan_of(federation, "pairs"), tables)["result"]
    CALLS.clear()
    federation.build(tables)
    run = federation.submit(plan_of(federation, "pairs"))
    with pytest.raises(Died):
        federation.drive(on_event=listen)
    federation.start_coordinator()
    assert federation.drive(run)["result"] == whole
    assert len(CALLS) == len(set(CALLS)) == 18
    for ledger in federation.ledgers().values():
        assert not ledger.unacknowledged


@pytest.mark.parametrize(
    ("schedule", "steps"), [({"stop_after_s": 1e-9}, 1), ({"stop_after_bytes": 1}, 1), ({"stop_after_s": 1e6}, 3)]
)
def test_a_program_ends_when_the_schedule_has_nothing_left(federation: Any, schedule: Any, steps: int) -> None:
    found = federation.run(plan_of(federation, "pairs", schedule=schedule), tables_of(federation))["result"]
    assert len(found["seen"]) == steps


def first_last() -> Callable[[str, Endpoint], Endpoint]:
    """s0, s1 and s2 answer only when the other three have."""
    others = threading.Semaphore(0)

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def answer(message: Message, progress: Progress) -> Message:
            computing = message.kind == "task" and message.meta["name"] == "compute"
            if computing and name in ("s0", "s1", "s2"):
                others.acquire(timeout=30)
            reply = endpoint(message, progress)
            if computing:
                others.release()
            return reply

        return answer

    return wrap


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_who_is_ready_is_all_that_is_told_until_the_sum(federation: Any, protection: str) -> None:
    tables = tables_of(federation)
    found = federation.run(plan_of(federation, "ready", protection), tables, wrap=first_last(), threads=12)["result"]
    assert len(set(found["order"]) & {"s3", "s4", "s5"}) >= 1
    assert found["sites"] == tuple(sorted(found["order"]))
    assert found["x"] == pytest.approx(sum(tables[site]["x"].sum() for site in found["sites"]), abs=1e-4)


def test_a_site_that_says_it_is_ready_says_nothing_else(federation: Any) -> None:
    with pytest.raises(AtollError, match=r"task\.field"):
        federation.run(plan_of(federation, "telling", "secagg"), tables_of(federation))
