"""A stochastic metapopulation SEIR, person by person, so that it is known who infected whom.

The model is the daily chain binomial of Keeling & Rohani (2008), *Modeling Infectious Diseases*, sections 6.3 and
7.2: residents of a city spend their contacts at home and in others, by a mobility matrix; on each day each susceptible
resident of city p escapes infection with probability exp(−force), where
    force[p] = β(t) · Σ_q mix[p, q] · Σ_p' mix[p', q] · I[p'] / present[q],    present[q] = Σ_p mix[p, q] · N[p].
An infected person is exposed for a geometric number of days, then infectious for a geometric number of days: the same
chances, day by day, as the compartments of :mod:`atoll.blueprints.epidemic.seir`. R0 = β · (mean infectious days).
Everyone infectious has a gamma-distributed infectiousness of mean 1 (Lloyd-Smith et al. 2005, Nature 438:355): few
people infect many. Infectors are drawn in proportion to the force they exert, across cities and regions too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NEVER = 1 << 30
"""The day of what does not happen."""


@dataclass(frozen=True)
class Region:
    """A region: residents of its cities, and how its office sees the epidemic.

    imports_per_day: infected people who arrive from outside all regions, in the whole region, while imports last.
    ascertainment: share of infected people who are confirmed (of those without symptoms, half that share).
    report_days: mean days from onset to report (Bi et al. 2020, Lancet Infect Dis 20:911: 4.6; of traced contacts 2.7,
    the ratio kept here). negatives: people tested in vain for each case. mean_age: years, of residents.
    """

    name: str
    cities: Mapping[str, float]
    imports_per_day: float = 0.0
    ascertainment: float = 0.6
    report_days: float = 4.6
    negatives: float = 1.0
    mean_age: float = 42.0

    @property
    def population(self) -> float:
        """Residents."""
        return float(sum(self.cities.values()))


@dataclass(frozen=True)
class Scenario:
    """An epidemic to simulate. Days count from ``start``.

    r0, latent_days, infectious_days: Li et al. 2020, Science 368:489 (2.38; 3.69; 3.47). dispersion: k of the
    offspring, whose variance is R0 + R0²/k (0.43: Adam et al. 2020, Nat Med 26:1714); inf, or above what geometric
    durations alone give: equal infectiousness. contact: (from day, factor of the contact rate), in order.
    imports: first and last day of importations. travel: share of contacts made in other cities, ``within`` of it
    in the own region's; or mobility: the rows of a matrix [cities, cities], cities in the order of the regions.
    symptomatic: share (Buitrago-Garcia et al. 2020, PLoS Med 17:e1003346: 80%). traced: chance that a reported
    infector of a reported case is known. An outbreak of more than max_infections is refused.
    """

    regions: tuple[Region, ...]
    start: str = "2020-01-05"
    days: int = 100
    r0: float = 2.38
    latent_days: float = 3.69
    infectious_days: float = 3.47
    dispersion: float = 0.43
    contact: tuple[tuple[int, float], ...] = ((0, 1.0),)
    imports: tuple[int, int] = (0, 1 << 29)
    travel: float = 0.02
    within: float = 0.7
    mobility: tuple[tuple[float, ...], ...] = ()
    symptomatic: float = 0.8
    traced: float = 0.6
    max_infections: int = 2_000_000

    def __post_init__(self) -> None:
        sizes = [n for region in self.regions for n in region.cities.values()]
        if not sizes or min(sizes) < 1:
            raise _bad("regions", "every region needs cities with residents")
        if not (self.days >= 1 and self.latent_days >= 1 and self.infectious_days >= 1 and self.dispersion > 0):
            raise _bad("days", "days and durations are at least 1, dispersion above 0")
        if not self.contact or self.contact[0][0] > 0 or list(self.contact) != sorted(self.contact):
            raise _bad("contact", "contact factors begin with day 0 and are in order")
        mix = self.mix()
        if mix.shape != (len(sizes), len(sizes)) or (mix < 0).any() or not np.allclose(mix.sum(axis=1), 1):
            raise _bad("mobility", "a row of mobility is a city's shares of contacts, with sum 1")

    def populations(self) -> Floats:
        """Residents of each city, [cities]."""
        return np.array([float(n) for region in self.regions for n in region.cities.values()])

    def city_names(self) -> list[str]:
        """Names of all cities, [cities]."""
        return [name for region in self.regions for name in region.cities]

    def region_of(self) -> Ints:
        """The place of each city's region, [cities]."""
        return np.repeat(np.arange(len(self.regions)), [len(region.cities) for region in self.regions])

    def mix(self) -> Floats:
        """Shares of each city's contacts made in each, [cities, cities]."""
        if self.mobility:
            return np.array(self.mobility, float)
        sizes, region = self.populations(), self.region_of()
        mix = np.eye(len(sizes))
        for p in range(len(sizes)):
            near, other = region == region[p], np.arange(len(sizes)) != p
            shares = [(near & other, self.within), (~near, 1 - self.within)]
            for cities, share in shares:
                if cities.any():
                    mix[p, cities] += self.travel * share * sizes[cities] / sizes[cities].sum()
                    mix[p, p] -= self.travel * share
        return mix

    def factors(self) -> Floats:
        """The contact rate's factor on each day, [days]."""
        starts, values = zip(*self.contact, strict=True)
        return np.array(values)[np.searchsorted(starts, np.arange(self.days), side="right") - 1]


