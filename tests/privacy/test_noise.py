"""Differential privacy in a whole federation: what the noise is, who adds it, and what it costs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from atoll.contract.errors import AtollError, PlanError, TransportError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Message, decode
from atoll.data.site_data import SiteData
from atoll.data.table import Table, hold_out_each
from atoll.runtime import coordinator, noise
from atoll.runtime.budget import Budget
from atoll.runtime.policy import Policy
from atoll.transport.base import Endpoint, Progress

COLUMNS: dict[str, dict[str, Any]] = {"x": {"range": [-50, 100]}, "sick": {"dtype": "integer", "values": [0, 1]}}


def tables_of(federation: Any, sites: int = 4, rows: int = 500) -> dict[str, Table]:
    random = np.random.default_rng(5)
    made = {}
    for i in range(sites):
        x = random.normal(i, 9, rows).clip(-50, 100)
        made[f"s{i}"] = federation.table({"x": x, "sick": (x > i).astype(float)}, COLUMNS, max_rows=1000)
    return made


def asked(federation: Any, tables: Any, privacy: dict[str, Any], protection: Any = "secagg", **more: Any) -> Any:
    cohort = {"min_sites": len(tables)}
    privacy = {"unit": "record", "epsilon": 1.0, "delta": 1e-6, **privacy}
    program = more.pop("program", "statistics.frequency")
    params = more.pop("params", {"columns": ["sick"]})
    return federation.plan(program, params, tables, protection=protection, cohort=cohort, privacy=privacy, **more)


@pytest.mark.parametrize(
    ("mechanism", "protection"),
    [
        *((m, p) for m in ("discrete_gaussian", "laplace", "geometric") for p in ("plain", "secagg")),
        ("gaussian", "plain"),
    ],
)
def test_counts_carry_noise_and_a_price(federation: Any, mechanism: str, protection: str) -> None:
    tables = tables_of(federation)
    federation.run(asked(federation, tables, {"mechanism": mechanism}, protection), tables)
    charged = [body["epsilon"] for body in federation.releases() if body["step"] == "reply"]
    assert charged and all(0 < epsilon <= 1 for epsilon in charged)


def test_a_budget_that_is_spent_refuses(federation: Any) -> None:
    tables = tables_of(federation)
    open_ = Policy.sandbox().model_copy(update={"budgets": {"*": Budget(epsilon=1.5)}})
    federation.run(asked(federation, tables, {}), tables, dict.fromkeys(tables, open_))
    federation.submit(asked(federation, tables, {}))
    with pytest.raises(AtollError) as caught:
        federation.drive()
    assert [part.code for part in caught.value.parts] == ["budget.spent"] * len(tables)


# ---------------------------------------------------------------- how much noise, and whose


SIZE = 4000
"""Numbers in one sum: the variance of their noise is found to within 2 % or so."""


@program("test.noise.sums", needs={"sum"}, offers={"bounded", "resolution"})
class Sums:
    """Rounds of counts that are the same for all, of which a record is one; and what the coordinator saw of them."""

    class Params(ProgramParams):
        rounds: int = 1
        size: int = SIZE
        declared: bool = True
        until: Literal["", "few", "exact"] = ""

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Any = None) -> Steps:
        seen, number = [], 0
        while number < self.params.rounds:
            name = "counts" if self.params.declared else "bare"
            total = yield Round(name, Sum(), {"n": count((self.params.size,), bound=10**6)})
            seen.append((total["n"], total.sites))
            number += 0 if self.params.until == "few" and total["n"][0] > 1 else 1
            if self.params.until == "exact" and total["n"][0] == 100:
                raise ArithmeticError
        return {"seen": seen}

    def _per_record(self, schema: Any, sent: Any) -> dict[str, Norms]:
        return {"n": touches(1)}

    @handler("counts", record=_per_record)
    def counts(self, site: SiteView, task: Task) -> Reply:
        return {"n": np.full(self.params.size, 1000 + len(site.table))}

    @handler("bare")
    def bare(self, site: SiteView, task: Task) -> Reply:
        return {"n": np.full(self.params.size, 1000)}


def sums(
    federation: Any, tables: Any, protection: Any = "secagg", *, min_sites: int = 0, privacy: Any = None, **more: Any
) -> Any:
    promise = {"unit": "record", "epsilon": 1.0, "delta": 1e-6, **(privacy or {})}
    cohort = {"min_sites": min_sites or len(tables)}
    return federation.plan(
        "test.noise.sums", more.pop("params", {}), tables, protection=protection, cohort=cohort, privacy=promise, **more
    )


def analytic_sigma(epsilon: float, delta: float) -> float:
    """The Gaussian mechanism's σ for sensitivity 1, exactly (Balle & Wang 2018, Theorem 8): a second implementation."""

    def excess(sigma: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b) - delta)

    return float(optimize.brentq(excess, 0.1, 100))


