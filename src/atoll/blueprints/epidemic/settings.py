"""What the daily job is asked with."""

from __future__ import annotations

import datetime as dt

from pydantic import Field, field_validator

from atoll.blueprints.epidemic.alarms import AlarmRule
from atoll.blueprints.epidemic.risk import LEVELS, Level
from atoll.blueprints.epidemic.series import SavedModel, SeriesColumns
from atoll.blueprints.epidemic.twin import Measure
from atoll.contract.errors import PlanError
from atoll.contract.program import ProgramParams


class DailyParams(ProgramParams):
    """series: the columns of the regions' tables. models: saved models, one for each horizon. day: that is asked
    about (default: the newest that most sites have). window_days, ceiling_per_100k: of the risk. risk_horizon: of
    the model that the risk is of, in days (default: the longest within the window, else the shortest). risk_days:
    days for which the risk is told. history_days: days of new cases that are told. max_age_days: how old a late
    site's newest day may be. min_regions: of fewer sites (or of a smaller cohort's all) nothing is summed. levels
    (default: those of ``risk``), alarm: see their modules. interval: of the forecasts. seir_days: of the projection
    (0: none). interventions: measures compared on the SEIR twin."""

    series: SeriesColumns
    models: tuple[SavedModel, ...] = Field(min_length=1, max_length=16)
    day: str | None = None
    window_days: int = Field(default=7, ge=1, le=60)
    ceiling_per_100k: float = Field(default=1.0, gt=0)
    risk_horizon: int | None = None
    risk_days: int = Field(default=14, ge=1, le=400)
    history_days: int = Field(default=56, ge=14, le=400)
    max_age_days: int = Field(default=2, ge=0, le=60)
    min_regions: int = Field(default=3, ge=1)
    levels: tuple[Level, ...] = ()
    alarm: AlarmRule = AlarmRule()
    interval: float = Field(default=0.95, gt=0, lt=1)
    seir_days: int = Field(default=14, ge=0, le=180)
    interventions: tuple[Measure, ...] = ()

    @field_validator("day")
    @classmethod
    def _a_day(cls, value: str | None) -> str | None:
        return value if value is None else dt.date.fromisoformat(value).isoformat()

    @field_validator("models")
    @classmethod
    def _each_horizon_once(cls, models: tuple[SavedModel, ...]) -> tuple[SavedModel, ...]:
        if len({model.days for model in models}) < len(models):
            raise ValueError("two models are of the same horizon")
        return models

    @property
    def risk_model(self) -> SavedModel:
        """That the risk and the drivers are of."""
        if self.risk_horizon is not None:
            found = [model for model in self.models if model.days == self.risk_horizon]
            if not found:
                raise PlanError("epidemic.no-horizon", "no model has the risk's horizon", field="risk_horizon",
                                remedy="name the days of one of params.models")  # fmt: skip
            return found[0]
        within = [model for model in self.models if model.days <= self.window_days]
        return max(within, key=lambda m: m.days) if within else min(self.models, key=lambda m: m.days)

    @property
    def marks(self) -> tuple[Level, ...]:
        """The levels."""
        return self.levels or LEVELS

    @property
    def length(self) -> int:
        """Days of a site's series that are looked at."""
        return max(self.history_days + self.alarm.reach_days, self.risk_days + self.window_days)

    @property
    def number(self) -> int | None:
        """*day* as days after 1 January 1970."""
        return None if self.day is None else (dt.date.fromisoformat(self.day) - dt.date(1970, 1, 1)).days
