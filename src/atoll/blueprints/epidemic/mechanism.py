"""The joint series of new cases, seen by mechanism: R_t, a SEIR projection, and interventions compared on its twin.

Computed by the coordinator half of what is reported, and of nothing else: no single region's series is known to it, so
the twin is of the joint area as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.blueprints.epidemic.intervention import compare
from atoll.blueprints.epidemic.reproduction import reproduction_number
from atoll.blueprints.epidemic.seir import SeirFit, fit, project
from atoll.blueprints.epidemic.twin import Measure, Twin

Floats = NDArray[np.float64]
LEAST_CASES = 11
"""Fewer in a week tell no R_t (Cori et al. 2013, web appendix 2)."""
TOLD = ("name", "effect", "cases", "low", "high", "averted", "averted_low", "averted_high")


def seen(
    cases: Floats, day: int, population: int, days: int, measures: Sequence[Measure], level: float
) -> dict[str, Any]:
    """{"reproduction", "seir", "interventions", "interventions_days", "seir_note"} as the daily job tells them.

    cases: new cases of the joint area by day, the last being *day* (after 1 January 1970), NaN where unknown. days: of
    the projection, 0 for none. level: of intervals.
    """
    told: dict[str, Any] = {"reproduction": [], "seir": [], "seir_note": "", "interventions": []}
    known = np.flatnonzero(~np.isnan(cases))
    if not len(known):
        return {**told, "seir_note": "there is no day of which all regions told their cases"} if days else told
    series, last = cases[known[0] : known[-1] + 1], day - (len(cases) - 1 - int(known[-1]))
    spread = reproduction_number(series, level=level, least_cases=LEAST_CASES)
    told["reproduction"] = _rows(last - len(series), spread.mean, spread.low, spread.high)
    if not days:
        return told
    fitted = fit(series, float(population))
    if not isinstance(fitted, SeirFit):
        return {**told, "seir_note": fitted.reason}
    ahead = project(fitted, days, level=level)
    told["seir"] = _rows(last, ahead.mean, ahead.low, ahead.high)
    if measures:
        effects = compare(Twin.split(fitted, {"all": float(population)}), days, measures, level=level)
        told["interventions"] = [{name: asdict(effect)[name] for name in TOLD} for effect in effects]
        told["interventions_days"] = days
    return told


def _rows(before: int, mean: Floats, low: Floats, high: Floats) -> list[dict[str, Any]]:
    """A value a day from the day after *before* on, where it is known."""
    return [
        {"day": str(np.datetime64(before + 1 + i, "D")), "mean": float(mean[i]), "low": float(low[i]),
         "high": float(high[i])}
        for i in range(len(mean)) if not math.isnan(mean[i])
    ]  # fmt: skip
