"""The privacy budget: nothing is spent twice, overspent or given back, by whatever process, killed whenever."""

from __future__ import annotations

import datetime as dt
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import ValidationError

from atoll.contract.errors import AtollError, PrivacyBudgetError
from atoll.contract.privacy import STRENGTH, Privacy, Unit
from atoll.runtime.budget import TABLES, Budget, Charge, Spent, begin, charge, reserve, settle, spent
from atoll.runtime.policy import Policy

TODAY = dt.date(2026, 3, 1)
UNITS: tuple[Unit, ...] = ("record", "entity", "site")
YEAR = dt.timedelta(days=365)


class Book:
    """One site's budget of the data set "d", in a database of its own."""

    def __init__(self, **budget: Any) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.executescript(TABLES)
        self.budget = Budget(**budget)

    def reserve(
        self, run: str, epsilon: float, delta: float = 0.0, unit: Unit = "record", day: dt.date = TODAY, data: str = "d"
    ) -> None:
        reserve(self.db, run, data, Privacy(unit=unit, epsilon=epsilon, delta=delta), self.budget, day)

    def charge(
        self, run: str, number: int, epsilon: float, day: dt.date = TODAY, question: str = "q", data: str = "d"
    ) -> None:
        charge(self.db, Charge(run, number, data, epsilon, self.budget, question), day)

    def settle(self, run: str) -> None:
        settle(self.db, run)

    def spent(self, day: dt.date = TODAY, data: str = "d") -> Spent:
        return spent(self.db, data, self.budget, day)


def refused(code: str, what: Callable[..., Any], *args: Any, **named: Any) -> PrivacyBudgetError:
    with pytest.raises(PrivacyBudgetError) as caught:
        what(*args, **named)
    assert caught.value.code == code and caught.value.remedy
    return caught.value


# ---------------------------------------------------------------- what is reserved, charged, and free again


def test_a_run_reserves_what_its_plan_promises_and_keeps_what_it_used() -> None:
    book = Book(epsilon=2.0, delta=1e-5)
    book.reserve("a", 1.5, 1e-6)
    assert book.spent() == Spent(1.5, 1e-6, 0)
    told = refused("budget.spent", book.reserve, "b", 0.6)
    assert "epsilon 0.6" in told.message and "0.5 is left" in told.message
    for number, epsilon in enumerate((0.3, 0.5, 0.9)):
        book.charge("a", number, epsilon)
        assert book.spent() == Spent(1.5, 1e-6, 0), "an open run may still use all of it"
    book.settle("a")
    assert book.spent() == Spent(0.9, 1e-6, 0), "ε of all its releases together, not their sum"
    book.reserve("b", 1.1)
    assert book.spent().epsilon == pytest.approx(2.0)


def test_nothing_sent_costs_nothing_and_nothing_sent_comes_back() -> None:
    book = Book(epsilon=1.0, delta=1e-6)
    book.reserve("unused", 1.0, 1e-6)
    book.settle("unused")
    assert book.spent() == Spent(0.0, 0.0, 0)
    book.reserve("failed", 1.0, 1e-6)
    book.charge("failed", 0, 0.25)
    for _ in range(2):
        book.settle("failed")
        assert book.spent() == Spent(0.25, 1e-6, 0)
    refused("budget.not-reserved", book.charge, "failed", 1, 0.5)
    book.reserve("failed", 1.0, 1e-6)
    assert book.spent().epsilon == 0.25, "a run that ended cannot reserve anew"


def test_delta_is_spent_too() -> None:
    book = Book(epsilon=None, delta=2e-6)
    book.reserve("a", 5, 1e-6)
    book.reserve("b", 5, 1e-6)
    assert "delta" in refused("budget.spent", book.reserve, "c", 5, 1e-9).message
    book.reserve("c", 5, 0.0)


def test_a_release_is_charged_once_however_often_it_is_asked() -> None:
    book = Book(epsilon=1.0, exact_releases=1)
    book.reserve("a", 1.0)
    for _ in range(3):  # a repeated task; a second attempt at the round
        book.charge("a", 0, 0.4)
        book.charge("exact", 0, math.inf)
    assert book.db.execute("SELECT count(*) FROM charged").fetchone() == (2,)
    assert book.spent() == Spent(1.0, 0.0, 1)
    for run, cost in (("a", 0.4), ("exact", math.inf)):
        refused("budget.question", book.charge, run, 0, cost, question="another")


