"""The exact samplers: distributions, and the rare draws that 64 bits do not decide."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from atoll.privacy.dp.randomness import below, bernoulli_exp, fill, geometric, words

LAST = 2**64 - 1


def exact_count(real: Fraction, rate: Fraction) -> int:
    with mpmath.workdps(100):
        value = -mpmath.log(mpmath.mpf(real.numerator) / real.denominator) * rate.denominator / rate.numerator
        return int(mpmath.floor(value))


def test_words_are_the_stream(scripted):
    assert words(3, scripted(1, LAST, 2**40)).tolist() == [1, LAST, 2**40]


@pytest.mark.parametrize("bound", [1, 3, 10, 64])
def test_below_is_uniform(shake, bound):
    drawn = below(bound, 60_000, shake(bound))
    counts = np.bincount(drawn.astype(int), minlength=bound)
    assert len(counts) == bound
    assert bound == 1 or stats.chisquare(counts).pvalue > 1e-4


def test_below_draws_again_what_would_bias(scripted):
    assert below(3, 2, scripted(LAST, 5, LAST, 7)).tolist() == [
        1,
        2,
    ]  # 2^64 ≡ 1 modulo 3: the last word is one too many
    assert below(2**63, 1, scripted(LAST)).tolist() == [2**63 - 1]


@pytest.mark.parametrize("rate", [Fraction(1), Fraction(1, 3), Fraction(9, 2), Fraction(32)])
def test_geometric_has_its_distribution(shake, rate):
    size = 100_000
    counts = geometric(rate, size, shake(7))
    fall = np.exp(-float(rate))
    cut = max(1, int(np.log(size / 20) / float(rate)))
    expected = np.append((1 - fall) * fall ** np.arange(cut), fall**cut) * size
    found = np.bincount(np.minimum(counts, cut), minlength=cut + 1)
    if expected[-1] > 5:
        assert stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue > 1e-4
    else:
        assert (counts[: size // 2] == 0).all()


@pytest.mark.parametrize("k", [1, 2, 30])
def test_geometric_asks_for_more_bits_at_an_edge(scripted, k):
    with mpmath.workdps(60):
        edge = int(mpmath.floor(mpmath.exp(-k) * 2**64))
    assert geometric(Fraction(1), 1, scripted(edge, 0)).tolist() == [k]
    assert geometric(Fraction(1), 1, scripted(edge, LAST)).tolist() == [k - 1]
    assert geometric(Fraction(1), 2, scripted(edge + 1, edge - 1)).tolist() == [k - 1, k]


def test_geometric_goes_on_beyond_64_bits(scripted):
    # u = 2^-65 …: 65·ln 2 = 45.05
    assert geometric(Fraction(1), 1, scripted(0, 2**63)).tolist() == [exact_count(Fraction(1, 2**65), Fraction(1))]


@settings(max_examples=200, deadline=None)
@given(
    rate=st.fractions(Fraction(1, 2**20), 40, max_denominator=2**20),
    offset=st.integers(-(2**20), 2**20),
    more=st.integers(1, LAST - 1),
)
def test_bernoulli_near_its_threshold_is_decided_exactly(scripted, rate, offset, more):
    with mpmath.workdps(60):
        word = int(mpmath.floor(mpmath.exp(-mpmath.mpf(rate.numerator) / rate.denominator) * 2**64)) + offset
    word = min(max(word, 0), LAST)
    drawn = bernoulli_exp(np.array([float(rate)]), lambda _: rate, scripted(word, more, more, more))
    real = Fraction((word << 64) + more, 2**128)
    assert drawn[0] == (exact_count(real, rate) >= 1)


def test_bernoulli_of_rate_zero_is_sure(scripted):
    assert bernoulli_exp(np.zeros(2), lambda _: Fraction(0), scripted(0, LAST)).all()


def test_bernoulli_has_its_probability(shake):
    rates = np.repeat([0.1, 1.0, 3.0], 50_000)
    drawn = bernoulli_exp(rates, lambda i: Fraction(rates[i]), shake(3)).reshape(3, -1).sum(1)
    for hits, rate in zip(drawn, [0.1, 1.0, 3.0], strict=True):
        assert stats.binomtest(int(hits), 50_000, float(np.exp(-rate))).pvalue > 1e-4


@pytest.mark.parametrize("shape", [(), 0, 5, (2, 3), (0, 4), (40_000,)])
def test_fill_has_its_shape(shape):
    filled = fill(shape, lambda size: np.arange(size // 2, dtype=np.int64), np.int64)
    assert filled.shape == np.empty(shape).shape
    assert filled.dtype == np.int64