@dataclass(frozen=True)
class Outbreak:
    """Everybody who was infected, in the order of infection, [infections] each.

    infector: the place of the person who infected them; −1: came from outside. infected, infectious, recovered,
    onset, reported: days; NEVER if it does not happen. traced: is the infector known to the offices?
    susceptible: [days, cities] at the end of each day. quantile: of a person's latent and incubation time.
    """

    scenario: Scenario
    city: Ints
    infector: Ints
    infected: Ints
    infectious: Ints
    recovered: Ints
    infectiousness: Floats
    quantile: Floats
    susceptible: Floats
    onset: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    reported: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    symptomatic: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    traced: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))

    def __len__(self) -> int:
        return len(self.city)

    def region(self) -> Ints:
        """The place of each person's region."""
        return np.asarray(self.scenario.region_of()[self.city])

    def daily(self, event: str = "reported", by: str = "region") -> Ints:
        """How many people had an event ("infected", "infectious", "onset", "reported") by day and region (or city).

        Returns [days, regions] or [days, cities]; events after the last day are not in it.
        """
        place, count = (self.city, len(self.scenario.populations()))
        if by == "region":
            place, count = self.region(), len(self.scenario.regions)
        day = getattr(self, event)
        seen = (day >= 0) & (day < self.scenario.days)
        cells = np.bincount(day[seen] * count + place[seen], minlength=self.scenario.days * count)
        return cells.reshape(self.scenario.days, count)

    def offspring(self) -> Ints:
        """How many people each infected, [infections]."""
        return np.bincount(self.infector[self.infector >= 0], minlength=len(self))


def simulate(scenario: Scenario, seed: int) -> Outbreak:
    """One epidemic. The same scenario and seed give the same one. Raises PlanError if it gets too large."""
    spread, seen = (np.random.default_rng([seed, part]) for part in (0, 1))
    return _observed(_spread(scenario, spread), seen)


def _spread(scenario: Scenario, rng: np.random.Generator) -> Outbreak:
    sizes, region, mix = scenario.populations(), scenario.region_of(), scenario.mix()
    kernel = mix @ (mix / (sizes @ mix)).T  # [of, by]: the force on a person in one city by one of another
    imports = np.array([r.imports_per_day for r in scenario.regions])[region]
    imports = imports * sizes / np.bincount(region, sizes)[region]
    beta = scenario.r0 / scenario.infectious_days * scenario.factors()
    shape = _gamma_shape(scenario)
    susceptible, history = sizes.copy(), np.empty((scenario.days, len(sizes)))
    people: dict[str, list[NDArray[Any]]] = {name: [] for name in _PEOPLE}
    live = {name: np.empty(0, kind) for name, kind in _PEOPLE.items()}  # those not yet recovered
    total = 0
    for day in range(scenario.days):
        live = {name: column[live["recovered"] > day] for name, column in live.items()}
        active = np.flatnonzero(live["infectious"] <= day)
        active = active[np.argsort(live["city"][active], kind="stable")]
        weight = live["infectiousness"][active]
        force: Floats = np.bincount(live["city"][active], weight, minlength=len(sizes)).astype(float)
        chance = -np.expm1(-beta[day] * (kernel @ force))
        new = rng.binomial(susceptible.astype(np.int64), chance)
        arriving = np.zeros(len(sizes), np.int64)
        if scenario.imports[0] <= day <= scenario.imports[1]:
            arriving = np.minimum(rng.poisson(imports), (susceptible - new).astype(np.int64))
        city = np.repeat(np.arange(len(sizes)), new)
        infector = live["person"][active][_sources(kernel, force, weight, city, rng)] if len(city) else city
        city = np.concatenate([city, np.repeat(np.arange(len(sizes)), arriving)])
        count = len(city)
        if total + count > scenario.max_infections:
            raise PlanError(
                "epidemic.too-large", f"the epidemic has more than {scenario.max_infections} infections",
                field="max_infections", remedy="take a lower r0, fewer days or an earlier change of contact",
            )  # fmt: skip
        quantile = rng.random(count)
        begins = day + _geometric(quantile, scenario.latent_days)
        fresh = {
            "person": np.arange(total, total + count),
            "city": city,
            "infector": np.concatenate([infector, np.full(arriving.sum(), -1)]),
            "infected": np.full(count, day),
            "infectious": begins,
            "recovered": begins + _geometric(rng.random(count), scenario.infectious_days),
            "infectiousness": rng.gamma(shape, 1 / shape, count) if np.isfinite(shape) else np.ones(count),
            "quantile": quantile,
        }
        for name, column in fresh.items():
            people[name].append(column)
            live[name] = np.concatenate([live[name], column])
        total += count
        susceptible -= new + arriving
        history[day] = susceptible
    columns = {name: np.concatenate(parts) for name, parts in people.items() if name != "person"}
    return Outbreak(scenario, susceptible=history, **columns)