def enough(variance: float, sigma: float) -> bool:
    """Not less than is needed, but for chance; nor much more: Rényi accounting asks for 16 % more than is needed."""
    return bool(0.9 * sigma**2 < variance < 1.35 * sigma**2)


def noise_in(seen: tuple[Any, tuple[str, ...]], tables: Any) -> Any:
    """What was added to a round's sum."""
    total, sites = seen
    return total - sum(1000 + len(tables[site]) for site in sites)


def gone(*who: str) -> Any:
    """Sites *who* are lost when they are asked for their numbers."""

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            if name in who and message.kind == "task" and message.meta["step"] == "reply":
                raise TransportError("link.lost", "gone", field=name)
            return endpoint(message, progress)

        return handle

    return wrap


@pytest.mark.parametrize(
    ("protection", "colluding", "lost", "times"),
    [("secagg", 0, 2, 1.0), ("secagg", 0, 0, 5 / 3), ("secagg", 1, 2, 3 / 2), ("plain", 0, 2, 3.0)],
)
def test_the_noise_is_what_was_promised_for_the_worst_dropout(
    federation: Any, protection: str, colluding: int, lost: int, times: float
) -> None:
    """Of five sites two may be lost: then the sum's noise is just that of the promise, else more. Those that collude
    know their own, and what is left is just enough. Under plain each site's noise hides it alone."""
    tables = tables_of(federation, 5, 20)
    plan = sums(federation, tables, protection, min_sites=3, privacy={"colluding": colluding})
    [seen] = federation.run(plan, tables, wrap=gone(*("s1", "s3")[:lost]))["result"]["seen"]
    assert len(seen[1]) == 5 - lost
    found, sigma = noise_in(seen, tables), analytic_sigma(1.0, 1e-6)
    assert enough(np.var(found) / times, sigma)
    assert abs(np.mean(found)) < 6 * sigma * math.sqrt(times / SIZE)
    assert np.all(found == np.rint(found))


@pytest.mark.parametrize("mechanism", ["laplace", "geometric"])
def test_the_scale_of_laplace_noise(federation: Any, mechanism: str) -> None:
    tables = tables_of(federation, 3, 20)
    plan = sums(federation, tables, "plain", privacy={"mechanism": mechanism, "epsilon": 0.5, "delta": 0})
    [seen] = federation.run(plan, tables)["result"]["seen"]
    ratio = math.exp(-0.5)
    one = 2 * ratio / (1 - ratio) ** 2 if mechanism == "geometric" else 2 / 0.5**2
    assert np.var(noise_in(seen, tables)) == pytest.approx(3 * one, rel=0.3)


def test_noise_of_different_rounds_sites_and_runs_is_independent(federation: Any) -> None:
    tables = tables_of(federation, 3, 20)
    plan = sums(federation, tables, "plain", params={"rounds": 3})
    federation.build(tables)
    told = []
    for _ in range(2):
        federation.submit(plan)
        federation.drive()
    for _, way, content in federation.wire:
        message = decode(content)
        if way == "from" and message.kind == "release":
            told.append(np.asarray(message.arrays["n"], float) - 1020)
    assert len(told) == 3 * 3 * 2
    apart = np.corrcoef(told)[~np.eye(len(told), dtype=bool)]
    assert np.abs(apart).max() < 7 / math.sqrt(SIZE)


def test_a_second_runs_keys_differ_from_the_first_ones(federation: Any) -> None:
    tables = tables_of(federation, 3, 20)
    federation.build(tables)
    for _ in range(2):
        federation.submit(sums(federation, tables))
        federation.drive()
    sessions, seen = [], Counter[tuple[str, bytes]]()
    for _, way, content in federation.wire:
        message = decode(content)
        if message.kind == "opened":
            sessions.append(message.meta["session"][:64])
        if way == "from" and message.kind == "release":
            seen.update((name, array.tobytes()) for name, array in message.arrays.items() if array.nbytes >= 32)
    assert len(set(sessions)) == len(sessions) == 6
    assert max(seen.values()) == 1, "no key, share or masked number is ever the same"


# ---------------------------------------------------------------- asked again