def test_a_round_is_begun_for_one_question_only() -> None:
    book = Book()
    for _ in range(2):  # another attempt, or after a crash
        begin(book.db, "a", 0, "q")
    refused("budget.question", begin, book.db, "a", 0, "another")
    for run, number in (("a", 1), ("b", 0)):
        begin(book.db, run, number, "another")
    book.settle("a")
    assert book.db.execute("SELECT run FROM begun").fetchall() == [("b",)]
    assert book.spent() == Spent(0.0, 0.0, 0), "nothing was told yet"


def test_a_charge_needs_its_reservation() -> None:
    book = Book(epsilon=1.0)
    refused("budget.not-reserved", book.charge, "a", 0, 0.1)
    book.reserve("a", 0.5)
    refused("budget.not-reserved", book.charge, "a", 0, 0.6)
    refused("budget.not-reserved", book.charge, "a", 0, 0.1, data="other")
    book.charge("a", 0, 0.5)


def test_exact_releases_have_a_quota_of_their_own() -> None:
    book = Book(epsilon=0.0, exact_releases=2)
    book.charge("a", 0, math.inf)
    book.charge("b", 0, math.inf)
    assert "2 exact releases" in refused("budget.exact-spent", book.charge, "a", 1, math.inf).message
    book.charge("a", 0, math.inf)
    book.settle("a")
    assert book.spent() == Spent(0.0, 0.0, 2), "an exact release never comes back"
    refused("budget.exact-spent", Book(exact_releases=0).charge, "a", 0, math.inf)
    refused("budget.spent", book.reserve, "c", 1e-3)


def test_data_sets_have_budgets_of_their_own() -> None:
    book = Book(epsilon=1.0, exact_releases=1)
    book.reserve("a", 1.0)
    book.charge("x", 0, math.inf)
    book.reserve("b", 1.0, data="other")
    book.charge("y", 0, math.inf, data="other")
    assert book.spent(data="other") == Spent(1.0, 0.0, 1) and book.spent(data="third") == Spent(0.0, 0.0, 0)


@pytest.mark.parametrize("asked", UNITS)
@pytest.mark.parametrize("promised", UNITS)
def test_a_plan_may_promise_more_than_the_budgets_unit_and_not_less(asked: Unit, promised: Unit) -> None:
    book = Book(unit=asked)
    if STRENGTH[promised] >= STRENGTH[asked]:
        book.reserve("a", 1.0, unit=promised)
        assert book.spent().epsilon == 1.0
    else:
        assert asked in refused("budget.unit", book.reserve, "a", 1.0, unit=promised).message


def test_a_unit_that_is_raised_makes_earlier_weaker_releases_exact_ones() -> None:
    """ε of a record says nothing of an entity with many."""
    book = Book(epsilon=3.0, exact_releases=5)
    book.reserve("records", 1.0)
    book.reserve("entities", 1.5, unit="entity")
    for number in range(3):
        book.charge("records", number, 0.2)
    book.charge("entities", 0, 0.1)
    book.charge("bare", 0, math.inf)
    book.budget = Budget(unit="entity", epsilon=3.0, exact_releases=5)
    assert book.spent() == Spent(1.5, 0.0, 4)
    book.charge("bare", 1, math.inf)
    refused("budget.exact-spent", book.charge, "bare", 2, math.inf)


# ---------------------------------------------------------------- days


def test_a_years_budget_is_of_the_last_365_days() -> None:
    book = Book(epsilon=1.0, exact_releases=1)
    book.reserve("a", 1.0)
    book.charge("a", 0, 0.75)
    book.charge("x", 0, math.inf)
    book.settle("a")
    last = TODAY + YEAR - dt.timedelta(days=1)
    assert book.spent(last) == Spent(0.75, 0.0, 1)
    refused("budget.spent", book.reserve, "b", 0.5, day=last)
    refused("budget.exact-spent", book.charge, "x", 1, math.inf, last)
    assert book.spent(TODAY + YEAR) == Spent(0.0, 0.0, 0)
    book.reserve("b", 1.0, day=TODAY + YEAR)
    book.charge("x", 1, math.inf, TODAY + YEAR)


def test_a_total_is_never_free_again() -> None:
    book = Book(epsilon=1.0, exact_releases=1, per="total")
    book.reserve("a", 1.0)
    book.charge("a", 0, 1.0)
    book.charge("x", 0, math.inf)
    book.settle("a")
    assert book.spent(TODAY + 50 * YEAR) == Spent(1.0, 0.0, 1)


