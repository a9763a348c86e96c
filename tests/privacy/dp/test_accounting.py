"""Accounting against closed forms and a second accountant; what calibration and charging promise."""

import math
from functools import partial

import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    SingleEpochTreeAggregationDpEvent,
    UnsupportedDpEvent,
    ZCDpEvent,
)
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy.stats import norm

from atoll.contract.errors import PlanError, PrivacyBudgetError
from atoll.privacy.dp import discrete_gaussian, gaussian, geometric, laplace
from atoll.privacy.dp.accounting import calibrate, epsilon, prefix


def analytic_gaussian(z: float, delta: float) -> float:
    """Balle & Wang 2018, Theorem 8."""

    def excess(eps: float) -> float:
        return norm.cdf(0.5 / z - eps * z) - math.exp(eps + norm.logcdf(-0.5 / z - eps * z)) - delta

    return float(optimize.brentq(excess, 0, 500, xtol=1e-10)) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("z", [0.5, 1.0, 3.0, 20.0, 200.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_one_gaussian_costs_what_the_analytic_formula_says(z, delta):
    exact = analytic_gaussian(z, delta)
    assert exact - 1e-6 <= epsilon([(gaussian.event(z), 1)], delta) <= exact * 1.005 + 1e-3


def test_different_gaussians_compose_to_one():
    zs = [2.0, 3.0, 7.5, 7.5, 1.2]
    whole = epsilon([(gaussian.event(z), 1) for z in zs], 1e-6)
    exact = analytic_gaussian(sum(z**-2 for z in zs) ** -0.5, 1e-6)
    assert exact <= whole <= exact * 1.005


@pytest.mark.parametrize(
    "events",
    [
        [(gaussian.event(1.1, sampling_rate=0.01), 500), (gaussian.event(2.0, sampling_rate=0.02), 300)],
        [(laplace.event(20.0), 30), (gaussian.event(10.0), 5)],
        [(geometric.event(10.0), 3), (laplace.event(4.0, sampling_rate=0.1), 20)],
    ],
)
def test_pld_is_near_and_not_above_renyi(events):
    def renyi() -> float:
        accountant = RdpAccountant()
        for event, count in events:
            accountant.compose(event, count)
        return float(accountant.get_epsilon(1e-6))

    found = epsilon(events, 1e-6)
    if RdpAccountant().supports(ComposedDpEvent([event for event, _ in events])):
        assert 0.6 * renyi() < found <= renyi()
    assert 0 < found < math.inf


def test_mixed_discrete_mechanisms_are_accounted_together():
    parts = [
        (geometric.event(5.0), 2),
        (discrete_gaussian.event(4.0), 3),
        (discrete_gaussian.event(4.0, slack=0.01), 1),
    ]
    together = epsilon(parts, 1e-6)
    assert max(epsilon([part], 1e-6) for part in parts) < together < sum(epsilon([part], 1e-6) for part in parts) + 0.3


def test_the_discrete_gaussian_costs_little_more_than_the_analytic_one():
    for z in (0.5, 1.0, 5.0, 50.0):
        exact = analytic_gaussian(z, 1e-6)
        assert exact <= epsilon([(discrete_gaussian.event(z), 1)], 1e-6) <= exact * 1.15 + 0.02


def test_nesting_and_order_do_not_matter():
    a, b = gaussian.event(3.0, sampling_rate=0.1), gaussian.event(5.0)
    flat = epsilon([(a, 6), (b, 4)], 1e-5)
    nested = ComposedDpEvent([SelfComposedDpEvent(ComposedDpEvent([a, a, a]), 2), SelfComposedDpEvent(b, 4)])
    assert epsilon([(nested, 1)], 1e-5) == pytest.approx(flat, rel=1e-9)
    assert epsilon([(b, 1), (a, 6), (b, 3)], 1e-5) == pytest.approx(flat, rel=1e-9)
    assert epsilon([(PoissonSampledDpEvent(1.0, b), 4), (a, 6)], 1e-5) == pytest.approx(flat, rel=1e-9)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], 1e-5) == 0
    assert epsilon([(gaussian.event(1.0), 0)], 1e-5) == 0
    assert epsilon([(NonPrivateDpEvent(), 1), (gaussian.event(1.0), 1)], 1e-5) == math.inf
    assert epsilon([(GaussianDpEvent(0.0), 1)], 1e-5) == math.inf
    assert epsilon([(discrete_gaussian.event(0.0), 1)], 1e-5) == math.inf


def test_hopeless_budgets_are_reported_without_a_huge_table():
    assert 1e5 < epsilon([(gaussian.event(1.0), 10**6)], 1e-6) < 1e7


