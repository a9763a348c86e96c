"""A stochastic metapopulation SEIR that goes on from fitted states: the twin on which interventions are tried.

The chain binomial of :mod:`atoll.blueprints.epidemic.outbreak`, counted by region instead of by person. On each day
    force ~ Gamma(shape k · I / infectious_days, mean I),    infected ~ Poisson(S · (1 − exp(−β · mixed force))),
so that offspring over an infectious time are negative binomial with dispersion k (Lloyd-Smith et al. 2005, Nature
438:355), and those who leave E and I are binomial. Every draw is the inverse of a distribution at a uniform number that
depends on the seed, the day, the replicate and the region only: with and without an intervention the same numbers are
used (common random numbers), and what differs is the intervention's effect, not luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from atoll.blueprints.epidemic.seir import SeirFit, State
from atoll.contract.errors import PlanError

Floats = NDArray[np.float64]
DISPERSION = 0.43
"""k of COVID-19's offspring: Adam et al. 2020, Nature Medicine 26:1714."""
_LARGE = 1000.0
"""Variance from which on quantiles are taken from a normal series, which is faster than to search for them."""


class Measure(BaseModel):
    """An intervention, from day *start* of the projection (0: the first) to before *end* (None: on).

    contact: factor of the contact rate (closing). infectious: factor of the infectious time (testing and isolation).
    mobility: factor of contacts made across regions' borders. regions: where; none: everywhere. Factors are in [0, 1]:
    an intervention does not make things worse.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=80)
    contact: float = Field(default=1.0, ge=0, le=1)
    infectious: float = Field(default=1.0, ge=0, le=1)
    mobility: float = Field(default=1.0, ge=0, le=1)
    start: int = Field(default=0, ge=0)
    end: int | None = Field(default=None, ge=0)
    regions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Twin:
    """Regions as they stand at the end of a day. reproduction, and the people of state: by draw, [draws, regions].

    reproduction: R of each region's residents. mix: shares of each region's contacts made in each,
    [regions, regions]. reporting: share of infected people who become cases, [regions].
    """

    regions: tuple[str, ...]
    populations: Floats
    reproduction: Floats
    state: State
    mix: Floats
    reporting: Floats
    latent_days: float
    infectious_days: float
    dispersion: float = DISPERSION

    def __post_init__(self) -> None:
        count = len(self.regions)
        fits = self.mix.shape == (count, count) and self.populations.shape == (count,) and (self.mix >= 0).all()
        if not (count and fits and np.allclose(self.mix.sum(axis=1), 1) and (self.populations > 0).all()):
            raise PlanError(
                "epidemic.bad-twin", "every region of a twin has residents and a row of shares of contacts, of sum 1",
                field="mobility", remedy="correct the populations or the mobility",
            )  # fmt: skip

    @staticmethod
    def of(fits: Mapping[str, SeirFit], mix: Floats | None = None, dispersion: float = DISPERSION) -> Twin:
        """The twin of regions fitted one by one (with equal durations). mix: default :func:`gravity`."""
        each = list(fits.values())
        if not each or len({(f.latent_days, f.infectious_days) for f in each}) > 1:
            raise PlanError(
                "epidemic.bad-twin", "the regions of a twin are fitted with the same durations", field="latent_days",
                remedy="fit them with one latent_days and one infectious_days",
            )  # fmt: skip
        draws = min(len(f.draws) for f in each)
        populations = np.array([f.population for f in each])

        def beside(parts: Sequence[Floats]) -> Floats:
            return np.stack([part[:draws] for part in parts], axis=1)

        state = State(
            beside([f.state.susceptible for f in each]), beside([f.state.exposed for f in each]),
            beside([f.state.infectious for f in each]),
        )  # fmt: skip
        return Twin(
            tuple(fits), populations, beside([f.draws for f in each]), state,
            gravity(populations) if mix is None else mix, np.array([f.reporting for f in each]),
            each[0].latent_days, each[0].infectious_days, dispersion,
        )  # fmt: skip

    @staticmethod
    def split(
        fitted: SeirFit,
        populations: Mapping[str, float],
        shares: Sequence[float] = (),
        mix: Floats | None = None,
        dispersion: float = DISPERSION,
    ) -> Twin:
        """The twin of regions of which only the sum was fitted: one R, and infected people by *shares* (default: by
        residents). What is not known of single regions is not made up: they differ by their shares only."""
        sizes = np.array(list(populations.values()), float)
        part = np.array(shares, float) if len(shares) else sizes
        if part.shape != sizes.shape or not (part >= 0).all() or not part.sum() > 0:
            raise PlanError(
                "epidemic.bad-twin", "shares are as many as regions, and positive", field="shares",
                remedy="give one share for each region, or none",
            )  # fmt: skip
        part = part / part.sum()
        exposed, infectious = (s[:, None] * part for s in (fitted.state.exposed, fitted.state.infectious))
        gone = (fitted.population - fitted.state.susceptible)[:, None] * part
        return Twin(
            tuple(populations), sizes, np.repeat(fitted.draws[:, None], len(sizes), axis=1),
            State(np.maximum(sizes - gone, 0), exposed, infectious),
            gravity(sizes) if mix is None else mix, np.full(len(sizes), fitted.reporting),
            fitted.latent_days, fitted.infectious_days, dispersion,
        )  # fmt: skip

    def run(self, days: int, draws: int = 200, seed: int = 0, measures: Sequence[Measure] = ()) -> Floats:
        """New cases of the coming days, [draws, days, regions], while *measures* are in force.

        Replicate n goes on from draw n (modulo their number) of the fitted states, rounded at random.
        """
        start = np.arange(draws) % len(self.reproduction)
        rates = self.reproduction[start] / self.infectious_days
        s, e, i = self._rounded(start, np.random.default_rng([seed, 6]))
        cases = np.empty((draws, days, len(self.regions)))
        for day in range(days):
            uniform = np.random.default_rng([seed, 7, day]).random((4, *s.shape))
            contact, duration, mix = self._in_force(day, measures)
            onset = _binomial(uniform[0], e, 1 / self.latent_days)
            i = i - _binomial(uniform[1], i, np.minimum(1 / (self.infectious_days * duration), 1)) + onset
            force = _gamma(uniform[2], i, self.dispersion / self.infectious_days)
            met = (force @ mix / (self.populations @ mix)) @ mix.T  # by a resident, wherever contacts are made
            infected = np.minimum(_poisson(uniform[3], -s * np.expm1(-rates * contact * met)), s)
            s, e = s - infected, e - onset + infected
            cases[:, day] = onset * self.reporting
        return cases

    def _in_force(self, day: int, measures: Sequence[Measure]) -> tuple[Floats, Floats, Floats]:
        """(factors of contact [regions], of the infectious time [regions], mix) on a day."""
        contact, duration, travel = np.ones((3, len(self.regions)))
        for measure in measures:
            if measure.start <= day and (measure.end is None or day < measure.end):
                where = np.array([not measure.regions or name in measure.regions for name in self.regions])
                contact[where] *= measure.contact
                duration[where] *= measure.infectious
                travel[where] *= measure.mobility
        away = self.mix * np.minimum(travel[:, None], travel[None, :])  # a closed region is neither left nor entered
        np.fill_diagonal(away, 0)
        return contact, np.maximum(duration, 1e-9), away + np.diag(1 - away.sum(axis=1))

    def _rounded(self, start: NDArray[np.int64], rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
        parts = (self.state.susceptible, self.state.exposed, self.state.infectious)
        s, e, i = (np.floor(part[start] + rng.random(part[start].shape)) for part in parts)
        return s, e, i


def gravity(populations: Floats, travel: float = 0.02) -> Floats:
    """Shares of contacts: *travel* of them in other regions, in proportion to their residents, [regions, regions]."""
    count = len(populations)
    mix = np.eye(count)
    for p in range(count):
        other = np.arange(count) != p
        if other.any():
            mix[p, other] = travel * populations[other] / populations[other].sum()
            mix[p, p] = 1 - travel
    return mix


def _gamma(uniform: Floats, number: Floats, shape_each: float) -> Floats:
    """The sum of infectiousness of mean 1 of *number* people, at its quantile."""
    from scipy.special import gammaincinv  # not needed by commands that only list programs

    if not np.isfinite(shape_each):
        return number
    shape = np.maximum(number * shape_each, 1e-12)
    return np.asarray(np.where(number > 0, gammaincinv(shape, uniform) / shape_each, 0))


def _poisson(uniform: Floats, mean: Floats) -> Floats:
    """The least k with P(X ≤ k) ≥ uniform; where the mean is large, to within 1."""
    from scipy.special import pdtrik

    large = mean > _LARGE
    exact = np.ceil(np.nan_to_num(pdtrik(uniform, np.where(large | (mean <= 0), 1.0, mean))) - 1e-9)
    found = np.where(large, _normal(uniform, mean, mean, 1.0), exact)
    return np.asarray(np.where(mean > 0, np.maximum(found, 0), 0))


def _binomial(uniform: Floats, number: Floats, chance: float | Floats) -> Floats:
    """The least k with P(X ≤ k) ≥ uniform, of *number* people with that chance each; of very many, to within 1."""
    from scipy.special import bdtr, bdtrik

    chance = np.broadcast_to(np.asarray(chance, float), number.shape)
    spread = number * chance * (1 - chance)
    small = (number > 0) & (chance < 1) & (spread <= _LARGE)
    size, odds = np.where(small, number, 1.0), np.where(small, chance, 0.5)
    found = np.clip(np.ceil(np.nan_to_num(bdtrik(uniform, size, odds)) - 1e-9), 0, size)
    less = np.maximum(found - 1, 0)
    found = np.where((found > 0) & (bdtr(less, size.astype(np.int64), odds) >= uniform), less, found)
    many = np.clip(_normal(uniform, number * chance, spread, 1 - 2 * chance), 0, number)
    return np.asarray(np.where(small, found, np.where(chance >= 1, number, np.where(number > 0, many, 0))))


def _normal(uniform: Floats, mean: Floats, variance: Floats, skew: float | Floats) -> Floats:
    """A count's quantile by Cornish and Fisher 1938, with the first term of skewness. skew: third moment / variance."""
    from scipy.special import ndtri

    z = ndtri(uniform)
    return np.asarray(np.rint(mean + np.sqrt(np.maximum(variance, 0)) * z + skew * (z**2 - 1) / 6))
