"""Online federated learning over streams: in each period sites test the model on their new rows, then train it on them.

Rounds are closed, disjoint periods that the plan names beforehand: period i holds the rows whose time is in
[start + i · every, start + (i + 1) · every). A row is used in its own period only, first for testing, so that the
errors are those of a model that has not seen it (prequential evaluation). Drift is detected on the federation's errors,
and by each site on its own, and the plan says what follows: nothing but a note, a higher learning rate in the next
period, or a new beginning from the first weights.

Sources: Gama, Sebastião & Rodrigues 2013, On Evaluating Stream Learning Algorithms (Machine Learning), §3 (test, then
train); McMahan et al. 2017, Algorithm 1 (training); ``statistics/drift.py`` (Page-Hinkley, ADWIN).

Parties: sites and coordinator. Messages: as in FedAvg, a round a period; with the change of the weights come, in the
same Sum, the period's errors and their squares, and whether the site's own detector warned. The coordinator learns, in
each period, the weighted mean change, the number of rows, their mean error, and how many sites saw drift (each site's
under ``plain``); with ``alarms`` in the end also in which periods each site did that shares its own metrics. Dropout: a
period is of the survivors; an absent site's rows of it are not used later. A site with fewer rows in a period than its
minimum group size sits that period out. Cost: FedAvg's, and 24 bytes; with ``alarms`` one round more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.errors import PlanError, PolicyError, ProtocolError
from atoll.contract.program import Cohort, SiteView, TableView, handler, program
from atoll.contract.rounds import Gather, Reply, Round, Steps, Task, count, not_taken
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local
from atoll.models.model import Goal, Model
from atoll.models.rows import Rows
from atoll.statistics.drift import Adwin, Detector, PageHinkley
from atoll.statistics.noise import smallest

Floats = NDArray[np.float64]
DURATION = re.compile(r"([1-9][0-9]*)(d|h|min|s)")
SECONDS = {"d": 86_400, "h": 3600, "min": 60, "s": 1}


class OnlineParams(FederatedParams):
    """time: a column of times, dates or numbers. start, every: the periods, as a date and a duration ("7d", "6h"), or
    both as numbers; rounds: how many. detector: of drift. tolerance, threshold: δ and λ of Page-Hinkley, whose
    observations are periods' mean errors. confidence: δ of ADWIN; design_effect: how many rows tell it as much as one
    independent row would. on_drift: what follows; boost: the learning rate's factor, in the next period. alarms: in the
    end, ask in which periods each site's own detector warned (of sites whose policy shares "metrics")."""

    time: str
    start: float | str
    every: float | str
    rounds: int = Field(default=12, ge=1)
    weighting: Literal["rows"] = "rows"
    detector: Literal["adwin", "page-hinkley"] = "adwin"
    tolerance: float = Field(default=0.02, ge=0)
    threshold: float = Field(default=0.2, gt=0)
    confidence: float = Field(default=0.01, gt=0, lt=1)
    design_effect: float = Field(default=1.0, ge=1)
    on_drift: Literal["note", "boost", "reset"] = "note"
    boost: float = Field(default=3.0, ge=1)
    alarms: bool = False

    def detects(self) -> Detector:
        """The detector, in its settings."""
        if self.detector == "adwin":
            return Adwin(self.confidence, self.design_effect)
        return PageHinkley(self.tolerance, self.threshold)

    def clock(self, schema: TableSchema) -> tuple[float, float]:
        """(start, every) in the units of :func:`ticks`; raises PlanError."""
        column = schema.columns.get(self.time)
        timed = column is not None and column.dtype in ("date", "datetime")
        if column is None or column.role == "ignore" or not (timed or column.numeric):
            raise PlanError(
                "plan.bad-column", f"{self.time!r} has no order that periods could follow", field="params.time",
                remedy="name a column of the prepared table with dates, times or numbers",
            )  # fmt: skip
        try:
            if timed:
                found = DURATION.fullmatch(str(self.every))
                start = float(ticks(np.array([self.start], "datetime64[us]"))[0])
                every = int(found[1]) * SECONDS[found[2]] * 1e6 if found else 0.0
            else:
                start, every = float(self.start), float(self.every)
        except ValueError:
            start = every = 0.0
        if every > 0 and math.isfinite(start + every):
            return start, every
        raise PlanError(
            "online.bad-period", "start and every do not suit the column of times", field="params.every",
            remedy="of dates: start: 2024-01-31, every: 7d (or h, min, s); of numbers: two numbers, every > 0",
        )  # fmt: skip

    def begins(self, number: int) -> str | float:
        """When a period does: a date, with a time where it is not midnight, or a number."""
        if found := DURATION.fullmatch(str(self.every)):
            every = np.timedelta64(number * int(found[1]) * SECONDS[found[2]], "s")
            told = str(np.datetime64(str(self.start), "s") + every)
            return told.removesuffix("T00:00:00").replace("T", " ")
        return float(self.start) + number * float(self.every)