@pytest.mark.parametrize(
    "event",
    [
        UnsupportedDpEvent(),
        ComposedDpEvent([GaussianDpEvent(1.0), UnsupportedDpEvent()]),
        PoissonSampledDpEvent(0.1, ZCDpEvent(0.1)),
        SingleEpochTreeAggregationDpEvent(1.0, 4),
        "gaussian",
    ],
)
def test_unknown_events_are_refused(event):
    for account in (epsilon, prefix):
        with pytest.raises(PrivacyBudgetError) as caught:
            account([(GaussianDpEvent(1.0), 1), (event, 1)], 1e-5)
        assert caught.value.code == "dp.unknown-event"


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-6, 2.0, math.nan])
def test_delta_must_be_a_probability(delta):
    for call in (partial(epsilon, []), partial(prefix, []), lambda d: calibrate(1.0, d, lambda _: [])):
        with pytest.raises(PrivacyBudgetError) as caught:
            call(delta)
        assert caught.value.code == "dp.delta"


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_epsilon_must_be_positive_and_finite(target):
    with pytest.raises(PrivacyBudgetError) as caught:
        calibrate(target, 1e-5, lambda z: [(gaussian.event(z), 1)])
    assert caught.value.code == "dp.epsilon"


def test_counts_are_not_negative():
    with pytest.raises(PlanError, match="at least 0"):
        epsilon([(gaussian.event(1.0), -1)], 1e-5)


PLANS = {
    "once": lambda z: [(gaussian.event(z), 1)],
    "sampled": lambda z: [(gaussian.event(z, sampling_rate=0.05), 40)],
    "discrete": lambda z: [(discrete_gaussian.event(z, sampling_rate=0.02), 300)],
    "mixed": lambda z: [(gaussian.event(2 * z), 10), (laplace.event(3 * z), 10), (geometric.event(9.0), 1)],
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("target", [0.3, 1.0, 8.0])
def test_calibration_is_tight_and_never_above(name, target):
    z = calibrate(target, 1e-6, PLANS[name])
    assert epsilon(PLANS[name](z), 1e-6) <= target
    assert epsilon(PLANS[name](z - 1e-3), 1e-6) > target


def test_calibration_says_when_no_noise_is_enough():
    with pytest.raises(PrivacyBudgetError) as caught:
        calibrate(0.5, 1e-6, lambda z: [(gaussian.event(z), 1), (geometric.event(1.0), 1)])
    assert caught.value.code == "dp.unreachable"


def test_calibration_of_what_costs_nothing_is_no_noise():
    assert calibrate(1.0, 1e-6, lambda _: []) < 1e-5


def test_prefix_bounds_every_part_and_ends_at_the_total():
    events = [(gaussian.event(z), 1) for z in np.linspace(6, 3, 12)]
    charged = prefix(events, 1e-6)
    assert charged == sorted(charged)
    assert charged[-1] == epsilon(events, 1e-6)
    for done in (1, 5, 11):
        exact = epsilon(events[:done], 1e-6)
        assert exact <= charged[done - 1] <= exact * 1.15 + 0.02
    assert prefix([], 1e-6) == []


def test_prefix_is_quick_for_many_releases():
    charged = prefix([(discrete_gaussian.event(80.0, sampling_rate=0.05), 1)] * 2000, 1e-6)
    assert len(charged) == 2000
    assert 0 < charged[0] < charged[999] < charged[-1]


events_of = st.lists(
    st.one_of(
        st.floats(0.8, 50).map(gaussian.event),
        st.floats(0.8, 50).map(discrete_gaussian.event),
        st.floats(1, 50).map(laplace.event),
        st.floats(1, 50).map(geometric.event),
    ).flatmap(lambda event: st.tuples(st.just(event), st.integers(1, 3))),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(events=events_of, more=events_of)
def test_more_releases_never_cost_less(events, more):
    # A discrete event moves the whole sum from PLD to Rényi accounting, which is never below.
    assert epsilon(events, 1e-6) <= epsilon(events + more, 1e-6) + 1e-6


@settings(max_examples=10, deadline=None)
@given(z=st.floats(0.6, 30), factor=st.floats(1.01, 3), rate=st.floats(0.01, 1), count=st.integers(1, 20))
def test_more_noise_smaller_rates_and_larger_deltas_never_cost_more(z, factor, rate, count):
    for event in (gaussian.event, discrete_gaussian.event):
        cost = epsilon([(event(z, sampling_rate=rate), count)], 1e-6)
        assert epsilon([(event(z * factor, sampling_rate=rate), count)], 1e-6) <= cost + 1e-6
        assert epsilon([(event(z, sampling_rate=rate / factor), count)], 1e-6) <= cost * 1.02 + 1e-3
        assert epsilon([(event(z, sampling_rate=rate), count)], 1e-4) <= cost + 1e-6