def test_a_long_run_counts_while_it_is_open_and_from_its_last_release_on() -> None:
    book = Book(epsilon=1.0)
    book.reserve("stream", 1.0)
    book.charge("stream", 0, 0.1)
    later = TODAY + 2 * YEAR
    assert book.spent(later).epsilon == 1.0
    book.charge("stream", 1, 0.6, later)
    book.settle("stream")
    assert book.spent(later + YEAR - dt.timedelta(days=1)).epsilon == 0.6
    assert book.spent(later + YEAR).epsilon == 0.0


@given(st.dates(dt.date(2000, 2, 29), dt.date(2100, 1, 1)))
def test_the_window_is_365_days_in_leap_years_too(day: dt.date) -> None:
    since = dt.date.fromisoformat(Budget().since(day))
    assert (day - since).days == 364 and Budget(per="total").since(day) == ""


@pytest.mark.parametrize(
    "wrong",
    [{"epsilon": -1}, {"epsilon": math.inf}, {"epsilon": math.nan}, {"delta": 1}, {"delta": math.nan}, {"unit": "row"},
     {"exact_releases": -1}, {"per": "month"}, {"epsilom": 1}],
)  # fmt: skip
def test_a_budget_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Budget(**wrong)


def test_a_data_set_without_a_budget_of_its_own_has_the_policys() -> None:
    assert Policy().budget("any") == Budget() and Budget().epsilon == 10 and Budget().per == "year"
    policy = Policy(budgets={"*": Budget(epsilon=1), "heart": Budget(epsilon=2)})
    assert policy.budget("heart").epsilon == 2 and policy.budget("lung").epsilon == 1


class Spending(RuleBasedStateMachine):
    """Any order of reservations, charges, ends and days: what counts is never above the limit, and never forgotten."""

    @initialize(epsilon=st.floats(0.1, 5), quota=st.integers(0, 6), per=st.sampled_from(["year", "total"]))
    def begin(self, epsilon: float, quota: int, per: Any) -> None:
        self.book = Book(epsilon=epsilon, delta=1e-5, exact_releases=quota, per=per)
        self.day = TODAY
        self.open: dict[str, float] = {}
        self.ended: dict[str, tuple[float, dt.date]] = {}
        self.used: dict[str, tuple[int, float, dt.date]] = {}
        self.exact: list[dt.date] = []

    @rule(epsilon=st.floats(0.01, 3))
    def a_run_begins(self, epsilon: float) -> None:
        run = f"run {len(self.open) + len(self.ended)}"
        free = self.book.budget.epsilon - self.counted()  # type: ignore[operator]
        try:
            self.book.reserve(run, epsilon, 1e-9, day=self.day)
            assert epsilon <= free + 1e-6
            self.open[run], self.used[run] = epsilon, (0, 0.0, self.day)
        except PrivacyBudgetError:
            assert epsilon > free - 1e-6

    @rule(share=st.floats(0.01, 1), again=st.booleans())
    def a_release_leaves(self, share: float, again: bool) -> None:
        for run, limit in list(self.open.items())[:1]:
            number, before, _ = self.used[run]
            cost = before + (limit - before) * share
            self.book.charge(run, number, cost, self.day)
            if again:
                self.book.charge(run, number, cost, self.day)
            self.used[run] = number + 1, cost, self.day

    @rule()
    def an_exact_release_leaves(self) -> None:
        there = sum(1 for day in self.exact if self.counts(day))
        try:
            self.book.charge("exact", len(self.exact), math.inf, self.day)
            assert there < (self.book.budget.exact_releases or 0)
            self.exact.append(self.day)
        except PrivacyBudgetError:
            assert there >= (self.book.budget.exact_releases or 0)

    @rule()
    def a_run_ends(self) -> None:
        for run in list(self.open)[:1]:
            del self.open[run]
            self.book.settle(run)
            self.ended[run] = self.used[run][1:]

    @rule(days=st.integers(1, 200))
    def time_passes(self, days: int) -> None:
        self.day += dt.timedelta(days=days)

    def counts(self, day: dt.date) -> bool:
        return self.book.budget.per == "total" or (self.day - day).days < 365

    def counted(self) -> float:
        return sum(self.open.values()) + sum(cost for cost, day in self.ended.values() if self.counts(day))

    @invariant()
    def it_is_what_was_sent_and_never_too_much(self) -> None:
        if not hasattr(self, "book"):
            return
        had, budget = self.book.spent(self.day), self.book.budget
        assert had.epsilon == pytest.approx(self.counted())
        assert had.exact == sum(1 for day in self.exact if self.counts(day))
        assert had.epsilon <= (budget.epsilon or 0) * (1 + 1e-6) and had.exact <= (budget.exact_releases or 0)


