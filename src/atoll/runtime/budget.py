"""The privacy budget of a site's data sets: one for statistics, alignment and training together.

A run reserves what its plan promises before anything leaves. Each release is charged in the transaction that stores
it, so what was charged was released and the other way round, whatever is killed when. When the run ends, what it did
not use is free again; what was sent is never given back. Exact releases (ε = ∞) draw on a quota of their own, and so
do those that promise less than the budget's unit asks for (its unit was raised since): of that unit they hide nothing.

Runs add up by basic composition, Σε and Σδ (Dwork & Roth 2014, Theorem 3.16); within a run composition is exact.
"""

from __future__ import annotations

import datetime as dt
import math
import sqlite3
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.errors import PrivacyBudgetError
from atoll.contract.privacy import STRENGTH, Privacy, Unit

TABLES = """
CREATE TABLE IF NOT EXISTS reserved
    (run TEXT PRIMARY KEY, dataset TEXT NOT NULL, unit TEXT NOT NULL, epsilon REAL NOT NULL, delta REAL NOT NULL,
     day TEXT NOT NULL, open INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS charged
    (run TEXT, round INTEGER, dataset TEXT NOT NULL, epsilon REAL, day TEXT NOT NULL, question TEXT NOT NULL,
     PRIMARY KEY (run, round)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS begun
    (run TEXT, round INTEGER, question TEXT NOT NULL, PRIMARY KEY (run, round)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS charged_exact ON charged (dataset, day) WHERE epsilon IS NULL;
"""


class Budget(BaseModel):
    """What one data set may cost. unit: of ε; a plan's unit may be a larger one, not a smaller. per: "year" counts
    the last 365 days, "total" everything. exact_releases: sums without noise; 0 lets none out. None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    unit: Unit = "record"
    epsilon: float | None = Field(default=10.0, ge=0)
    delta: float | None = Field(default=1e-4, ge=0, lt=1)
    per: Literal["year", "total"] = "year"
    exact_releases: int | None = Field(default=10_000, ge=0)

    def since(self, today: dt.date) -> str:
        """The first day that counts (ISO)."""
        return (today - dt.timedelta(days=364)).isoformat() if self.per == "year" else ""


@dataclass(frozen=True, slots=True)
class Charge:
    """What a release costs: ε of the run so far (inf: it is exact), charged to a data set's budget. question:
    digests of what was asked, and under noise of the bare answer; the same again is the same release."""

    run: str
    round: int
    dataset: str
    epsilon: float
    budget: Budget
    question: str


@dataclass(frozen=True, slots=True)
class Spent:
    """Of one data set: ε and δ that closed runs cost and open ones reserved, and exact releases."""

    epsilon: float
    delta: float
    exact: int


def spent(db: sqlite3.Connection, dataset: str, budget: Budget, today: dt.date) -> Spent:
    """What counts against the *budget* today. A run counts from its last release on, an open one always."""
    since, strength = budget.since(today), STRENGTH[budget.unit]
    rows = db.execute(
        "SELECT r.unit, r.epsilon, r.delta, r.open, max(c.epsilon), coalesce(max(c.day), r.day)"
        " FROM reserved r LEFT JOIN charged c USING (run) WHERE r.dataset = ? GROUP BY r.run",
        (dataset,),
    ).fetchall()
    cost = [
        (epsilon if open_ else used, delta)
        for unit, epsilon, delta, open_, used, last in rows
        if STRENGTH[unit] >= strength and (open_ or (used is not None and last >= since))
    ]
    return Spent(math.fsum(e for e, _ in cost), math.fsum(d for _, d in cost), _exact(db, dataset, budget, today))


def _exact(db: sqlite3.Connection, dataset: str, budget: Budget, today: dt.date) -> int:
    """Releases that count against the quota of exact ones."""
    where = (dataset, budget.since(today))
    exact = "SELECT count(*) FROM charged WHERE dataset = ? AND day >= ? AND epsilon IS NULL"
    noised = "SELECT r.unit, count(*) FROM reserved r JOIN charged c USING (run) WHERE r.dataset = ? AND c.day >= ?"
    counts = db.execute(f"{noised} GROUP BY r.unit", where).fetchall() if STRENGTH[budget.unit] else []
    weaker = sum(int(number) for unit, number in counts if STRENGTH[unit] < STRENGTH[budget.unit])
    return weaker + int(db.execute(exact, where).fetchone()[0])


def reserve(db: sqlite3.Connection, run: str, dataset: str, privacy: Privacy, budget: Budget, today: dt.date) -> None:
    """Set aside what *privacy* promises, within the caller's transaction. Raises PrivacyBudgetError when the data
    set's budget does not allow it; reserving for a run twice does nothing."""
    if db.execute("SELECT 1 FROM reserved WHERE run = ?", (run,)).fetchone():
        return
    if STRENGTH[privacy.unit] < STRENGTH[budget.unit]:
        raise _refused("budget.unit", f"the plan hides a {privacy.unit}, and the budget is per {budget.unit}")
    before = spent(db, dataset, budget, today)
    for name, limit, had, more in (
        ("epsilon", budget.epsilon, before.epsilon, privacy.epsilon),
        ("delta", budget.delta, before.delta, privacy.delta),
    ):
        if limit is not None and had + more > limit * (1 + 1e-9):
            raise _refused("budget.spent", f"the plan asks for {name} {more:g}, and {max(limit - had, 0):g} is left")
    row = (run, dataset, privacy.unit, privacy.epsilon, privacy.delta, today.isoformat())
    db.execute("INSERT INTO reserved VALUES (?, ?, ?, ?, ?, ?, 1)", row)


