"""The two-sided geometric mechanism and its shares against exact probabilities and ε."""

import math

import numpy as np
import pytest
from scipy import stats

from atoll.contract.errors import PrivacyBudgetError
from atoll.privacy.dp import geometric, laplace
from atoll.privacy.dp.accounting import epsilon


def fits(drawn: np.ndarray, scale: float) -> bool:
    reach = max(1, int(6 * scale))
    law = stats.dlaplace(1 / scale)
    counts = np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=2 * reach + 1)
    expected = law.pmf(np.arange(-reach, reach + 1))
    expected[[0, -1]] = law.cdf(-reach)
    usable = expected * len(drawn) > 5
    return bool(
        stats.chisquare(counts[usable], expected[usable] / expected[usable].sum() * counts[usable].sum()).pvalue > 1e-4
    )


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.6, 10.0])
def test_draws_have_the_exact_probabilities(shake, scale):
    assert fits(geometric.sample(200_000, scale, shake(3)), scale)


@pytest.mark.parametrize(("scale", "sites"), [(0.5, 2), (2.0, 3), (5.0, 10), (2.0, 1)])
def test_shares_sum_to_the_mechanism(shake, scale, sites):
    shares = [geometric.share((1000, 100), scale, sites, shake(site)) for site in range(sites)]
    assert shares[0].shape == (1000, 100)
    assert fits(np.sum(shares, axis=0).reshape(-1), scale)
    assert sites == 1 or not fits(shares[0].reshape(-1), scale)


def test_a_share_has_the_polya_probabilities():
    table = geometric._polya(4.0, 3)
    assert np.diff(table.astype(float)).min() >= 0
    expected = stats.nbinom(1 / 3, 1 - math.exp(-1 / 4)).cdf(np.arange(len(table)))
    assert np.allclose(table / 2.0**64, expected, rtol=1e-12, atol=1e-15)


def test_epsilon_is_the_inverse_of_the_noise_multiplier():
    assert epsilon([(geometric.event(2.0), 1)], 1e-12) == pytest.approx(0.5, abs=2e-3)
    assert epsilon([(geometric.event(2.0, sensitivity=3), 1)], 1e-12) == pytest.approx(0.5, abs=2e-3)
    assert epsilon([(geometric.event(2.0), 4)], 1e-12) == pytest.approx(2.0, abs=2e-3)


def test_a_release_in_counts_costs_more_than_the_continuous_one_and_never_more_than_at_sensitivity_one():
    events = (laplace.event(4.0), geometric.event(4.0, 5), geometric.event(4.0))
    costs = [epsilon([(event, 20)], 1e-6) for event in events]
    assert costs == sorted(costs)
    assert costs[0] * 1.03 < costs[2]


def test_sampling_amplifies_as_for_pure_privacy():
    found = epsilon([(geometric.event(1.0, sampling_rate=0.1), 1)], 1e-12)
    assert found == pytest.approx(math.log(1 + 0.1 * (math.e - 1)), abs=2e-3)
    # P(x) of the sampled mechanism against the unsampled, summed: hockey-stick divergence at a smaller ε
    x, q = np.arange(-200, 201), 0.1
    law = stats.dlaplace(1.0)
    mixed, base = (1 - q) * law.pmf(x) + q * law.pmf(x - 1), law.pmf(x)
    assert np.log(mixed / base).max() <= found + 1e-9
    for eps in (0.0, 0.05, 0.1):
        delta = max(np.maximum(a - np.exp(eps) * b, 0).sum() for a, b in ((mixed, base), (base, mixed)))
        assert eps <= epsilon([(geometric.event(1.0, sampling_rate=q), 1)], delta) + 1e-3


def test_large_scale_and_none(shake):
    drawn = geometric.sample(50_000, 1e9, shake(1))
    assert stats.kstest(drawn / 1e9, "laplace").pvalue > 1e-4
    assert not geometric.sample(5, 0.0, shake(1)).any()
    assert not geometric.share(5, 0.0, 3, shake(1)).any()


@pytest.mark.parametrize(("draw", "scale"), [("sample", -1.0), ("sample", math.inf), ("share", 1e4)])
def test_scales_out_of_range_are_refused(shake, draw, scale):
    with pytest.raises(PrivacyBudgetError) as caught:
        geometric.sample(1, scale, shake(1)) if draw == "sample" else geometric.share(1, scale, 2, shake(1))
    assert caught.value.code == "dp.scale"