class Asked:
    """Asks one site again for its first answer, in several ways, and keeps what it says."""

    def __init__(self, who: str, *ways: Any) -> None:
        self.who, self.ways, self.told = who, ways, list[Message]()

    def __call__(self, name: str, endpoint: Endpoint) -> Endpoint:
        def handle(message: Message, progress: Progress) -> Message:
            first = endpoint(message, progress)
            if name == self.who and message.kind == "task" and not self.told:
                self.told = [first, *(endpoint(way(message), progress) for way in self.ways)]
            return first

        return handle


def again(message: Message) -> Message:
    """The same task, once more."""
    return message


def attempted(message: Message) -> Message:
    """The same round in a second attempt."""
    return Message(message.kind, {**message.meta, "attempt": 1, "id": "again"}, message.arrays)


def reworded(message: Message) -> Message:
    """Another question in a third attempt: one more array is sent."""
    more = {**message.arrays, "more": np.ones(1)}
    return Message(message.kind, {**message.meta, "attempt": 2, "id": "reworded"}, more)


def test_a_round_that_is_asked_again_has_the_same_noise_and_costs_once(federation: Any) -> None:
    tables = tables_of(federation, 3, 20)
    asking = Asked("s1", again, attempted, reworded)
    federation.run(sums(federation, tables, "plain", params={"rounds": 2}), tables, wrap=asking)
    first, same, second, other = asking.told
    assert first.kind == same.kind == second.kind == "release" and other.meta["code"] == "budget.question"
    assert np.array_equal(first.arrays["n"], same.arrays["n"]) and np.array_equal(first.arrays["n"], second.arrays["n"])
    assert first.meta["entry"] == same.meta["entry"] != second.meta["entry"], "the attempt is a release of its own"
    costs = [body["epsilon"] for body in federation.releases() if body["site"] == "s1"]
    assert costs[0] == costs[1] < costs[2] <= 1.0
    assert federation.journals["s1"].spent("default", Budget()).epsilon == pytest.approx(costs[2])


def test_a_round_cannot_be_asked_again_of_other_data(federation: Any) -> None:
    """The same noise under a table of one row more would tell that row."""
    tables = tables_of(federation, 3, 20)
    larger = tables_of(federation, 3, 21)["s1"]

    def changed(message: Message) -> Message:
        site = federation.sites["s1"]
        site._runs.clear()  # as after a restart
        site._data = lambda plan: SiteData.of(larger, plan, "s1")
        return attempted(message)

    asking = Asked("s1", changed)
    federation.run(sums(federation, tables, "plain"), tables, wrap=asking)
    assert asking.told[1].meta["code"] == "budget.question" and not asking.told[1].arrays


# ---------------------------------------------------------------- units


def people(federation: Any, ids: Any, **columns: Any) -> Any:
    made = {**COLUMNS, **columns}
    data = {"x": np.arange(len(ids)) % 7, "sick": np.arange(len(ids)) % 2, "who": [f"p{i}" for i in ids]}
    return federation.table(data, made, max_rows=1000)


WHO = {"who": {"dtype": "text", "role": "entity"}}


@pytest.mark.parametrize(
    ("ids", "columns", "most", "refused"),
    [(range(20), WHO, 1, False), ([*range(20), 3], WHO, 1, True), ([*range(20), 3, 3], WHO, 3, False),
     (range(20), {"who": {"dtype": "text", "role": "ignore"}}, 1, True)],
)  # fmt: skip
def test_entities_are_counted_before_anything_leaves(
    federation: Any, ids: Any, columns: Any, most: int, refused: bool
) -> None:
    tables = {f"s{i}": people(federation, range(20), **columns) for i in range(2)} | {
        "s2": people(federation, ids, **columns)
    }
    plan = sums(federation, tables, privacy={"unit": "entity", "rows_per_entity": most})
    if not refused:
        [seen] = federation.run(plan, tables)["result"]["seen"]
        assert enough(np.var(noise_in(seen, tables)), most * analytic_sigma(1.0, 1e-6))
        return
    with pytest.raises(AtollError) as caught:
        federation.run(plan, tables)
    assert {"privacy.entity"} <= {caught.value.code, *(part.code for part in caught.value.parts)}
    assert federation.releases() == []
    assert federation.journals["s0"].spent("default", Budget()).epsilon == 0


