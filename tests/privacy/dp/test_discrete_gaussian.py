"""The discrete Gaussian against its exact probabilities, a slow rational sampler, and what its accounting claims."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from atoll.contract.errors import PrivacyBudgetError
from atoll.privacy.dp import discrete_gaussian, gaussian
from atoll.privacy.dp.accounting import epsilon


def pmf(sigma: float, reach: int) -> np.ndarray:
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x**2) / (2 * sigma**2))
    return weights / weights.sum()


def fits(drawn: np.ndarray, sigma: float) -> bool:
    reach = max(1, int(3 * sigma))
    wide = pmf(sigma, int(20 * sigma) + 20)
    inner = wide[len(wide) // 2 - reach : len(wide) // 2 + reach + 1]
    inside = drawn[np.abs(drawn) <= reach]
    counts = np.append(np.bincount(inside + reach, minlength=2 * reach + 1), len(drawn) - len(inside))
    expected = np.append(inner, 1 - inner.sum()) * len(drawn)
    usable = expected > 5
    counts = np.append(counts[usable], counts[~usable].sum())
    expected = np.append(expected[usable], expected[~usable].sum())
    keep = expected > 1e-3
    assert counts[~keep].sum() == 0
    return bool(stats.chisquare(counts[keep], expected[keep] * counts[keep].sum() / expected[keep].sum()).pvalue > 1e-4)


def slow_bernoulli_exp(rate: Fraction, rng: random.Random) -> bool:
    """CKS 2020, Algorithm 1, in rationals."""
    while rate > 1:
        if not slow_bernoulli_exp(Fraction(1), rng):
            return False
        rate -= 1
    k = 1
    while rng.randrange(rate.denominator * k) < rate.numerator:
        k += 1
    return k % 2 == 1


def slow_laplace(t: int, rng: random.Random) -> int:
    """CKS 2020, Algorithm 2 with s = 1."""
    while True:
        u = rng.randrange(t)
        if not slow_bernoulli_exp(Fraction(u, t), rng):
            continue
        v = 0
        while slow_bernoulli_exp(Fraction(1), rng):
            v += 1
        x, negative = u + t * v, rng.randrange(2)
        if not (negative and x == 0):
            return -x if negative else x


def slow_sample(variance: Fraction, rng: random.Random) -> int:
    """CKS 2020, Algorithm 3."""
    t = math.isqrt(math.floor(variance)) + 1
    while True:
        y = slow_laplace(t, rng)
        if slow_bernoulli_exp((abs(y) - variance / t) ** 2 / (2 * variance), rng):
            return y


@pytest.mark.parametrize("sigma", [0.25, 0.5, 0.7, 1.0, 1.5, 3.2, 50.5])
def test_draws_have_the_exact_probabilities(shake, sigma):
    assert fits(discrete_gaussian.sample(300_000, sigma, shake(11)), sigma)


@pytest.mark.parametrize("sigma", [0.7, 2.5])
def test_agrees_with_the_rational_sampler(shake, sigma):
    rng = random.Random(5)
    slow = np.array([slow_sample(Fraction(sigma) ** 2, rng) for _ in range(20_000)])
    fast = discrete_gaussian.sample(20_000, sigma, shake(5))
    assert fits(slow, sigma)
    reach = int(3 * sigma)
    both = [np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=2 * reach + 1) for drawn in (slow, fast)]
    assert stats.chi2_contingency(both).pvalue > 1e-4


@pytest.mark.parametrize("sigma", [1e3, 2.0**30, discrete_gaussian.LARGEST])
def test_large_scales_are_gaussian(shake, sigma):
    drawn = discrete_gaussian.sample(100_000, sigma, shake(2))
    assert drawn.dtype == np.int64
    assert stats.kstest(drawn / sigma, "norm").pvalue > 1e-4
    assert abs(drawn.std() / sigma - 1) < 0.01


def test_same_stream_same_noise_and_scale_zero_is_none(shake):
    one, two = (discrete_gaussian.sample((20, 30), 4.0, shake(1)) for _ in range(2))
    assert (one == two).all()
    assert (one != discrete_gaussian.sample((20, 30), 4.0, shake(2))).any()
    assert not discrete_gaussian.sample((2, 2), 0.0, shake(1)).any()


@pytest.mark.parametrize("sigma", [-1.0, 1e-9, 2.0**47, math.inf, math.nan])
def test_scales_out_of_range_are_refused(shake, sigma):
    with pytest.raises(PrivacyBudgetError) as caught:
        discrete_gaussian.sample(3, sigma, shake(1))
    assert caught.value.code == "dp.scale"


def test_shares_add_up_to_the_variance(shake):
    total = sum(discrete_gaussian.share(200_000, 6.0, 5, shake(site)) for site in range(5))
    assert stats.kstest(total + np.linspace(-0.5, 0.5, len(total)), "norm", args=(0, 6.0)).pvalue > 1e-4
    assert abs(total.std() / 6.0 - 1) < 0.01


@pytest.mark.parametrize(("local", "sites"), [(0.5, 2), (0.5, 6), (0.7, 3), (1.0, 10)])
def test_sums_of_shares_are_within_tau_of_the_ideal(local, sites):
    reach = 40
    summed = one = pmf(local, reach)
    for _ in range(sites - 1):
        summed = np.convolve(summed, one)
    middle, total = len(summed) // 2, local * math.sqrt(sites)
    near = int(5 * total)
    ideal = pmf(total, 200)[200 - near : 200 + near + 1]
    apart = np.abs(np.log(summed[middle - near : middle + near + 1] / ideal)).max()
    tau = discrete_gaussian.slack(total, sites, 1)
    assert 1e-12 < apart <= tau


def test_slack_is_paid_for_and_vanishes_on_a_fine_grid():
    assert discrete_gaussian.slack(10.0, 1, 1000) == 0
    assert discrete_gaussian.slack(100.0, 10, 10**6) < 1e-100
    coarse = discrete_gaussian.slack(2.0, 4, 100)
    assert coarse == pytest.approx(1000 * sum(math.exp(-2 * math.pi**2 * k / (k + 1)) for k in (1, 2, 3)))
    plain, paid = (epsilon([(discrete_gaussian.event(3.0, slack=s), 1)], 1e-6) for s in (0.0, coarse))
    assert plain < paid <= plain + coarse + 1e-9
    sampled = [epsilon([(discrete_gaussian.event(3.0, slack=s, sampling_rate=0.1), 1)], 1e-6) for s in (0.0, coarse)]
    assert sampled[0] < sampled[1] <= sampled[0] + 3 * coarse + 1e-9


def test_a_grid_too_coarse_for_shares_is_refused():
    with pytest.raises(PrivacyBudgetError) as caught:
        discrete_gaussian.slack(1.0, 9, 1)
    assert caught.value.code == "dp.coarse-grid"


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("moved", [1, 2])
def test_sampled_divergence_at_whole_orders_is_the_gaussians(sigma, rate, moved):
    """Summed over the integers, for adding and for removing; dp-accounting integrates over the reals."""
    orders = [2, 3, 5, 8]
    z = sigma / moved
    claimed = RdpAccountant(orders).compose(gaussian.event(z, sampling_rate=rate)).rdp
    x = np.arange(-4000, 4001).astype(float)
    log_ratio = (2 * x * moved - moved**2) / (2 * sigma**2)
    log_q = -(x**2) / (2 * sigma**2)
    log_q -= np.logaddexp.reduce(log_q)
    with np.errstate(divide="ignore"):
        log_mix = np.logaddexp(np.log1p(-rate) if rate < 1 else -np.inf, np.log(rate) + log_ratio)
    for order, bound in zip(orders, claimed, strict=True):
        adding = np.logaddexp.reduce(log_q + order * log_mix) / (order - 1)
        removing = np.logaddexp.reduce(log_q + (1 - order) * log_mix) / (order - 1)
        assert adding == pytest.approx(bound, rel=1e-6)
        assert removing <= bound * (1 + 1e-9)
