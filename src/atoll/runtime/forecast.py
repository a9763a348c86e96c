"""A forecast: how long a plan would take at a fleet of sites, and what would travel, before anyone is asked to join.

The study is run dry, as for its noise: every sum tells nothing, so that only its rounds, their sizes and their steps
are known. In virtual time each is asked of the fleet, by the plan's own schedule, cohort rule and protection. What
depends on the data (when a fit has converged) is taken for the longest that the parameters let it be.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from atoll.contract.errors import AtollError, PlanError
from atoll.contract.plan import Plan
from atoll.contract.privacy import Privacy
from atoll.contract.protection import Choice
from atoll.contract.rounds import Round
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import Array, Json
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.runtime.fleet import Fleet
from atoll.runtime.noise import telling_nothing
from atoll.runtime.simulated import Simulation
from atoll.runtime.simulation import Answer, Engine
from atoll.runtime.study import check_plan, settled, study
from atoll.runtime.timeline import Simulated
from atoll.runtime.virtual_time import Virtual
from atoll.runtime.work import ROW_S, Work

MEASURED_ROWS = 512
ENOUGH = 4
"""Rounds of which the quickest is what a step takes."""
TOLD_SITES, TOLD_ROUNDS = 20, 5000


class Nobody:
    """Sites without data (see :class:`atoll.runtime.simulation.Answers`): sums tell nothing, replies hold ones."""

    def __init__(self, fleet: Fleet) -> None:
        self.real = False
        self.lost: dict[str, AtollError] = {}
        self.broken: dict[str, AtollError] = {}
        self._fleet = fleet

    def rows(self) -> dict[str, int]:
        return dict(zip(self._fleet.names, self._fleet["rows"].astype(int).tolist(), strict=True))

    def answers(self, asked: Round, number: int, sites: Sequence[str], sent: Mapping[str, Array]) -> dict[str, Answer]:
        one = {}
        for name, field in asked.reply.items():
            value = 1.0 if field.bound is None else min(1.0, field.bound)
            one[name] = np.full([size or 0 for size in field.shape], value).astype(field.dtype)
        return dict.fromkeys(sites, one)

    def total(
        self, asked: Round, number: int, sites: Sequence[str], counted: Collection[str], sent: Mapping[str, Array]
    ) -> tuple[dict[str, Array], tuple[str, ...]]:
        return telling_nothing(asked.reply), tuple(site for site in sites if site in counted)

    def close(self) -> None:
        """Nobody is there."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What computing takes on the measured machine. step_s: a local step; row_s: a row in a pass over all; how: where
    these are from."""

    step_s: float
    row_s: float
    how: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What became of a dry run. complete: every round of it is known; else its rounds depend on the data from there
    on, and it may be longer. failed: why the run would fail ("" if it would not)."""

    plan: Plan
    fleet: Fleet
    speed: Speed
    done: Simulated
    complete: bool
    failed: str = ""

    def to_json(self) -> dict[str, Json]:
        """Everything that is told, as JSON: totals, rounds, sites (those that count most, of a large fleet)."""
        done, names = self.done, self.fleet.names
        size = done.to_bytes + done.from_bytes
        rounds = [one for one in done.rounds if one.asked]
        waited = Counter(one.last for one in rounds if one.last)
        order = np.argsort(-(done.waited_s + 1e-12 * size), kind="stable")[:TOLD_SITES]
        return {
            "study": self.plan.name, "program": self.plan.program, "plan_hash": self.plan.hash,
            "protection": self.plan.protection.sum, "sites": len(self.fleet), "seed": self.fleet.seed,
            "seconds": done.seconds, "rounds": done.num_rounds, "complete": self.complete, "failed": self.failed,
            "speed": asdict(self.speed),
            "traffic": {
                "to_sites_bytes": float(done.to_bytes.sum()), "from_sites_bytes": float(done.from_bytes.sum()),
                "site_median_bytes": float(np.median(size)), "site_most_bytes": float(size.max()),
            },
            "dropouts": [{"second": at, "site": site, "code": code} for at, site, code in done.dropouts[:1000]],
            "num_dropouts": len(done.dropouts),
            "late": sum(one.late for one in rounds),
            "waiting": [
                {"site": names[place], "last_in_rounds": waited[names[place]],
                 "others_waited_s": float(done.waited_s[place]), "computing_s": float(done.computed_s[place]),
                 "bytes": float(size[place])}
                for place in order.tolist()
            ],
            "timeline": [asdict(one) for one in done.rounds[:TOLD_ROUNDS]],
        }  # fmt: skip


def forecast(plan: Plan, fleet: Fleet, speed: Speed) -> Forecast:
    """What *plan* would take at *fleet*, whose every site is asked to join. Raises PlanError for a plan that cannot be
    run, and where no site is there to begin."""
    check_plan(plan)
    plan = settled(plan)
    sites = plan.cohort.sites or fleet.names
    fleet = fleet.of(sites)
    if len(sites) < plan.cohort.min_sites:
        raise PlanError(
            "cohort.too-small", f"the plan demands {plan.cohort.min_sites} sites, and the fleet has {len(sites)}",
            field="cohort.min_sites", remedy="describe more sites, or lower min_sites",
        )  # fmt: skip
    rows = np.floor(fleet["rows"] * (1 - plan.run.holdout))
    clock = Virtual(fleet, plan.run.deadline_s, speed.step_s)
    run = Simulation(plan, sites, Nobody(fleet), work=Work(rows, speed.step_s, speed.row_s), clock=clock)
    failed = ""
    with np.errstate(all="ignore"):
        try:
            run.run(study(_fixed(plan), sites))
        except AtollError as error:
            failed, run.done.seconds = str(error), clock.now
    return Forecast(plan, fleet, speed, run.done, run.done.outcome is not None, failed)