TestSpending = Spending.TestCase


# ---------------------------------------------------------------- processes of one site, and kill -9

PRELUDE = """
import math, os, sys
import numpy as np
from atoll.contract.errors import AtollError
from atoll.contract.plan import Plan
from atoll.crypto.identity import Identity
from atoll.runtime.budget import Budget, Charge
from atoll.runtime.journal import Journal

path, name, *rest = sys.argv[1:]
key = Identity.generate("north")  # each process signs by a key of its own: here only the budget is looked at
journal = Journal(path, "north", key.public, key.sign)
budget = Budget(epsilon=2.0, delta=1e-4, exact_releases=40)
schema = {"name": "t", "columns": {"x": {"range": [0, 1]}}}

def plan(epsilon):
    return Plan.from_json({"atoll": 1, "name": "p", "dataset": "d", "schema": schema, "program": "p",
                           "privacy": {"unit": "record", "epsilon": epsilon, "delta": 1e-6}})

def begin(run, epsilon):
    journal.open_run(run, "approved", {"plan": {}})
    journal.start_run(run, plan(epsilon), budget)

def release(run, number, epsilon):
    cost = Charge(run, number, "d", epsilon, budget, "q")
    body = {"run": run, "round": number}
    journal.store_release(f"{run}/{number}", run, "p", body, {"x": np.ones(2)}, None, cost=cost)
"""


