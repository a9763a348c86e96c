"""The two-sided geometric mechanism (discrete Laplace), P(x) ∝ exp(-|x|/scale) on the integers, for counts.

(ε, 0)-DP with scale = Δ₁/ε. Drawn exactly. Shares: it is infinitely divisible, so sites can each add the difference of
two Pólya (negative binomial) variables of order 1/n and the *sum* over n sites is two-sided geometric. Shares are drawn
from a table of 64-bit probabilities: each element is within 2^-60 of its distribution, to be added to δ.

Source: Ghosh, Roughgarden & Sundararajan 2009, Universally Utility-Maximizing Privacy Mechanisms; shares: Goryczka &
Xiong 2017, A Comprehensive Comparison of Multiparty Secure Additions with Differential Privacy, §4.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PrivacyBudgetError
from atoll.privacy.dp.randomness import Secure, Words, below, bernoulli_exp, fill, geometric, words

if TYPE_CHECKING:
    from dp_accounting import DpEvent

LARGEST = 2.0**46
LARGEST_SHARED = 2.0**11


def sample(shape: int | tuple[int, ...], scale: float, random: Secure) -> NDArray[np.int64]:
    """Independent draws, int64 of *shape*; scale in counts, 0 for none. Raises PrivacyBudgetError "dp.scale".

    |x| = u + t·v with u uniform below t ≈ scale, accepted with probability exp(-u/scale), and v geometric.
    """
    if scale == 0:
        return np.zeros(shape, np.int64)
    _check(scale, LARGEST)
    t = max(1, round(scale))
    exactly = Fraction(scale)

    def propose(size: int) -> NDArray[np.int64]:
        drawn = below(2 * t, size, random)
        u = (drawn >> np.uint64(1)).astype(np.int64)
        x = u + t * geometric(t / exactly, size, random)
        negative = (drawn & np.uint64(1)).astype(bool)
        kept: NDArray[np.bool_] = bernoulli_exp(u / scale, lambda i: int(u[i]) / exactly, random) & ~(
            negative & (x == 0)
        )
        signed: NDArray[np.int64] = np.where(negative, -x, x)
        return signed[kept]

    return fill(shape, propose, np.int64)


def share(shape: int | tuple[int, ...], scale: float, sites: int, random: Secure) -> NDArray[np.int64]:
    """One site's share of noise of *scale*, of which *sites* honest ones are sure to add theirs.

    Raises PrivacyBudgetError "dp.scale" (above 2048: the discrete Gaussian is better for sums anyway).
    """
    if scale == 0:
        return np.zeros(shape, np.int64)
    _check(scale, LARGEST_SHARED)
    table = _polya(scale, sites)
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    up, down = np.searchsorted(table, words(2 * size, random), side="right").reshape(2, size)
    return (up - down).astype(np.int64).reshape(shape)


def event(noise_multiplier: float, sensitivity: int = 1, *, sampling_rate: float = 1.0) -> DpEvent:
    """What one release of scale noise_multiplier × (L1 sensitivity in counts) costs: ε = 1/noise_multiplier.

    With sensitivity 1 it is randomised response of that ε, the worst that any ε-DP mechanism can be (Kairouz, Oh &
    Viswanath 2015), and so right for every sensitivity; a larger one costs less together with other releases, though
    never less than the continuous ``laplace.event``, which must not be used for it. sampling_rate q: of secret Poisson
    sampling, for which ε becomes ln(1 + q(exp(ε) - 1)) (Balle, Barthe & Gaboardi 2018, Theorem 8).
    """
    from dp_accounting.dp_event import DiscreteLaplaceDpEvent

    if sampling_rate < 1:
        return DiscreteLaplaceDpEvent(math.log1p(sampling_rate * math.expm1(1 / noise_multiplier)), 1)
    return DiscreteLaplaceDpEvent(1 / (noise_multiplier * sensitivity), sensitivity)


def _check(scale: float, largest: float) -> None:
    if not 2.0**-5 <= scale <= largest:
        raise PrivacyBudgetError(
            "dp.scale", "the noise's scale, in steps of the field's grid, is out of range",
            remedy="choose another resolution (step) for the field",
        )  # fmt: skip


@lru_cache(maxsize=8)
def _polya(scale: float, sites: int) -> Words:
    """floor(2^64·P(X ≤ k)), k = 0, 1, …, of the Pólya variable P(k) = C(k + r - 1, k) α^k (1 - α)^r with
    r = 1/sites, α = exp(-1/scale): as many as there are below 2^64 - 1."""
    bits = 160
    with localcontext(prec=80):
        alpha = (-1 / Decimal(scale)).exp()
        ratio, mass = int(alpha * 2**bits), int(((1 - alpha).ln() / sites).exp() * 2**bits)
    edges, total, k = [], mass, 0
    while (edge := total >> (bits - 64)) < 2**64 - 1:
        edges.append(edge)
        mass = (mass * ratio >> bits) * (k * sites + 1) // ((k + 1) * sites)
        total, k = total + mass, k + 1
    return np.array(edges, np.uint64)
