"""Gaussian and Laplace noise in floating point: distribution, tails, grid."""

import numpy as np
import pytest
from scipy import stats

from atoll.privacy.dp import gaussian, laplace

KINDS = [(gaussian, "norm"), (laplace, "laplace")]


@pytest.mark.parametrize(("kind", "law"), KINDS)
def test_draws_fit(shake, kind, law):
    drawn = kind.sample((300, 1000), 2.5, shake(4))
    assert stats.kstest(drawn.reshape(-1), law, args=(0, 2.5)).pvalue > 1e-4
    assert drawn.dtype == np.float64
    assert drawn.shape == (300, 1000)


@pytest.mark.parametrize(("kind", "law"), KINDS)
def test_the_extreme_words_give_the_extreme_tails(scripted, kind, law):
    quantile = getattr(stats, law).isf
    low, high, middle = kind.sample(3, 1.0, scripted(1, 0, 2**64 - 1))
    assert low == -high or abs(low + high) < 1e-12
    assert abs(low) == pytest.approx(quantile(2.0**-65), rel=1e-9)
    assert abs(low) > 9
    assert abs(middle) < 1e-15


@pytest.mark.parametrize(("kind", "law"), KINDS)
def test_rounded_noise_lies_on_the_grid(shake, kind, law):
    drawn = kind.sample(50_000, 3.0, shake(9), step=0.25)
    assert (drawn * 4 == np.rint(drawn * 4)).all()
    cdf = getattr(stats, law)(0, 3.0).cdf
    zero = cdf(0.125) - cdf(-0.125)
    assert stats.binomtest(int((drawn == 0).sum()), len(drawn), zero).pvalue > 1e-4
