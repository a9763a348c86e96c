"""Scores of forecasts and of alarms on past waves: pure functions, for backtests with a rolling origin.

Sources: weighted interval score: Bracher, Ray, Gneiting & Reich 2021, "Evaluating epidemic forecasts in an interval
format", PLoS Comput Biol 17(2), eq. 1–3. Moving-block bootstrap: Künsch 1989. Intervals from past errors: empirical
error quantiles, as for the baseline of the COVID-19 Forecast Hub (Cramer et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
ALPHAS = (0.05, 0.2, 0.5)
"""Of the central intervals that are scored: 95 %, 80 % and 50 %."""
PRIOR_DEVIATION = 1.0
"""Of log(1 + cases): how far off a model is taken to be that was hardly seen so far."""
PRIOR_ERRORS = 8
"""Errors that a model must have made before its intervals are of them alone."""


def levels(alphas: Sequence[float] = ALPHAS) -> Floats:
    """The quantile levels of the median and the central intervals, rising, [2·len(alphas) + 1]."""
    return np.array(sorted({0.5, *(a / 2 for a in alphas), *(1 - a / 2 for a in alphas)}))


def interval_score(truth: Floats, low: Floats, high: Floats, alpha: float) -> Floats:
    """Width plus 2/α times how far the truth lies outside, for each row (Gneiting & Raftery 2007)."""
    return (high - low) + 2 / alpha * (np.maximum(low - truth, 0) + np.maximum(truth - high, 0))


def weighted_interval_score(truth: Floats, quantiles: Floats, alphas: Sequence[float] = ALPHAS) -> Floats:
    """WIS of each row, [rows], in units of the truth: |truth − median| if there are no intervals.

    truth: [rows]; quantiles: [rows, 2·len(alphas) + 1], at :func:`levels` of the same *alphas*.
    """
    ordered = sorted(alphas)
    if quantiles.shape != (len(truth), 2 * len(ordered) + 1):
        raise ValueError(f"quantiles must be [{len(truth)}, {2 * len(ordered) + 1}], not {list(quantiles.shape)}")
    total = 0.5 * np.abs(truth - quantiles[:, len(ordered)])
    for k, alpha in enumerate(ordered):
        total = total + alpha / 2 * interval_score(truth, quantiles[:, k], quantiles[:, -1 - k], alpha)
    return np.asarray(total / (len(ordered) + 0.5))


def mean_absolute_error(truth: Floats, forecast: Floats) -> float:
    """MAE in units of the truth; NaN of no rows."""
    return float(np.abs(forecast - truth).mean()) if len(truth) else math.nan


def root_mean_squared_error(truth: Floats, forecast: Floats) -> float:
    """RMSE in units of the truth; NaN of no rows."""
    return float(np.sqrt(((forecast - truth) ** 2).mean())) if len(truth) else math.nan


def coverage(truth: Floats, low: Floats, high: Floats) -> float:
    """The share of rows whose truth lies in its interval; NaN of no rows."""
    return float(((low <= truth) & (truth <= high)).mean()) if len(truth) else math.nan


def quantiles_of_errors(forecast: Floats, errors: Floats, alphas: Sequence[float] = ALPHAS) -> Floats:
    """Quantile forecasts [rows, levels] about point forecasts [rows], from *errors* that the same model made before.

    errors: log((1 + truth) / (1 + forecast)) of forecasts whose truth was known when this one is made. While there are
    fewer than ``PRIOR_ERRORS``, as many as are lacking are put in, evenly spread over a normal distribution with
    ``PRIOR_DEVIATION``. The median is the point forecast itself: what a model is biased by widens its intervals and
    does not correct it.
    """
    lacking = PRIOR_ERRORS - len(errors)
    if lacking > 0:
        errors = np.append(errors, PRIOR_DEVIATION * scipy.special.ndtri((np.arange(lacking) + 0.5) / lacking))
    at = levels(alphas)
    off = np.quantile(errors, at)
    off[len(at) // 2] = 0.0
    off = np.where(at < 0.5, np.minimum(off, 0.0), np.maximum(off, 0.0))  # so that they do not cross the median
    return np.maximum(np.expm1(np.log1p(np.maximum(forecast, 0.0))[:, None] + off), 0.0)


def log_errors(truth: Floats, forecast: Floats) -> Floats:
    """What :func:`quantiles_of_errors` takes."""
    return np.log1p(np.maximum(truth, 0.0)) - np.log1p(np.maximum(forecast, 0.0))


def mean_difference(
    ours: Floats, peers: Floats, *, block: int = 7, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of ours − peers over origins in order, and the ends of its 95 % interval by a moving-block bootstrap.

    Errors of neighbouring origins are alike, since their targets overlap: whole blocks of so many origins are drawn.
    NaN of no origins.
    """
    gaps = np.asarray(ours - peers, np.float64)
    n = len(gaps)
    if n == 0:
        return math.nan, math.nan, math.nan
    block = max(1, min(block, n))
    draw = np.random.default_rng(seed)
    begins = draw.integers(0, n - block + 1, (draws, -(-n // block)))
    chosen = (begins[:, :, None] + np.arange(block)).reshape(draws, -1)[:, :n]
    low, high = np.quantile(gaps[chosen].mean(1), (0.025, 0.975))
    return float(gaps.mean()), float(low), float(high)


@dataclass(frozen=True, slots=True)
class Wave:
    """Days of one region's series, as places in it: when the wave begins, is highest, and has ended."""

    onset: int
    peak: int
    end: int


def waves(daily: Floats, *, threshold: float | Floats, gap: int = 14, window: int = 7) -> list[Wave]:
    """The waves of a series of new cases a day, found with hindsight.

    A wave lasts while the mean over the *window* days about a day is at least *threshold* (one number, or one for each
    day); two that are at most *gap* days apart are one.
    """
    smooth = np.convolve(daily, np.ones(window) / window, "same")
    above = np.flatnonzero(smooth >= threshold)
    if not len(above):
        return []
    parts = np.split(above, np.flatnonzero(np.diff(above) > gap) + 1)
    return [Wave(int(p[0]), int(p[0] + np.argmax(smooth[p[0] : p[-1] + 1])), int(p[-1])) for p in parts]


@dataclass(frozen=True, slots=True)
class AlarmScore:
    """Of alarms on past waves. recall: share of waves with an alarm in time; lead_days: median of the days from the
    first alarm to the wave's peak; NaN where no wave was found. false_per_100_days: first days of alarms outside waves,
    per 100 days outside."""

    waves: int
    recall: float
    lead_days: float
    false_per_100_days: float


def alarm_score(regions: Sequence[tuple[Flags, Sequence[Wave]]], *, before: int = 14) -> AlarmScore:
    """Scores of alarms [days] and waves of each region.

    An alarm belongs to a wave from *before* days before its onset to its peak; one later tells nothing new. Days from
    then to the wave's end count neither for nor against.
    """
    leads: list[int] = []
    many = false = quiet = 0
    for alarms, found in regions:
        outside = np.ones(len(alarms), bool)
        for wave in found:
            begin = max(wave.onset - before, 0)
            outside[begin : wave.end + 1] = False
            hits = np.flatnonzero(alarms[begin : wave.peak + 1])
            many += 1
            if len(hits):
                leads.append(wave.peak - begin - int(hits[0]))
        first = alarms & ~np.append(False, alarms[:-1])
        false += int((first & outside).sum())
        quiet += int(outside.sum())
    return AlarmScore(
        many,
        len(leads) / many if many else math.nan,
        float(np.median(leads)) if leads else math.nan,
        100 * false / quiet if quiet else math.nan,
    )


def recall_by_chance(regions: Sequence[tuple[Flags, Sequence[Wave]]], *, before: int = 14, shifts: int = 50) -> float:
    """The recall that the same alarms would have at other times: mean over circular shifts of all regions' days alike.

    An alarm that sounds often enough hits any wave; recall above this is what it knows.
    """
    days = min((len(alarms) for alarms, _ in regions), default=0)
    by = np.unique(np.linspace(0, days, shifts + 2).astype(int)[1:-1])
    found = [alarm_score([(np.roll(alarms, n), w) for alarms, w in regions], before=before).recall for n in by]
    return float(np.mean(found)) if found else math.nan
