"""R_t equals EpiEstim's published figures, its closed form, and covers the R of simulated epidemics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from atoll.blueprints.epidemic.outbreak import Region, Scenario, simulate
from atoll.blueprints.epidemic.reproduction import reproduction_number, serial_interval
from atoll.contract.errors import PlanError

# Cauchemez et al. 2011, PNAS 108:2825: influenza in a school in Pennsylvania, 2009; EpiEstim's data set Flu2009.
FLU = [1, 1, 0, 2, 5, 3, 3, 3, 6, 2, 5, 9, 13, 12, 13, 11, 12, 6, 6, 6, 3, 1, 0, 2, 0, 0, 0, 0, 2, 0, 2, 0]
# EpiEstim 2.4's vignette "demo": t_end, Mean(R), Std(R), Quantile.0.025(R), Quantile.0.975(R) by parametric_si
PUBLISHED = [
    (8, 1.735798, 0.4091314, 1.0287437, 2.624781),
    (9, 1.749168, 0.3647267, 1.1088223, 2.533119),
    (10, 1.537058, 0.3074116, 0.9947030, 2.195540),
    (11, 1.431839, 0.2705921, 0.9514466, 2.008849),
    (12, 1.422725, 0.2515046, 0.9731426, 1.956336),
    (13, 1.635373, 0.2523436, 1.1786332, 2.165745),
]
DISCRETE = [
    0, 2.331721e-01, 3.585794e-01, 1.981108e-01, 1.033427e-01, 5.290518e-02, 2.682146e-02, 1.351620e-02, 6.783438e-03,
    3.394351e-03, 1.694674e-03, 8.445945e-04, 4.203313e-04, 2.089422e-04, 1.037609e-04, 5.148480e-05, 2.552773e-05,
]  # fmt: skip


def test_serial_interval_is_the_one_published() -> None:
    assert serial_interval(2.6, 1.5, len(DISCRETE)) == pytest.approx(DISCRETE, rel=2e-6)


def test_flu_2009_as_published() -> None:
    found = reproduction_number(FLU, interval=serial_interval(2.6, 1.5))
    for day, mean, sd, low, high in PUBLISHED:
        at = day - 1
        assert (found.mean[at], found.sd[at]) == pytest.approx((mean, sd), rel=1e-6)
        assert (found.low[at], found.high[at]) == pytest.approx((low, high), rel=1e-6)
    assert np.isnan(found.mean[:7]).all()
    assert np.isfinite(found.mean[7:]).all()


def test_the_default_interval_is_nishiuras() -> None:
    chances = serial_interval()
    days = np.arange(len(chances))
    assert chances.sum() == pytest.approx(1, abs=1e-4)
    assert chances[0] == 0
    mean = (days * chances).sum()
    assert mean == pytest.approx(4.7, abs=0.01)
    assert ((days - mean) ** 2 * chances).sum() == pytest.approx(2.9**2 + 1 / 6, rel=0.02)  # days blur it


def test_closed_form() -> None:
    rng = np.random.default_rng(0)
    cases = rng.poisson(20, 30)
    interval = serial_interval(days=20)
    found = reproduction_number(cases, window=5, interval=interval, prior=(2.0, 1.0))
    t = 17
    pressure = [sum(interval[s] * cases[u - s] for s in range(1, min(u, 19) + 1)) for u in range(t - 4, t + 1)]
    assert found.mean[t] == pytest.approx((4 + cases[t - 4 : t + 1].sum()) / (2 + sum(pressure)))


def renewal(r: np.ndarray, rng: np.random.Generator, start: int = 20) -> np.ndarray:
    """Incidence by the renewal equation with Poisson counts."""
    interval = serial_interval()
    cases = np.zeros(len(r))
    cases[:5] = rng.poisson(start, 5)
    for t in range(5, len(r)):
        lags = np.arange(1, min(t, len(interval) - 1) + 1)
        cases[t] = rng.poisson(r[t] * (interval[lags] * cases[t - lags]).sum())
    return cases


def test_intervals_cover_a_known_r() -> None:
    rng = np.random.default_rng(1)
    for r in (0.8, 1.3, 2.0):
        inside, windows = 0, 0
        for _ in range(60):
            found = reproduction_number(renewal(np.full(40, r), rng))
            at = np.array([18, 25, 32, 39])  # windows that do not overlap
            told = at[np.isfinite(found.mean[at])]
            inside += ((found.low[told] <= r) & (r <= found.high[told])).sum()
            windows += len(told)
        assert windows > 150
        assert 0.91 < inside / windows < 0.985, r


def test_it_follows_a_change() -> None:
    r = np.where(np.arange(60) < 30, 2.2, 0.6)
    found = reproduction_number(renewal(r, np.random.default_rng(2)))
    assert found.mean[29] == pytest.approx(2.2, rel=0.1)
    assert found.mean[45] == pytest.approx(0.6, rel=0.1)
    assert found.high[45] < 1 < found.low[29]


def test_on_the_outbreak_growth_and_decline_show() -> None:
    scenario = Scenario((Region("one", {"a": 5e7}, imports_per_day=12),), days=75, imports=(0, 20),
                        contact=((0, 1.0), (45, 0.25)))  # fmt: skip
    made = simulate(scenario, 4)
    infected = made.daily("infected")[:, 0]
    brought = np.bincount(made.infected[made.infector < 0], minlength=75)
    days = np.arange(40)  # a generation is a latent time and a day on which one was still infectious
    latent = np.where(days > 0, (1 - 1 / 3.69) ** (days - 1) / 3.69, 0)
    interval = np.convolve(latent, (1 - 1 / 3.47) ** days)[:40]
    found = reproduction_number(infected, interval=interval / interval.sum(), imported=brought)
    assert found.mean[40] == pytest.approx(2.38, rel=0.08)
    assert found.mean[60] == pytest.approx(2.38 / 4, rel=0.12)
    late = dataclasses.replace(scenario, contact=((0, 1.0),), days=45)
    assert reproduction_number(simulate(late, 4).daily()[:, 0]).low[44] > 1


def test_imported_cases_infect_but_were_not_infected_here() -> None:
    cases = np.full(40, 10.0)
    none = reproduction_number(cases, imported=cases)
    assert none.mean[30] == pytest.approx(1 / (1 / 5 + 70 * serial_interval()[:31].sum()), rel=0.01)
    assert reproduction_number(cases).mean[30] == pytest.approx(1, rel=0.02)


def test_bad_input() -> None:
    nothing = reproduction_number(np.zeros(30))
    assert np.isnan(nothing.mean).all()
    assert np.isnan(reproduction_number([3, 4, 5]).mean).all()
    assert len(reproduction_number([]).mean) == 0
    cases = renewal(np.full(40, 1.2), np.random.default_rng(5), 200)
    gap = cases.copy()
    gap[[20, 27]] = [np.nan, -40]
    whole, holed = reproduction_number(cases), reproduction_number(gap)
    assert np.isfinite(holed.mean[7:]).all()
    assert holed.mean[30] == pytest.approx(whole.mean[30], rel=0.2)
    few = reproduction_number(np.r_[1, np.zeros(20), 1, np.zeros(9)], least_cases=11)
    assert np.isnan(few.mean).all()
    for wrong in ({"window": 0}, {"level": 1.0}, {"prior": (0.0, 1.0)}):
        with pytest.raises(PlanError):
            reproduction_number(cases, **wrong)
    with pytest.raises(PlanError):
        serial_interval(0.9, 1)