def test_entities_are_counted_again_when_the_table_is_read_again(federation: Any) -> None:
    tables = {f"s{i}": people(federation, range(20), **WHO) for i in range(3)}
    more = people(federation, [*range(20), 3], **WHO)

    def changed(message: Message) -> Message:
        federation.sites["s1"]._runs.clear()  # as after a restart
        federation.sites["s1"]._data = lambda plan: SiteData.of(more, plan, "s1")
        return attempted(message)

    asking = Asked("s1", changed)
    federation.run(sums(federation, tables, "plain", privacy={"unit": "entity"}), tables, wrap=asking)
    assert asking.told[1].meta["code"] == "privacy.entity"


@given(st.integers(1, 200), st.integers(0, 199), st.integers(0, 2**40))
def test_one_row_more_moves_no_other_between_training_and_held_out_rows(rows: int, place: int, seed: int) -> None:
    ids = np.unique(np.random.default_rng(seed).integers(0, 10**6, rows, dtype=np.uint64))
    more = np.insert(ids, place % (len(ids) + 1), np.uint64(2 * 10**6))
    before, after = (dict(zip(n.tolist(), hold_out_each(n, 0.3, seed, "s").tolist(), strict=True)) for n in (ids, more))
    assert {one: after[one] for one in before} == before


def test_held_out_rows_are_drawn_one_by_one_under_privacy(federation: Any) -> None:
    tables = [people(federation, range(n), **WHO) for n in (400, 401)]
    plan = sums(federation, {"s": tables[0]}, "plain", run={"holdout": 0.25})
    parts = [SiteData.of(table, plan, "s").parts({}) for table in tables]
    (train, held), (more_train, more_held) = [[set(part.ids.tolist()) for part in pair] for pair in parts]
    assert train <= more_train and held <= more_held and 60 < len(held) < 140


# ---------------------------------------------------------------- what is refused, and when


@pytest.mark.parametrize(
    "wrong",
    [{"epsilon": 0}, {"epsilon": -1}, {"epsilon": math.nan}, {"epsilon": math.inf}, {"delta": 1}, {"delta": -1e-9},
     {"unit": "row"}, {"unit": None}, {"mechanism": "none"}, {"colluding": -1}, {"rows_per_entity": 0}],
)  # fmt: skip
def test_promises_that_cannot_be_are_refused_in_the_plan(federation: Any, wrong: dict[str, Any]) -> None:
    tables = tables_of(federation, 3, 20)
    with pytest.raises(PlanError) as caught:
        sums(federation, tables, privacy=wrong)
    assert "privacy" in str(caught.value)


@pytest.mark.parametrize(
    ("params", "privacy", "code"),
    [({"declared": False}, {}, "privacy.unbounded"), ({"until": "few", "size": 1}, {}, "privacy.rounds"),
     ({"until": "exact"}, {}, "privacy.rounds"), ({}, {"delta": 0}, "dp.delta"),
     ({}, {"colluding": 3}, "dp.no-honest-site"), ({}, {"mechanism": "gaussian"}, "dp.gaussian-shares")],
)  # fmt: skip
@pytest.mark.parametrize("checked", [True, False])
def test_what_cannot_be_promised_is_refused_before_data_is_read(
    federation: Any, monkeypatch: pytest.MonkeyPatch, checked: bool, params: Any, privacy: Any, code: str
) -> None:
    """By the coordinator; and by every site, whatever the coordinator does."""
    tables = tables_of(federation, 3, 20)
    federation.build(tables)
    for site in federation.sites.values():
        monkeypatch.setattr(site, "_data", lambda plan: pytest.fail("data was read"))
    monkeypatch.setattr(noise, "DRY_ROUNDS", 500)  # of a program that never ends
    if not checked:
        monkeypatch.setattr(coordinator, "noise_of", lambda *_: None)
    federation.submit(sums(federation, tables, params=params, privacy=privacy))
    with pytest.raises(AtollError) as caught:
        federation.drive()
    assert {code} == {part.code for part in caught.value.parts} or caught.value.code == code
    assert federation.releases() == [] and caught.value.remedy
    assert federation.store.run(federation.run_id)["status"] == "failed"
    for journal in federation.journals.values():
        assert journal.spent("default", Budget()).epsilon == 0


def test_a_plan_for_another_number_of_rounds_is_not_answered(federation: Any) -> None:
    """A coordinator that asks one round more than the plan's noise is for."""
    tables = tables_of(federation, 3, 20)

    def further(message: Message) -> Message:
        return Message(message.kind, {**message.meta, "round": 7, "id": "further"}, message.arrays)

    asking = Asked("s1", further)
    federation.run(sums(federation, tables, "plain"), tables, wrap=asking)
    assert asking.told[1].kind == "failure" and asking.told[1].meta["code"] == "dp.other-question"