def _fixed(plan: Plan) -> Plan:
    """The plan with noise, where its program can have some: then how many rounds there are depends on no sum."""
    noised = plan.model_copy(update={"privacy": plan.privacy or Privacy(unit="site", epsilon=1, delta=1e-6)})
    try:
        check_plan(noised)
    except PlanError:
        return plan
    return noised


# ---------------------------------------------------------------- how long a step takes


class _Enough(Exception):
    """So many rounds were measured."""


class _Stopwatch:
    """One site's answers, and how long they take."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self.real, self._engine, self._work = True, engine, work
        self.lost, self.broken = engine.lost, engine.broken
        self.steps: list[float] = []
        self.passes: list[float] = []

    def rows(self) -> dict[str, int]:
        return self._engine.rows()

    def answers(self, asked: Round, number: int, sites: Sequence[str], sent: Mapping[str, Array]) -> dict[str, Answer]:
        began = time.perf_counter()
        found = self._engine.answers(asked, number, sites, sent)
        seconds, where = time.perf_counter() - began, np.zeros(len(sites), np.int64)
        steps = self._work.steps(asked, where, np.ones(len(sites)))
        if steps is not None and steps.any():
            self.steps.append(seconds / float(steps.sum()))
        elif asked.stage == "program":
            self.passes.append(seconds / max(float(self._work.rows[0]), 1.0))
        if len(self.steps) >= ENOUGH or len(self.passes) >= 16 * ENOUGH:
            raise _Enough
        return found

    def total(
        self, asked: Round, number: int, sites: Sequence[str], counted: Collection[str], sent: Mapping[str, Array]
    ) -> tuple[dict[str, Array], tuple[str, ...]]:
        replies = self.answers(asked, number, sites, sent)
        wide = {n: np.int64 if np.dtype(f.dtype).kind in "iu" else np.float64 for n, f in asked.reply.items()}
        (reply,) = replies.values() or ({},)
        return {n: np.array(reply[n], wide[n]) for n in asked.reply}, tuple(replies)

    def close(self) -> None:
        self._engine.close()


def measured(plan: Plan, rows: float = MEASURED_ROWS, seed: int = 0) -> Speed:
    """What computing takes on this machine, by running the plan's first rounds on made-up rows of its schema.

    Raises PlanError where no such rows can be prepared or learned from: then say how long a step takes.
    """
    number = int(np.clip(rows, 8, MEASURED_ROWS))
    alone = plan.cohort.model_copy(update={"sites": (), "min_sites": 1})
    settings = plan.run.model_copy(update={"min_group_size": 1, "holdout": 0.0, "evaluate": False})
    params = {name: value for name, value in plan.params.items() if name not in ("sites_per_round", "evaluate_every")}
    asked = plan.model_copy(
        update={"cohort": alone, "run": settings, "protection": Choice(sum="plain"), "privacy": None, "params": params}
    )
    try:
        data = SiteData.of(made_up(plan.table, number, seed), asked, "measured")
        learned = np.array([float(len(data.parts({})[0]))])
        watch = _Stopwatch(Engine(asked, {"measured": data}), Work(learned))
        with contextlib.suppress(_Enough):
            Simulation(asked, ("measured",), watch, work=Work(learned)).run()
    except (AtollError, ArithmeticError, ValueError) as error:
        why = error.code if isinstance(error, AtollError) else type(error).__name__
        raise PlanError(
            "forecast.no-step", f"no local step can be measured on made-up rows: {why}", field="step_s",
            remedy="say how long a step takes: --step-s",
        ) from error  # fmt: skip
    step_s = min(watch.steps, default=0.0)
    row_s = max(watch.passes, default=step_s / max(float(plan.params.get("batch_size", 32)), 1.0) or ROW_S)
    return Speed(step_s, row_s, f"measured here on {number} made-up rows")


def told(plan: Plan, step_s: float) -> Speed:
    """By what is said of a step. Raises PlanError if that is no time."""
    if not (0 < step_s < float("inf")):
        raise PlanError("forecast.step", "a step takes more than no time", field="step_s", remedy="--step-s 0.01")
    return Speed(step_s, step_s / max(float(plan.params.get("batch_size", 32)), 1.0), "as told")


def made_up(schema: TableSchema, rows: int, seed: int = 0) -> Table:
    """Rows within the schema's ranges and code lists, and of no meaning."""
    random = np.random.default_rng((seed, 12))
    columns = {name: _made(column, rows, random) for name, column in schema.columns.items() if column.role != "ignore"}
    return Table(schema, columns)


def _made(column: Column, rows: int, random: np.random.Generator) -> Any:
    if column.dtype == "image":
        return random.integers(0, 256, (rows, *(column.shape or ())), np.uint8)
    if column.values is not None:
        drawn = [column.values[place] for place in random.integers(0, len(column.values), rows)]
        return np.array(drawn, np.float64 if column.numeric else object)
    if column.numeric:
        low, high = column.range or (0.0, float(rows))
        values = random.uniform(low, high, rows)
        return np.floor(values) if column.dtype == "integer" else values
    if column.dtype in ("date", "datetime"):
        days = np.datetime64("2024-01-01") + np.sort(random.integers(0, 365, rows)).astype("timedelta64[D]")
        return days if column.dtype == "date" else days.astype("datetime64[us]")
    words = np.array(["fever", "water", "help", "road", "cough", "fire", "power", "school"], object)
    return np.array([" ".join(random.choice(words, 12)) for _ in range(rows)], object)
