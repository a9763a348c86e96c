"""A deterministic SEIR fitted to new cases by day, and its projection with intervals.

By days, as the chain binomial of :mod:`atoll.blueprints.epidemic.outbreak` in the mean (Keeling & Rohani 2008,
*Modeling Infectious Diseases*, section 2.5): on day t
    onset = E / latent_days,   I = I · (1 − 1/infectious_days) + onset,   infected = S · (1 − exp(−β(t) · I / N)),
and the cases expected are reporting · onset. R = β · infectious_days is one number before a day of change and another
after it, or one throughout (modified Bayesian information criterion: Zhang & Siegmund 2007, Biometrics 63:22).
Durations are fixed: from one series they cannot be told from R (Li et al. 2020, Science 368:489 for COVID-19). Reports
come days after onsets; the states are as late as they.

Least squares on 2 √(cases + 3/8), which have a variance near 1 where cases are Poisson (Anscombe 1948, Biometrika
35:246), by Levenberg and Marquardt, for all days of change, and then all bootstrap replicates, at once; log R and its
change have normal priors, so that a handful of arrivals is not taken for an explosion. The bootstrap is parametric: a
replicate begins with a day of change that agrees with the series (by exp(−criterion/2)), draws negative-binomial counts
around its fit with variance dispersion · mean (the mean squared Pearson residual), moves the prior's centre at random
as the prior says (randomise then optimise: Bardsley et al. 2014, SIAM J. Sci. Comput. 36:A1895), and is fitted again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atoll.contract.errors import PlanError

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

LATENT_DAYS, INFECTIOUS_DAYS = 3.69, 3.47
"""COVID-19: Li et al. 2020, Science 368:489."""
LEAST_DAYS, LEAST_CASES = 8, 20
"""Fewer tell nothing of three numbers."""
_R_BOUNDS = (0.02, 15.0)
_WIDEST = 10.0
"""An interval of R whose ends differ by more than this factor says nothing."""


@dataclass(frozen=True)
class NotIdentifiable:
    """Why a series does not say what R is."""

    reason: str


@dataclass(frozen=True)
class State:
    """Where an epidemic stands at the end of a day, [draws] (or scalars): people susceptible, exposed, infectious."""

    susceptible: Floats
    exposed: Floats
    infectious: Floats


@dataclass(frozen=True)
class SeirFit:
    """What was fitted to a window of a series.

    reproduction: R now; low, high: its interval of 95%. before: R before the change; change: the day of the window
    from which on R is another, None for none. dispersion: variance of counts, in means. expected: [days].
    draws: R now, [draws], and state: after the last day, of the same draws (of each bootstrap replicate).
    best: the state after the last day of the fit itself.
    """

    population: float
    latent_days: float
    infectious_days: float
    reporting: float
    reproduction: float
    low: float
    high: float
    before: float
    change: int | None
    dispersion: float
    expected: Floats
    draws: Floats
    state: State
    best: State


@dataclass(frozen=True)
class Projection:
    """New cases of coming days, [days]: what is expected (the median replicate's), and the ends of the interval of
    ``level``; draws: [draws, days]."""

    mean: Floats
    low: Floats
    high: Floats
    draws: Floats
    level: float

    def within(self, days: int) -> tuple[float, float, float]:
        """(mean, low, high) of the cases of the first *days* days together."""
        tail = (1 - self.level) / 2
        low, high = np.quantile(self.draws[:, :days].sum(axis=1), [tail, 1 - tail])
        return float(self.mean[:days].sum()), float(low), float(high)


def fit(
    cases: ArrayLike,
    population: float,
    *,
    window: int = 42,
    change: bool = True,
    latent_days: float = LATENT_DAYS,
    infectious_days: float = INFECTIOUS_DAYS,
    reporting: float = 1.0,
    prior_sd: float = 0.7,
    draws: int = 200,
    seed: int = 0,
) -> SeirFit | NotIdentifiable:
    """Fit the last *window* days of new cases by day, [days]; 0: all.

    Counts that are missing or negative (corrections) are left out of the fit. reporting: share of infected people who
    become cases; only how fast people run out depends on it. change: may R change once? prior_sd: of log R around 0,
    and of its change (0.7: R from 0.25 to 4, or by a factor of 4, in 95%). draws: bootstrap replicates.
    Returns :class:`NotIdentifiable` where the series is too short or has too few cases, the population is missing or
    zero, or R's interval is too wide to say anything. Raises PlanError for impossible settings.
    """
    durations = latent_days >= 1 and infectious_days >= 1
    if not (durations and 0 < reporting <= 1 and draws >= 20 and window >= 0 and prior_sd > 0):
        raise PlanError(
            "epidemic.bad-seir", "durations are at least 1 day, reporting in (0, 1], draws at least 20",
            field="seir", remedy="correct the settings",
        )  # fmt: skip
    series = np.array(cases, float).reshape(-1)[-window if window else None :]
    seen = np.isfinite(series) & (series >= 0)
    series = np.where(seen, series, 0)
    trouble = _trouble(series, seen, population, reporting)
    if trouble:
        return NotIdentifiable(trouble)
    rng = np.random.default_rng([seed, 4])
    model = _Model(float(population), latent_days, infectious_days, reporting, len(series), seen, 1 / prior_sd)
    thetas, changes, criterion = _candidates(model, series, change)
    first = int(np.argmin(criterion))
    spread = _dispersion(series, model.run(thetas[[first]], changes[[first]])[0][0], seen)
    model = replace(model, pull=np.sqrt(spread) / prior_sd)  # as if counts had the variance of 1 that they lack
    every = np.broadcast_to(series, (len(thetas), len(series)))
    thetas, _ = _levenberg(model, every, thetas, changes, np.zeros((len(thetas), 2)), rounds=15)
    expected, ends = model.run(thetas, changes)
    dispersion = _dispersion(series, expected[first], seen)
    likely = np.exp((criterion.min() - criterion) / 2)
    drawn = rng.choice(len(thetas), draws, p=likely / likely.sum())
    replicates = _noisy(expected[drawn], dispersion, rng)
    aims = prior_sd * rng.normal(size=(draws, 2))
    refitted, _ = _levenberg(model, replicates, thetas[drawn], changes[drawn], aims, rounds=12)
    _, states = model.run(refitted, changes[drawn])
    now = np.exp(refitted[:, 1])
    low, high = (float(q) for q in np.quantile(now, [0.025, 0.975]))
    if high / low > _WIDEST:
        return NotIdentifiable("the cases agree with almost any reproduction number")
    before, after = np.exp(thetas[first, :2]).tolist()
    low, high = min(low, after), max(high, after)
    when = int(changes[first]) or None
    return SeirFit(
        population=model.population, latent_days=latent_days, infectious_days=infectious_days, reporting=reporting,
        reproduction=after, low=low, high=high, before=before if when else after, change=when, dispersion=dispersion,
        expected=expected[first], draws=now, state=states,
        best=State(ends.susceptible[[first]], ends.exposed[[first]], ends.infectious[[first]]),
    )  # fmt: skip


def project(
    fitted: SeirFit,
    days: int,
    *,
    level: float = 0.95,
    factor: float = 1.0,
    damping: float = 1.0,
    drift: float = 0.0,
    seed: int = 0,
) -> Projection:
    """New cases of the coming *days* if R stays as it is, times *factor*.

    Each bootstrap replicate goes on from its own state with its own R, and counts vary around it as they did. damping:
    what is left of log R after each day, for a future that responds (1: all; as a damped trend: Gardner & McKenzie
    1985, Management Science 31:1237). drift: standard deviation of a day's change of log R (a random walk).
    """
    rng = np.random.default_rng([seed, 5])
    walk = drift * rng.normal(size=(len(fitted.draws), days)).cumsum(axis=1)
    left = damping ** np.arange(1, days + 1)
    rates = np.exp(np.log(fitted.draws)[:, None] * left + walk) * factor / fitted.infectious_days
    ahead, _ = _forward(fitted, fitted.state, rates)
    noisy = _noisy(ahead, fitted.dispersion, rng)
    tail = (1 - level) / 2
    if not days:
        return Projection(np.empty(0), np.empty(0), np.empty(0), noisy, level)
    low, high = np.quantile(noisy, [tail, 1 - tail], axis=0)
    return Projection(np.median(ahead, axis=0), low, high, noisy, level)


def _trouble(series: Floats, seen: NDArray[np.bool_], population: float, reporting: float) -> str:
    if not (np.isfinite(population) and population >= 1):
        return "the population is missing or zero"
    if seen.sum() < LEAST_DAYS:
        return f"fewer than {LEAST_DAYS} days are known"
    if not series.any():
        return "there are no cases"
    if series.sum() < LEAST_CASES or (series > 0).sum() < 4:
        return f"there are fewer than {LEAST_CASES} cases, or on too few days"
    if series.sum() / reporting >= population:
        return "there are more cases than people"
    return ""


@dataclass(frozen=True)
class _Model:
    """The SEIR over a window: parameters are log R before, log R after the change, log of cases at the start."""

    population: float
    latent_days: float
    infectious_days: float
    reporting: float
    days: int
    seen: NDArray[np.bool_]
    pull: float

    def run(self, theta: Floats, change: Places) -> tuple[Floats, State]:
        """(cases expected [draws, days], the states after) for parameters [draws, 3] and days of change [draws].

        The first day stands in exponential growth (or decay): E and I in the ratio of the linear model's dominant
        solution E(t), I(t) ~ g^t, where (g − 1 + p)(g − 1 + q) = β p g.
        """
        before, after = np.exp(theta[:, 0]), np.exp(theta[:, 1])
        rates = np.where(np.arange(self.days) < change[:, None], before[:, None], after[:, None]) / self.infectious_days
        p, q = 1 / self.latent_days, 1 / self.infectious_days
        half = (2 - p - q + rates[:, 0] * p) / 2
        g = half + np.sqrt(half**2 - (1 - p) * (1 - q))
        exposed = np.minimum(np.exp(theta[:, 2]) / self.reporting / p, 0.5 * self.population)
        infectious = p * exposed / (g - 1 + q)  # of the day before
        infectious = np.minimum(infectious, 0.4 * self.population)
        start = State(self.population - exposed - infectious, exposed, infectious)
        return _forward(self, start, rates)

    def residuals(self, theta: Floats, change: Places, target: Floats, aims: Floats) -> Floats:
        """[draws, days + 2]: 0 where nothing is known, then of the prior. target: √(cases + 3/8); aims: [draws, 2]."""
        expected, _ = self.run(theta, change)
        data = np.where(self.seen, 2 * (np.sqrt(expected + 0.375) - target), 0)
        prior = np.stack([theta[:, 1], theta[:, 1] - theta[:, 0]], axis=1) - aims
        return np.concatenate([data, self.pull * prior], axis=1)


def _forward(of: _Model | SeirFit, start: State, rates: Floats) -> tuple[Floats, State]:
    """(cases expected [draws, days], the states after), with contact rates [draws, days]."""
    p, q, size = 1 / of.latent_days, 1 / of.infectious_days, of.population
    s, e, i = start.susceptible, start.exposed, start.infectious
    cases = np.empty(rates.shape)
    for t in range(rates.shape[1]):
        onset = p * e
        i = i * (1 - q) + onset
        new = -s * np.expm1(-rates[:, t] * i / size)
        s, e = s - new, e - onset + new
        cases[:, t] = onset
    return of.reporting * cases, State(s, e, i)


def _candidates(model: _Model, series: Floats, change: bool) -> tuple[Floats, Places, Floats]:
    """(parameters, days of change (0: none), criteria) of the fits for each day of change, [fits]."""
    days = model.days
    may = np.array([0, *(range(5, days - 4, max(1, (days - 9) // 24)) if change and days >= 14 else ())])
    start = np.log(max(float(series[:5].mean()), 0.2))
    starts = np.array([[np.log(r), np.log(r), start] for r in (0.7, 2.0)])
    theta, changes = np.repeat(starts, len(may), axis=0), np.tile(may, len(starts))
    every = np.broadcast_to(series, (len(theta), days))
    theta, error = _levenberg(model, every, theta, changes, np.zeros((len(theta), 2)), rounds=40)
    better = np.argmin(error.reshape(len(starts), -1), axis=0) * len(may) + np.arange(len(may))
    known = int(model.seen.sum())
    free = np.where(may > 0, 5, 2)  # a day of change costs as three parameters do
    return theta[better], may, known * np.log(np.maximum(error[better], 1e-9) / known) + free * np.log(known)


def _dispersion(series: Floats, expected: Floats, seen: NDArray[np.bool_]) -> float:
    """The mean squared Pearson residual, at least 1."""
    pearson = ((series - expected) ** 2 / np.maximum(expected, 0.1))[seen]
    return max(1.0, float(pearson.sum() / max(seen.sum() - 3, 1)))


def _levenberg(
    model: _Model, cases: Floats, theta: Floats, change: Places, aims: Floats, rounds: int
) -> tuple[Floats, Floats]:
    """(parameters [fits, 3], sums of squares [fits]) of many fits at once: cases [fits, days], a start and a day each.

    Levenberg 1944, Marquardt 1963: (JᵀJ + λ diag JᵀJ) step = −Jᵀr; λ falls after a step that helped, else rises.
    """
    low = np.array([np.log(_R_BOUNDS[0])] * 2 + [np.log(1e-3)])
    high = np.array([np.log(_R_BOUNDS[1])] * 2 + [np.log(max(model.population * 0.05, 2e-3))])
    target = np.sqrt(cases + 0.375)
    count, width = theta.shape
    damping = np.full(count, 1e-2)
    theta = np.clip(theta, low, high)
    residual = model.residuals(theta, change, target, aims)
    error = (residual**2).sum(axis=1)
    step_size = 1e-5
    for _ in range(rounds):
        moved = (theta[None] + step_size * np.eye(width)[:, None]).reshape(-1, width)
        turned = model.residuals(moved, np.tile(change, width), np.tile(target, (width, 1)), np.tile(aims, (width, 1)))
        slope = (turned.reshape(width, count, -1) - residual) / step_size  # [parameters, fits, days]
        square = np.einsum("aft,bft->fab", slope, slope)
        diagonal = np.einsum("faa->fa", square)
        damped = square + np.eye(width) * (damping[:, None] * diagonal + 1e-9)[:, None]
        step = np.linalg.solve(damped, -np.einsum("aft,ft->fa", slope, residual)[..., None])[..., 0]
        tried = np.clip(theta + np.clip(step, -1, 1), low, high)
        found = model.residuals(tried, change, target, aims)
        new = (found**2).sum(axis=1)
        better = new < error
        gain = np.where(better, error - new, 0)
        theta = np.where(better[:, None], tried, theta)
        residual = np.where(better[:, None], found, residual)
        settled = (gain <= 1e-7 * error) & (better | (damping > 1e4))
        error = np.where(better, new, error)
        damping = np.clip(np.where(better, damping / 4, damping * 5), 1e-9, 1e9)
        if settled.all():
            break
    return theta, error


def _noisy(mean: Floats, dispersion: float, rng: np.random.Generator) -> Floats:
    """Counts with these means and variance dispersion · mean: Poisson, or negative-binomial."""
    if dispersion > 1.001:
        mean = rng.gamma(np.maximum(mean, 1e-12) / (dispersion - 1), dispersion - 1)
    return rng.poisson(np.minimum(mean, 1e15)).astype(float)
