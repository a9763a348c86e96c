"""The daily job of several regions' epidemic control: risk, forecast, alarms and drivers by one sum.

Each region scores its newest day with its saved model. The formula of the risk h_y, between 0 and 1, and its
calibration are those of :mod:`atoll.blueprints.epidemic.risk`; alarms: ``alarms``; the learned forecast's intervals are
from the joint forecast's own errors on the days before (``backtest.quantiles_of_errors``: errors on days that the model
was trained on are too small, and its intervals then too narrow); SEIR, R_t and interventions are of the summed series.

Parties: sites (regions) and coordinator. Messages: round "status" (asked of each site by itself, before any number)
tells the newest day that a site has rows of, and whether something is wrong with its table; the day goes out; round
"score" is one Sum; round "own" gathers the risk, forecast and alarm of the sites whose policy shares "risk". The
coordinator learns each site's newest day and kind of trouble; of the cohort's total: Σ h_y, Σ h_y · population and
population by day, new cases by day, predictions by horizon and day, Σ |SHAP| of each feature, and how many regions and
cities are in alarm; and the own values of sites that share "risk". Under ``plain`` it would learn each site's own of
all this, so a site whose policy does not share "risk" refuses plain. Sites learn the day and nothing else. Threat
model: as the plan's protection; a coordinator that does not keep the protocol can ask about other days, which have
other sums of the same kind; sites cannot know how many others are late, and send zeros: of fewer than *min_regions*
the coordinator half asks nothing. Dropout: numbers of those present, marked "partial". Cost: 3 rounds, about
20 · (history_days · (horizons + 1) + risk_days) bytes a site.

The day is *day*, else the newest that most sites have. A site without that day is late: it counts with its newest day
if that is at most *max_age_days* before, and is absent otherwise, as is one whose table is wrong. Both are told.

Small counts: new cases of a day that are fewer than the plan's smallest group, and not none, are not reported, and
everything that is made of the series (R_t, SEIR, the forecast's intervals) takes half the smallest group instead. So
R_t and SEIR are blind below that: the first cases of a wave are seen by alarms and the risk, which sites make of their
own exact counts, and not by these. Under differential privacy *day* must be given, and sites are not asked for status.

The same job day after day: sites that remember questions ("repeats: refuse") answer each day anew. "status" tells of
days and not of people. "score" and "own" are about one day, which is sent: as any day may be asked about of the rows as
they are, a day more tells what two days asked of the later rows would. The *same* day is answered again over the very
same rows and cohort only: the difference would tell a correction, or the own numbers of a region that was late or
absent. So a day that was partial stays so. New cases are told up to the newest day that all regions in the sum have, so
that a late region's are first told together with the others'.

What two days' answers tell together: past days are told again each day. What was corrected in between shows in the
joint new cases of both. A region that was absent on a day, and is there on the next, adds its own numbers of that day
to a total that is known without them; of one that was late and counted by an older day, the difference is that of its
new risk and prediction from the older ones. Whoever cannot accept this raises max_age_days, and sets risk_days to 1.

Source: system C of the epidemic blueprint: each node scores new data daily with its saved model, and the coordinator
decrypts Σ h_y alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.blueprints.epidemic import alarms
from atoll.blueprints.epidemic.drivers import MOST, importances
from atoll.blueprints.epidemic.outcome import INCIDENCE, Asked, interval, past_errors
from atoll.blueprints.epidemic.risk import regional_risk
from atoll.blueprints.epidemic.series import (
    CASES,
    DAYS,
    NO_FEATURES,
    PEOPLE,
    SOUND,
    WRONG,
    Series,
    predicted,
    read,
    whole,
)  # fmt: skip
from atoll.blueprints.epidemic.settings import DailyParams
from atoll.contract.errors import PlanError, PolicyError, ProtocolError
from atoll.contract.program import Cohort, SiteView, TableView, handler, program
from atoll.contract.rounds import Field, Gather, Metrics, Reply, Round, Steps, Sum, Task, count, real, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.models.model import Predictor
from atoll.models.rows import Rows
from atoll.statistics.noise import fine

Floats = NDArray[np.float64]


@program("epidemic.daily", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Daily:
    """Joint and regional epidemic risk, forecast, alarms and drivers of a day, from saved models."""

    class Params(DailyParams):
        """See :class:`atoll.blueprints.epidemic.settings.DailyParams`."""

    self_chosen = True  # by its newest day: of a day that only one region has, the others' zeros would show that one

    def __init__(self, params: Params) -> None:
        self.params = params

    # ---------------------------------------------------------------- coordinator

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"epidemic": {"day", "partial", "absent", "late", "problems", "joint", "regions", "incidence",
        "forecast", "reproduction", "drivers", "alarms", "interventions", "links", …}}."""
        p, day, status = self.params, self.params.number, dict[str, tuple[int, int]]()
        self._check(cohort.schema)
        if cohort.exact:
            fields = {"newest": count(bound=DAYS), "wrong": count(bound=len(WRONG))}
            told = yield Round("status", Gather(), fields, optional=True)
            status = {site: (int(told[site]["newest"]), int(told[site]["wrong"])) for site in told}
            newest = sorted(latest for latest, wrong in status.values() if wrong == SOUND)
            if day is None and newest:
                day = newest[(len(newest) - 1) // 2]
        least = min(p.min_regions, len(cohort.sites))
        present = [site for site, told_ in status.items() if self._counts(*told_, day or 0)]
        if status and len(present) < least:
            raise _too_few(len(present), least, Asked(p, cohort, day or 0, status, present).problems())
        settled = min([day or 0, *(status[site][0] for site in present)])
        send = {**sent(day or 0), "settled": np.array(float(settled))}
        total = yield Round("score", Sum(), self._fields(cohort.schema), send)
        if day is None:  # under privacy nobody is asked: a plan without a day is refused before, as it comes to no end
            raise PlanError("epidemic.no-day", "no region tells which day it has rows of", field="params.day",
                            remedy="set params.day to the day that is asked about")  # fmt: skip
        present = [site for site in total.sites if site in present or not status]
        if len(present) < least:
            raise _too_few(len(present), least)
        own: Mapping[str, Mapping[str, Array]] = {}
        if cohort.exact:
            own = yield Round("own", Gather(), self._own_fields(), sent(day), optional=True)
        outcome = Asked(p, cohort, day, status, present).outcome(total, own)
        risk = outcome["joint"]["risk"]
        yield Metrics(0, {} if risk is None else {"risk": risk})
        return {"epidemic": outcome}

    def _check(self, schema: TableSchema) -> None:
        """Raise PlanError for columns and models that do not fit the prepared table."""
        p = self.params
        numbers = ("real", "integer")
        columns = {p.series.date: (*numbers, "date", "datetime"), p.series.cases: numbers, p.series.population: numbers}
        columns |= {model.level: numbers for model in p.models if model.level is not None}
        for name, dtypes in columns.items():
            column = schema.columns.get(name)
            if column is None or column.role == "ignore" or column.dtype not in dtypes:
                raise PlanError("plan.bad-column", f"{name!r} is no column of {' or '.join(dtypes)}", field=name,
                                remedy="check params.series against the prepared table's schema")  # fmt: skip
        city = p.series.city
        if city is not None and (city not in schema.columns or schema.columns[city].role == "ignore"):
            raise PlanError("plan.bad-column", f"{city!r} is no column of the prepared table", field=city)
        for model in p.models:
            task = model.unfitted(schema).task
            if task != "regression" and (task != "count" or model.level is not None):
                raise PlanError("epidemic.no-counts", "a saved model does not predict numbers of cases", field="models",
                                remedy="name models of counts or values; with a level, of values")  # fmt: skip
        _ = p.risk_model

    def _counts(self, newest: int, wrong: int, day: int) -> bool:
        """Whether a site is part of the sum."""
        return wrong == SOUND and newest >= day - self.params.max_age_days

    def _fields(self, schema: TableSchema) -> dict[str, Field]:
        p, days = self.params, self.params.history_days
        grid = (len(p.models), days)
        fields = {
            "regions": count(bound=1),
            "risk": real(p.risk_days, bound=1, step=fine(1)),
            "weighted": real(p.risk_days, bound=PEOPLE, step=fine(PEOPLE)),
            "population": count(p.risk_days, bound=PEOPLE),
            "cases": count(days, bound=CASES),
            "cases_withheld": withheld(days),
            "reported": count(days, bound=1),
            "predicted": real(grid, bound=CASES, step=fine(CASES)),
            "foreseen": count(grid, bound=1),
            "alarms": count(3, bound=schema.max_rows),
        }
        if p.risk_model.features:
            fields["drivers"] = real(len(p.risk_model.features), bound=MOST, step=fine(MOST))
        return fields

    def _own_fields(self) -> dict[str, Field]:
        p = self.params
        return {"risk": real(p.risk_days), "forecast": real((len(p.models), 3)), "alarm_since": count(bound=DAYS)}

    # ---------------------------------------------------------------- sites

    @handler("status", reduce="gather", impersonal=True)
    def status(self, site: SiteView, task: Task) -> Reply:
        """At the site: the newest day that is there, and whether its table can be scored. Nothing of cases."""
        newest, wrong = self._state(whole(site))
        return {"newest": newest, "wrong": wrong}

    @handler("score", groups=("population",), cells=INCIDENCE, period="day")
    def score(self, site: SiteView, task: Task) -> Reply:
        """At the site: what is summed of its newest day up to the one that was sent; zeros where there is none."""
        if site.min_group_size > 1 and not site.shares("risk"):
            raise PolicyError(
                "epidemic.own-risk", "the protection would show the region's own risk, which its policy does not share",
                field="share", remedy="choose a protection that shows only sums, or share: [risk] in policy.yaml",
            )  # fmt: skip
        p, day, table = self.params, self._day(task), whole(site)
        zeros: dict[str, Any] = {
            name: np.zeros([size or 0 for size in field.shape], field.dtype)
            for name, field in self._fields(table.schema).items() if name != "cases_withheld"
        }  # fmt: skip
        series = read(table, p.series, p.length, day)
        if not self._counts(series.newest, series.wrong, day):
            return zeros
        models, forecasts = self._predicted(series, table)
        if any(math.isnan(values[-1]) for values in forecasts):
            return zeros
        age, told = day - series.newest, p.history_days
        risk = self._risk(series, forecasts, day)
        there = ~np.isnan(risk)
        grid = np.stack([_carried(values, age)[-told:] for values in forecasts])
        settled = float(task.take("settled", ()))
        cases = _later(series.total, age)[-told:]
        cases[day - told + 1 + np.arange(told) > settled] = math.nan
        region, cities = self._alarmed(series)
        reply = zeros | {
            "regions": 1,
            "risk": np.where(there, risk, 0.0),
            "weighted": np.where(there, risk, 0.0) * series.population,
            "population": np.where(there, round(series.population), 0).astype(np.int64),
            "cases": np.clip(np.rint(np.nan_to_num(cases)), 0, CASES).astype(np.int64),
            "reported": (~np.isnan(cases)).astype(np.int64),
            "predicted": np.nan_to_num(grid),
            "foreseen": (~np.isnan(grid)).astype(np.int64),
            "alarms": np.array([int(region[-1]), int(cities[-1].sum()), cities.shape[1]]),
        }
        if "drivers" in zeros:
            now, before = series.rows[-1], series.rows[-p.window_days :]
            parts = [Rows.part(table, rows[rows >= 0].ravel()) for rows in (now, before)]
            found = importances(models[p.models.index(p.risk_model)], *parts)
            reply |= {} if found is None else {"drivers": found}
        return reply

    @handler("own", reduce="gather", period="day")
    def own(self, site: SiteView, task: Task) -> Reply:
        """At the site: its own risk, forecast and alarm, only where its policy shares them."""
        if not site.shares("risk"):
            raise PolicyError("policy.withheld", "the site does not share its own risk", field="share")
        p, day, table = self.params, self._day(task), whole(site)
        unknown = {"risk": np.full(p.risk_days, math.nan), "forecast": np.full((len(p.models), 3), math.nan)}
        series = read(table, p.series, p.length, day)
        if not self._counts(series.newest, series.wrong, day):
            return {**unknown, "alarm_since": 0}
        _, forecasts = self._predicted(series, table)
        rows = [
            interval(values[-1], past_errors(values, series.total, model.days), p.interval)
            for model, values in zip(p.models, forecasts, strict=True)
        ]
        region, _ = self._alarmed(series)
        began = alarms.since(region)
        return {
            "risk": self._risk(series, forecasts, day),
            "forecast": np.array([[math.nan if v is None else v for v in row.values()] for row in rows]),
            "alarm_since": 0 if began is None else series.newest - len(region) + 1 + began,
        }

    def _state(self, table: Rows) -> tuple[int, int]:
        """The newest day that is there, and SOUND or what is wrong."""
        series = read(
            table, self.params.series, self.params.length, DAYS if self.params.number is None else self.params.number
        )
        wrong = series.wrong
        if wrong == SOUND and any(math.isnan(values[-1]) for values in self._predicted(series, table)[1]):
            wrong = NO_FEATURES
        return series.newest, wrong

    def newest_day(self, tables: Iterable[TableView]) -> str | None:
        """The day that a run over all sites' *tables* would be about, for who may see them all; None: there is none."""
        rows = [Rows(table.schema, len(table), table.__getitem__) for table in tables]
        newest = sorted(latest for latest, wrong in map(self._state, rows) if wrong == SOUND)
        return None if not newest else str(np.datetime64(newest[(len(newest) - 1) // 2], "D"))

    def _day(self, task: Task) -> int:
        """The day that was sent, checked."""
        day = float(task.take("day", ()))
        if day != int(day) or not 0 <= day < DAYS or self.params.number not in (None, day):
            raise ProtocolError("task.array", "what was sent is not a day that the plan allows", field="day")
        return int(day)

    def _predicted(self, series: Series, table: Rows) -> tuple[list[Predictor], list[Floats]]:
        """The saved models, and what each predicts for the region, [days]; NaN where it cannot."""
        models = [saved.fitted(table.schema) for saved in self.params.models]
        pairs = zip(models, self.params.models, strict=True)
        return models, [predicted(series, table, model, saved) for model, saved in pairs]

    def _risk(self, series: Series, forecasts: Sequence[Floats], day: int) -> Floats:
        """h_y of the last risk_days days, the last of which is *day*, [risk_days]."""
        p = self.params
        daily = forecasts[p.models.index(p.risk_model)] / p.risk_model.days
        daily = _carried(daily, day - series.newest)
        risk = regional_risk(
            daily, series.population, window_days=p.window_days, ceiling_per_100k=p.ceiling_per_100k
        )  # fmt: skip
        return risk[-p.risk_days :]

    def _alarmed(self, series: Series) -> tuple[alarms.Flags, alarms.Flags]:
        """(alarms of the region, [days]; those of its cities, [days, cities])."""
        rule = self.params.alarm
        cities = alarms.alarms(alarms.from_none(series.cases), rule)
        if self.params.series.city is None:
            cities = cities[:, :0]
        return alarms.multi_point(alarms.alarms(alarms.from_none(series.total), rule), cities, rule), cities


def sent(day: int) -> dict[str, Array]:
    """What goes out with a round about a day, after 1 January 1970."""
    return {"day": np.array(float(day))}


def _carried(values: Floats, days: int) -> Floats:
    """*values* [length] moved on by so many *days*, for which the last one stands; the same length."""
    return np.append(values, np.full(days, values[-1]))[days:]


def _later(values: Floats, days: int) -> Floats:
    """As :func:`_carried`, but unknown on those days."""
    return np.append(values, np.full(days, math.nan))[days:]


def _too_few(there: int, least: int, problems: Sequence[Mapping[str, str]] = ()) -> ProtocolError:
    """problems: of those that cannot, see ``Asked.problems``."""
    others = "".join(f"; {one['site']}: {one['message']}" for one in problems)
    return ProtocolError(
        "epidemic.too-few-regions", f"{there} regions can be scored, and {least} are the fewest of a sum{others}",
        field="params.min_regions", remedy="wait for the late regions, or mend their tables",
    )  # fmt: skip
