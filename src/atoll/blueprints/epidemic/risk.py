"""Regional epidemic risk between 0 and 1, the joint risk of several regions, and the level that it suggests.

The risk of region y on day t is

    h_y(t) = min(1, p̄_y(t) / P_y · 100,000 / ceiling),    p̄_y(t) = mean of p_y(u) over the days u in (t − window, t]

where p_y(u) are the new cases a day that the saved model predicts from what was known on day u (what it predicts for
its next D days, divided by D, over all cities of the region) and P_y is the resident population. Days of the window
that are not there are left out of the mean. Several regions together have the risk Σ h_y·P_y / Σ P_y, the mean over
their residents; Σ h_y is told beside it.

Calibration. The *ceiling* is the rate, in predicted new cases a day per 100,000 residents, that counts as 1, and is a
parameter. By default it is 1: below one case a day and 100,000 an area was "on track for containment" in the four
colours of the Harvard Global Health Institute (1, 10 and 25 are where its yellow, orange and red begin). For a policy
of mitigation, 14.3 is where the CDC's "high" transmission began (100 cases in seven days; "substantial" was 50,
"moderate" 10), and 35.7 was the European Union's dark red (500 in fourteen days). For one of elimination it must be
far lower: in the delta's first wave the mean of seven days rose to 0.145 in Zhejiang (3 February 2020), 0.10 in
Anhui, 0.09 in Shanghai and 0.053 in Jiangsu, when all four had been at the highest level of response since 23 to 25
January, at 0.001 to 0.02. A ceiling of 0.2 puts that wave's peak at 0.73 and its first week at about 0.1. The levels'
default borders, 0.05, 0.25 and 0.5 of the ceiling, were chosen on that wave with that ceiling: by reported cases in
place of predictions, Zhejiang is yellow on 25 January, orange on 29 January and red on 1 February. They are a
suggestion, as are the actions: decide on them, and say so in the plan.

Sources: system C of the epidemic blueprint (Σ of encrypted h_y, sliding mean of predictions per resident population);
Harvard Global Health Institute & Edmond J. Safra Center for Ethics 2020, Key Metrics for COVID Suppression, p. 6;
Christie et al. 2021, MMWR 70(30):1044–1047 (CDC's levels); Council Recommendation (EU) 2021/119, recital 8 (colours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.errors import SchemaError

Floats = NDArray[np.float64]
PER = 100_000
"""Rates are per so many residents."""


class Level(BaseModel):
    """From which risk on a level is suggested, and the action that goes with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: str = Field(min_length=1, max_length=40)
    at: float = Field(ge=0, le=1)
    action: str = Field(default="", max_length=400)


LEVELS = (
    Level(level="green", at=0.0, action="Routine surveillance."),
    Level(level="yellow", at=0.05, action="Trace contacts of every case, test at entry points, ready isolation beds."),
    Level(level="orange", at=0.25, action="Limit gatherings and travel from affected cities, test close districts."),
    Level(level="red", at=0.5, action="Highest response: close schools and venues, test at large, add hospital beds."),
)


def trailing_mean(daily: Floats, window_days: int) -> Floats:
    """The mean over each day and the window_days − 1 before it, [days], of what is known; NaN where nothing is."""
    known = ~np.isnan(daily)
    sums = np.cumsum(np.append(0.0, np.where(known, daily, 0.0)))
    counts = np.cumsum(np.append(0, known))
    begin = np.maximum(np.arange(len(daily)) + 1 - window_days, 0)
    total, number = sums[1:] - sums[begin], counts[1:] - counts[begin]
    return np.where(number > 0, total / np.maximum(number, 1), math.nan)


def regional_risk(predicted: Floats, population: float, *, window_days: int, ceiling_per_100k: float) -> Floats:
    """h_y of each day, [days], in [0, 1]; NaN where the whole window is unknown.

    predicted: new cases a day, [days], consecutive days, NaN where unknown; below 0 counts as 0. Raises SchemaError
    "epidemic.no-population" where nobody is known to live in the region.
    """
    if not population > 0 or not math.isfinite(population):
        raise no_population()
    rate = trailing_mean(np.maximum(predicted, 0.0), window_days) / population * PER
    return np.minimum(rate / ceiling_per_100k, 1.0)


def joint_risk(weighted: Floats, population: Floats) -> Floats:
    """Σ h_y·P_y / Σ P_y, [days]; NaN where nobody is. weighted: Σ h_y·P_y; population: Σ P_y, [days]."""
    there = population > 0
    return np.where(there, np.clip(weighted / np.where(there, population, 1), 0.0, 1.0), math.nan)


def level_of(risk: float, levels: Sequence[Level] = LEVELS) -> Level | None:
    """The highest level that begins at *risk* or below; None below all of them, or where there is no risk."""
    reached = [level for level in levels if level.at <= risk]
    return max(reached, key=lambda level: level.at, default=None)


def no_population() -> SchemaError:
    """The one error for a region of which nobody knows how many live there."""
    return SchemaError(
        "epidemic.no-population", "the region's population is missing or zero", field="population",
        remedy="fill the population column with the region's residents; until then its risk is unknown",
    )  # fmt: skip