def ticks(column: NDArray[Any]) -> Floats:
    """Times as numbers, microseconds of dates, NaN where missing, [num_rows]."""
    if column.dtype.kind != "M":
        return np.asarray(column, np.float64)
    return np.where(np.isnat(column), np.nan, column.astype("datetime64[us]").astype(np.float64))


def most(model: Model) -> float:
    """How large a row's error can be."""
    return 1.0 if model.task in ("binary", "classes") else 2.0


def errors(model: Model, rows: TableView, labels: Floats) -> Floats:
    """Each row's error, [num_rows]: whether the class is wrong, or the absolute error in units of half the target's
    range (of several targets, their mean), predictions being clipped to the range."""
    found = np.asarray(model.predict(rows), np.float64)
    if model.task in ("binary", "classes"):
        called = found.argmax(1) if model.task == "classes" else found >= 0.5
        return np.asarray(called != labels, np.float64)
    goal = Goal.of(rows.schema, model.targets)
    y, p = ((v.reshape(len(rows), -1) - goal.middle) / goal.half for v in (labels, found))
    return np.asarray(np.abs(np.clip(p, -1, 1) - y).mean(1))


@program("horizontal.online", needs={"sum"}, offers=OFFERS)
class Online(FedAvg):
    """FedAvg over the closed periods of a stream: tested before it learns, and watched for drift."""

    Params = OnlineParams
    gaps: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """As FedAvg's, with {"periods", "stream"} (see :meth:`reported`), and with ``alarms`` {"alarms": {site: the
        periods in which it saw drift}}."""
        result = yield from super().coordinate(cohort, start)
        if self.params.alarms and cohort.exact:
            fields = {"periods": count(self.params.rounds, bound=1)}
            found = yield Round("alarms", Gather(), fields, optional=True)
            result["alarms"] = {site: np.flatnonzero(found[site]["periods"] > 0).tolist() for site in found}
        return result

    def begin(self, model: Model, cohort: Cohort) -> State:
        """Weights, the period, the learning rate's factor, the detector, and what periods were like."""
        self.params.clock(cohort.schema)
        state = super().begin(model, cohort)
        first = {"first": state["weights"]} if self.params.on_drift == "reset" else {}
        drift = {"drift": self.params.detects().start(), "periods": np.empty((0, 4))}
        return {
            **state, **first, **drift, "period": np.array(0.0), "rate": np.array(1.0),
            "smallest": np.array(smallest(cohort)),
        }  # fmt: skip

    def extras(self, model: Model) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Errors before training as shares of the most, their squares, and whether the site's detector warned."""
        return {"errors": ((), 1.0), "squares": ((), 1.0), "drifting": ((), 1.0)}

    def _told(self, model: Model, state: State, number: int) -> State:
        return {**super()._told(model, state, number), "period": state["period"], "rate": state["rate"]}

    def _at(self, site: SiteView, task: Task) -> tuple[Local, State]:
        at, sent = super()._at(site, task)
        rate = at.params.learning_rate * float(np.clip(task.take("rate", ()), 1, self.params.boost))
        params = at.params.model_copy(update={"learning_rate": rate})
        return replace(at, params=params, examples=at.examples.take(self._period(site, task))), sent

    def _period(self, site: SiteView, task: Task) -> NDArray[np.int64]:
        """The rows of the period that is asked for; none, where they are too few."""
        start, every = self.params.clock(site.table.schema)
        number = (ticks(site.table[self.params.time]) - start) / every
        period = float(task.take("period", ()))
        if not (period < self.params.rounds and period.is_integer()):
            raise not_taken("period")
        if period <= float(site.state.get("period", -1.0)):
            raise ProtocolError(
                "online.period-again", "a period is asked for that is over", field="period",
                remedy="the coordinator does not keep the protocol: do not go on with it",
            )  # fmt: skip
        rows = np.flatnonzero(np.floor(number) == period)
        return rows if len(rows) >= site.min_group_size else rows[:0]

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """Test on the period's rows, then train on them."""
        rows = Rows.part(at.site.table, self._period(at.site, at.task))
        found = errors(at.model.with_weights(sent["weights"]), rows, at.examples.labels) / most(at.model)
        mean, square, detector = float(found.mean()), float((found**2).mean()), self.params.detects()
        state = at.site.state.get("drift", detector.start())
        at.site.state["drift"], warned = detector.update(state, len(found), mean, square)
        at.site.state["period"] = at.task.take("period", ())
        if warned:
            at.site.state["warned"] = np.append(at.site.state.get("warned", []), at.site.state["period"])
        told = {"errors": mean, "squares": square, "drifting": warned / len(found)}  # weighted by rows, a sum of sites
        return {**super().local(at, sent), **told}

    def step(self, state: State, mean: Mapping[str, Array], share: float) -> None:
        """The average; and what follows from drift."""
        p, rows, drifted = self.params, float(mean["weight"]), False
        error, square, warned = (float(np.clip(mean[name], 0, 1)) for name in ("errors", "squares", "drifting"))
        if rows > 0:
            super().step(state, mean, share)
            state["drift"], drifted = p.detects().update(state["drift"], max(rows, 1.0), error, square)
        if drifted and p.on_drift == "reset":
            state["weights"] = state["first"]
        period = [rows, error, float(drifted), round(warned * rows)]
        state |= {
            "periods": np.vstack([state["periods"], period]), "period": state["period"] + 1,
            "rate": np.array(p.boost if drifted and p.on_drift == "boost" else 1.0),
        }  # fmt: skip

    def watched(self, model: Model, state: State) -> Mapping[str, float]:
        """The period's mean error."""
        last = self._told_of(model, state)[-1]
        return {"error": last["error"]} if last["error"] is not None else {}

    def reported(self, model: Model, state: State) -> Mapping[str, Any]:
        """{"periods": each one's begin, rows and mean error (None where they are none, or too few to be told), whether
        there was drift and how many sites saw it; "stream": what was watched, and how}."""
        p = self.params
        watched = {"time": p.time, "detector": p.detector, "on_drift": p.on_drift, "task": model.task}
        return {"periods": self._told_of(model, state), "stream": watched}

    @handler("alarms", reduce="gather")
    def alarms(self, site: SiteView, task: Task) -> Reply:
        """At the site: the periods in which it saw drift; withheld unless its policy shares "metrics"."""
        if not site.shares("metrics"):
            raise PolicyError("policy.withheld", "the site does not share its own metrics", field="share")
        if not self.params.alarms or "told" in site.state:
            raise PolicyError(
                "policy.not-in-plan", "the plan does not ask for a site's alarms, or not again", field="alarms",
                remedy="the coordinator does not keep the plan: do not go on with it",
            )  # fmt: skip
        site.state["told"] = np.array(1)
        return {"periods": np.isin(np.arange(self.params.rounds), site.state.get("warned", [])).astype(np.int64)}

    def _told_of(self, model: Model, state: State) -> list[dict[str, Any]]:
        return [
            {
                "period": number,
                "begins": self.params.begins(number),
                "rows": round(rows) if rows >= state["smallest"] else None,
                "error": error * most(model) if rows >= state["smallest"] else None,
                "drift": bool(drifted),
                "sites_drifting": int(sites),
            }
            for number, (rows, error, drifted, sites) in enumerate(state["periods"].tolist())
        ]