def process(path: Path, name: str, code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + code, str(path), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def done(child: subprocess.Popen[str]) -> str:
    """What a process printed until its good end."""
    told, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return told


@pytest.fixture
def journal_path(tmp_path: Path) -> Path:
    """A journal that several processes have open."""
    path = tmp_path / "journal.db"
    done(process(path, "first", ""))
    return path


def counted(path: Path, limit: float = 2.0) -> Spent:
    db = sqlite3.connect(path)
    try:
        return spent(db, "d", Budget(epsilon=limit, exact_releases=40), dt.datetime.now(dt.UTC).date())
    finally:
        db.close()


HAMMER = """
took = refused = exact = 0
for i in range(30):
    run = f"{name}-{i}"
    try:
        begin(run, 0.25)
        took += 1
        for number in range(2):
            release(run, number, 0.1 * (number + 1))
        if i % 2:  # some end having used less than they reserved, which is free for the others
            journal.end_run(run, "cancelled", None, "")
    except AtollError as error:
        assert error.code == "budget.spent", error.code
        refused += 1
    try:
        release(f"exact {name}", i, math.inf)
        exact += 1
    except AtollError as error:
        assert error.code == "budget.exact-spent", error.code
print(took, refused, exact)
"""


def test_processes_that_spend_at_once_never_overspend(journal_path: Path) -> None:
    children = [process(journal_path, f"p{i}", HAMMER) for i in range(3)]
    seen = [counted(journal_path) for _ in range(200) if any(child.poll() is None for child in children)]
    told = [map(int, done(child).split()) for child in children]
    took, refusals, exact = (sum(column) for column in zip(*told, strict=True))
    for had in (*seen, counted(journal_path)):
        assert had.epsilon <= 2.0 * (1 + 1e-9) and had.exact <= 40
    assert took + refusals == 90 and refusals > 0 and exact == 40
    db = sqlite3.connect(journal_path)
    used = "SELECT run, max(epsilon) FROM charged WHERE epsilon NOT NULL GROUP BY run"
    open_ = {run for (run,) in db.execute("SELECT run FROM reserved WHERE open")}
    total = sum(0.25 if run in open_ else epsilon for run, epsilon in db.execute(used))
    releases = db.execute("SELECT count(*) FROM release").fetchone()[0]
    charges = db.execute("SELECT count(*) FROM charged").fetchone()[0]
    db.close()
    assert counted(journal_path).epsilon == pytest.approx(total) and took >= 8
    assert releases == charges == 2 * took + 40


KILLED = """
begin("run", 1.0)
print("begun", flush=True)
for number in range(100_000):
    release("run", number, 0.5 + number * 1e-6)
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 4, 9])
def test_killed_at_any_instant_what_is_charged_is_what_was_released(journal_path: Path, after: int) -> None:
    with process(journal_path, "killed", KILLED) as child:
        assert child.stdout is not None
        lines: Iterator[str] = iter(child.stdout)
        told = [next(lines).strip() for _ in range(after + 1)]
        os.kill(child.pid, signal.SIGKILL)
        told += [line.strip() for line in lines if line.endswith("\n")]
    db = sqlite3.connect(journal_path)
    charged = [number for (number,) in db.execute("SELECT round FROM charged ORDER BY round")]
    released = [task for (task,) in db.execute("SELECT task FROM release ORDER BY seq")]
    db.close()
    assert released == [f"run/{number}" for number in charged] and charged == list(range(len(charged)))
    assert len(charged) in (len(told) - 1, len(told)), "the last may be stored, and not told"
    assert counted(journal_path).epsilon == 1.0, "its reservation is still there"
    done(process(journal_path, "after", 'release("run", 200_000, 0.9)\njournal.end_run("run", "failed", None, "")'))
    assert counted(journal_path).epsilon == 0.9


# ---------------------------------------------------------------- a site's runs


COLUMNS = {"x": {"dtype": "integer", "values": [0, 1]}}


def asked(federation: Any, tables: Any, **privacy: Any) -> Any:
    promise = {"unit": "record", "epsilon": 1.0, "delta": 1e-6, **privacy}
    return federation.plan(
        "statistics.frequency",
        {"columns": ["x"]},
        tables,
        protection="secagg",
        cohort={"min_sites": 3},
        privacy=promise,
    )


@pytest.fixture
def tables(federation: Any) -> dict[str, Any]:
    return {f"s{i}": federation.table({"x": [0, 1] * 20}, COLUMNS, max_rows=100) for i in range(3)}


def budgeted(**budget: Any) -> Policy:
    return Policy.sandbox().model_copy(update={"budgets": {"*": Budget(**budget)}})


def test_a_denied_run_gives_back_what_it_did_not_use(federation: Any, tables: Any) -> None:
    federation.build(tables)
    journal = federation.journals["s0"]
    journal.open_run("a", "approved", {"plan": {}})
    journal.start_run("a", asked(federation, tables), Budget(epsilon=1.0))
    assert journal.spent("default", Budget()).epsilon == 1.0
    journal.set_status("a", "denied")
    assert journal.spent("default", Budget()).epsilon == 0.0


def test_a_run_that_was_closed_while_it_opened_reserves_nothing(federation: Any, tables: Any) -> None:
    federation.build(tables)
    journal = federation.journals["s0"]
    journal.open_run("a", "approved", {"plan": {}})
    journal.end_run("a", "cancelled", None, "")
    journal.start_run("a", asked(federation, tables), Budget(epsilon=1.0))
    assert journal.status("a") == "cancelled" and journal.spent("default", Budget()).epsilon == 0.0


def test_a_refused_run_leaves_no_reservation_at_the_others(federation: Any, tables: Any) -> None:
    policies = {"s0": budgeted(epsilon=5.0), "s1": budgeted(epsilon=5.0), "s2": budgeted(epsilon=0.5)}
    with pytest.raises(AtollError) as caught:
        federation.run(asked(federation, tables), tables, policies)
    assert "budget.spent" in {caught.value.code, *(part.code for part in caught.value.parts)}
    assert federation.releases() == []
    for journal in federation.journals.values():
        assert journal.spent("default", Budget()) == Spent(0.0, 0.0, 0)


def test_exact_and_noised_runs_draw_on_different_accounts(federation: Any, tables: Any) -> None:
    policies = dict.fromkeys(tables, budgeted(epsilon=1.0, exact_releases=1))
    federation.run(asked(federation, tables), tables, policies)
    bare = federation.plan(
        "statistics.frequency", {"columns": ["x"]}, tables, protection="secagg", cohort={"min_sites": 3}
    )
    federation.submit(bare)
    federation.drive()
    federation.submit(bare)
    with pytest.raises(AtollError) as caught:
        federation.drive()
    assert caught.value.code == "budget.exact-spent"
    for journal in federation.journals.values():
        had = journal.spent("default", Budget())
        assert had.epsilon == pytest.approx(1.0, abs=1e-4) and had.exact == 1