_PEOPLE: dict[str, Any] = {
    "person": np.int64, "city": np.int64, "infector": np.int64, "infected": np.int64, "infectious": np.int64,
    "recovered": np.int64, "infectiousness": np.float64, "quantile": np.float64,
}  # fmt: skip


def _sources(kernel: Floats, force: Floats, weight: Floats, city: Ints, rng: np.random.Generator) -> Ints:
    """Who of the infectious people (sorted by city) infected each newly infected one: places among them."""
    ends = np.concatenate([[0.0], np.cumsum(weight)])
    city_ends = np.concatenate([[0.0], np.cumsum(force)])
    drawn = np.empty(len(city))
    for p in np.unique(city):
        here = city == p
        exerted = np.cumsum(kernel[p] * force)
        exerted /= exerted[-1]
        source = np.searchsorted(exerted, rng.random(here.sum()), side="right")
        drawn[here] = city_ends[source] + rng.random(here.sum()) * force[source]
    return np.asarray(np.clip(np.searchsorted(ends, drawn, side="right") - 1, 0, len(weight) - 1))


def _geometric(quantile: Floats, mean: float) -> Ints:
    """Days ≥ 1 of that mean, at their quantiles."""
    if mean <= 1:
        return np.ones(len(quantile), np.int64)
    days = np.maximum(np.ceil(np.log1p(-quantile) / np.log1p(-1 / mean)), 1)
    return np.asarray(days, np.int64)


def _gamma_shape(scenario: Scenario) -> float:
    """The shape of infectiousness that gives offspring of the scenario's dispersion, given geometric durations:
    Var = R0 + R0² · ((1 + 1/shape)(2 − p) − 1) with p = 1/infectious_days."""
    spare = (1 + 1 / scenario.dispersion) / (2 - 1 / scenario.infectious_days) - 1
    return 1 / spare if spare > 0 else np.inf


def _observed(outbreak: Outbreak, rng: np.random.Generator) -> Outbreak:
    """With onset, symptoms, reports and traced links.

    Incubation: lognormal, median 5.1 days (Lauer et al. 2020, Ann Intern Med 172:577: 1.621, 0.418), at the same
    quantile as the latent time: who is infectious late has symptoms late. Delays to report: gamma of shape 2.
    """
    from scipy.special import ndtri  # not needed by commands that only list programs

    scenario, size, region = outbreak.scenario, len(outbreak), outbreak.region()
    share = np.array([r.ascertainment for r in scenario.regions])[region]
    days = np.array([r.report_days for r in scenario.regions])[region]
    onset = outbreak.infected + np.rint(np.exp(1.621 + 0.418 * ndtri(outbreak.quantile))).astype(np.int64)
    symptomatic = rng.random(size) < scenario.symptomatic
    confirmed = rng.random(size) < share * np.where(symptomatic, 1, 0.5)
    known = (outbreak.infector >= 0) & confirmed & confirmed[np.maximum(outbreak.infector, 0)]
    traced = known & (rng.random(size) < scenario.traced)
    delay = rng.gamma(2, days / 2) * np.where(traced, 2.7 / 4.6, 1)
    reported = np.where(confirmed, onset + np.rint(delay).astype(np.int64), NEVER)
    columns = {name: getattr(outbreak, name) for name in _PEOPLE if name != "person"}
    return Outbreak(
        scenario, **columns, susceptible=outbreak.susceptible, onset=onset, reported=reported,
        symptomatic=symptomatic, traced=traced,
    )  # fmt: skip


def _bad(field_name: str, message: str) -> PlanError:
    return PlanError("epidemic.bad-scenario", message, field=field_name, remedy="correct the scenario")
