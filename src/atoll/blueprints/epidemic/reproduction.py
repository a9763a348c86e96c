"""The reproduction number R_t of Cori et al. 2013, American Journal of Epidemiology 178:1505 (EpiEstim).

Incidence on day t is Poisson with mean R_t · Λ_t, where Λ_t = Σ_s w_s · I_(t−s) and w is the serial interval's
distribution. With a gamma prior, R over the window of days that ends with t is gamma distributed:
    shape = a + Σ I,    rate = 1/b + Σ Λ    (web appendix 1),    a = (mean/sd)², b = sd²/mean of the prior.
Reporting that does not change within a serial interval cancels out; delays only shift the days.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atoll.contract.errors import PlanError

Floats = NDArray[np.float64]

SERIAL_MEAN_DAYS, SERIAL_SD_DAYS = 4.7, 2.9
"""COVID-19: Nishiura et al. 2020, International Journal of Infectious Diseases 93:284."""


@dataclass(frozen=True)
class Reproduction:
    """R for windows that end on each day, [days]; NaN where no window ends, or nobody was there to infect.

    low, high: ends of the equal-tailed interval of ``level``. cases: in each window.
    """

    mean: Floats
    low: Floats
    high: Floats
    sd: Floats
    cases: Floats
    level: float


def serial_interval(mean_days: float = SERIAL_MEAN_DAYS, sd_days: float = SERIAL_SD_DAYS, days: int = 40) -> Floats:
    """Chances of a serial interval of 0 … days − 1 days, [days]; of 0 days it is 0.

    A gamma distribution of that mean and standard deviation, shifted by one day, of which both ends are only known
    by day (Cori et al. 2013, web appendix 11). Raises PlanError unless mean > 1 and sd > 0.
    """
    if not (mean_days > 1 and sd_days > 0):
        raise PlanError(
            "epidemic.bad-interval", "a serial interval has a mean above 1 day and a standard deviation above 0",
            field="serial_interval", remedy="give its mean and standard deviation in days",
        )  # fmt: skip
    from scipy.special import gammainc  # not needed by commands that only list programs

    shape, scale = ((mean_days - 1) / sd_days) ** 2, sd_days**2 / (mean_days - 1)
    k = np.arange(days, dtype=float)

    def cdf(x: Floats, more: float = 0.0) -> Floats:
        return np.asarray(gammainc(shape + more, np.maximum(x, 0) / scale))

    chances = k * cdf(k) + (k - 2) * cdf(k - 2) - 2 * (k - 1) * cdf(k - 1)
    chances += shape * scale * (2 * cdf(k - 1, 1) - cdf(k - 2, 1) - cdf(k, 1))
    return np.asarray(np.maximum(chances, 0))


def reproduction_number(
    cases: ArrayLike,
    window: int = 7,
    interval: Floats | None = None,
    imported: ArrayLike | None = None,
    prior: tuple[float, float] = (5.0, 5.0),
    level: float = 0.95,
    least_cases: int = 0,
) -> Reproduction:
    """R_t of a series of new cases by day, [days].

    window: days over which R is taken to be constant. interval: chances by day (default: :func:`serial_interval`).
    imported: of the cases, those infected elsewhere, [days]: they infect, but nobody here infected them (Thompson et
    al. 2019, Epidemics 29:100356); those of the first day always count as such. prior: mean and standard deviation.
    least_cases: windows with fewer have no R (Cori et al. advise 11 for a coefficient of variation of 0.3).
    Counts that are missing or negative are left out of both sums: what they would have infected is missing with them.
    Raises PlanError for a window below 1 or a level outside (0, 1).
    """
    if window < 1 or not 0 < level < 1 or min(prior) <= 0:
        raise PlanError(
            "epidemic.bad-window", "a window has at least 1 day, a level is between 0 and 1, and a prior is positive",
            field="window", remedy="correct the settings",
        )  # fmt: skip
    from scipy.special import gammaincinv

    known, local = _counts(cases), _counts(cases)
    size = len(known)
    seen = np.isfinite(known)
    known = np.where(seen, known, 0)
    elsewhere = np.zeros(size) if imported is None else np.nan_to_num(_counts(imported))
    local = np.maximum(known - elsewhere, 0)
    weights = (serial_interval() if interval is None else np.asarray(interval, float))[:size]
    pressure = np.convolve(known, weights)[:size] if size else known
    counted = seen.copy()
    counted[:1] = False
    sums = [_rolled(np.where(counted, values, 0), window) for values in (local, pressure)]
    mean, sd = prior
    shape = (mean / sd) ** 2 + sums[0]
    rate = mean / sd**2 + sums[1]
    told = (np.arange(size) >= window) & (sums[1] > 0) & (sums[0] >= least_cases)
    tail = (1 - level) / 2

    def where_told(values: Any) -> Floats:
        return np.where(told, values, np.nan)

    return Reproduction(
        mean=where_told(shape / rate), sd=where_told(np.sqrt(shape) / rate), cases=sums[0], level=level,
        low=where_told(gammaincinv(shape, tail) / rate), high=where_told(gammaincinv(shape, 1 - tail) / rate),
    )  # fmt: skip


def _counts(cases: ArrayLike) -> Floats:
    """As numbers; what cannot be a count is NaN."""
    values = np.array(cases, float).reshape(-1)
    return np.where(np.isfinite(values) & (values >= 0), values, np.nan)


def _rolled(values: Floats, window: int) -> Floats:
    """Sums over the *window* days that end with each."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    return np.asarray(total[end] - total[np.maximum(end - window, 0)])