def begin(db: sqlite3.Connection, run: str, number: int, question: str) -> None:
    """A round of a run under privacy is to be computed, for this one *question*, whatever comes of it: even that an
    answer did not fail tells of the data. Raises PrivacyBudgetError for another than it was begun for."""
    db.execute("INSERT OR IGNORE INTO begun VALUES (?, ?, ?)", (run, number, question))
    [known] = db.execute("SELECT question FROM begun WHERE run = ? AND round = ?", (run, number)).fetchone()
    if known != question:
        raise _refused("budget.question", "the round was begun before in other words")


def charge(db: sqlite3.Connection, cost: Charge, today: dt.date) -> None:
    """Charge one release, within the transaction that stores it; a round of a run is charged once, however often it
    is asked. Raises PrivacyBudgetError when the quota of exact releases is used up, or less was reserved."""
    exact = math.isinf(cost.epsilon)
    before = db.execute("SELECT question FROM charged WHERE run = ? AND round = ?", (cost.run, cost.round)).fetchone()
    if before and before[0] != cost.question:  # the same noise under two answers could be subtracted
        raise _refused("budget.question", "the round was asked before in other words, or of other data")
    if before:
        return
    if exact:
        quota = cost.budget.exact_releases
        if quota is not None and _exact(db, cost.dataset, cost.budget, today) >= quota:
            raise _refused("budget.exact-spent", f"all {quota} exact releases of the data set are used up")
    else:
        reserved = "SELECT 1 FROM reserved WHERE run = ? AND dataset = ? AND open AND epsilon * (1 + 1e-9) >= ?"
        if not db.execute(reserved, (cost.run, cost.dataset, cost.epsilon)).fetchone():
            raise _refused("budget.not-reserved", "the run did not reserve what the release costs")
    epsilon = None if exact else cost.epsilon
    day = today.isoformat()
    row = (cost.run, cost.round, cost.dataset, epsilon, day, cost.question)
    db.execute("INSERT INTO charged VALUES (?, ?, ?, ?, ?, ?)", row)


def forfeit(db: sqlite3.Connection, run: str, today: dt.date) -> None:
    """The run failed in a way that may tell of the data: all that it reserved counts as spent."""
    row = db.execute("SELECT dataset, epsilon FROM reserved WHERE run = ?", (run,)).fetchone()
    if row is not None:
        day = today.isoformat()
        db.execute("INSERT OR IGNORE INTO charged VALUES (?, -1, ?, ?, ?, 'forfeit')", (run, row[0], row[1], day))


def settle(db: sqlite3.Connection, run: str) -> None:
    """The run ended: what it reserved and did not use is free again."""
    db.execute("UPDATE reserved SET open = 0 WHERE run = ?", (run,))
    db.execute("DELETE FROM begun WHERE run = ?", (run,))


def _refused(code: str, message: str) -> PrivacyBudgetError:
    return PrivacyBudgetError(
        code, message, field="budgets",
        remedy="ask for less, or later; the site's operator decides: policy.yaml, 'budgets'",
    )  # fmt: skip
