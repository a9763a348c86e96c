"""The discrete Gaussian N_Z(0, σ²), P(x) ∝ exp(-x²/2σ²) on the integers: exact, and made to be shared out.

Values are put on their field's grid first; σ and sensitivities are in steps of that grid (``noise.on_grid``).
Nothing is rounded after the noise, and sums modulo a power of two stay sums: this is the mechanism for masked sums.

Its Rényi divergence is at most the Gaussian's at every order (CKS 2020, Theorems 4 and 14: Δ²/2σ²-concentrated DP), so
it is accounted in Rényi terms. With Poisson sampling of rate q, at whole orders only: expanded by the binomial
theorem, the order-α moment of the sampled mechanism is a sum of E[exp(k⟨Δ, x⟩/σ²)], k ≤ α, which for an integer vector
kΔ is the same, exp(k²‖Δ‖²/2σ²), for the discrete and the continuous Gaussian. (That removing costs no more than adding
follows as in Mironov, Talwar & Zhang 2019, Theorem 5: x → Δ - x swaps the two and keeps the grid.)

Shares: n sites each add N_Z(0, σ²/n). Their sum is not quite N_Z(0, σ²): its log-probabilities differ by at most τ an
element, and τ must be paid for (:func:`slack`). With a fine grid it vanishes. Noise of further survivors only helps.

Source: Canonne, Kamath & Steinke 2020, Algorithms 1-3; Kairouz, Liu & Steinke 2021, The Distributed Discrete
Gaussian Mechanism for Federated Learning with Secure Aggregation, Proposition 14.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PrivacyBudgetError
from atoll.privacy.dp.randomness import Secure, below, bernoulli_exp, fill, geometric

if TYPE_CHECKING:
    from dp_accounting import DpEvent

LARGEST = 2.0**46
"""Largest σ in steps of the grid: every draw is then exact in float64 too."""


def sample(shape: int | tuple[int, ...], sigma: float, random: Secure) -> NDArray[np.int64]:
    """Independent draws of N_Z(0, sigma²), int64 of *shape*; sigma in steps of the grid, 0 for none.

    Raises PrivacyBudgetError "dp.scale". Algorithms 2 and 3 in one rejection: propose x = u + t·v with u uniform
    below t = ⌊σ⌋ + 1 and v geometric, accept with probability exp(-(x²/2σ² + σ²/2t² - v)).
    """
    if sigma == 0:
        return np.zeros(shape, np.int64)
    if not 2.0**-20 <= sigma <= LARGEST:
        raise PrivacyBudgetError(
            "dp.scale", "the noise's scale, in steps of the field's grid, is out of range",
            remedy="choose another resolution (step) for the field",
        )  # fmt: skip
    t = math.floor(sigma) + 1
    variance = Fraction(sigma) ** 2
    half, shift = 0.5 / float(variance), float(variance / (2 * t * t))

    def propose(size: int) -> NDArray[np.int64]:
        drawn = below(2 * t, size, random)
        turns = geometric(Fraction(1), size, random)
        x = (drawn >> np.uint64(1)).astype(np.int64) + turns * t
        negative = (drawn & np.uint64(1)).astype(bool)

        def exact(i: int) -> Fraction:
            return int(x[i]) ** 2 / (2 * variance) + variance / (2 * t * t) - int(turns[i])

        rates = np.square(x, dtype=np.float64) * half + (shift - turns)
        kept: NDArray[np.bool_] = bernoulli_exp(rates, exact, random) & ~(negative & (x == 0))
        signed: NDArray[np.int64] = np.where(negative, -x, x)
        return signed[kept]

    return fill(shape, propose, np.int64)


def share(shape: int | tuple[int, ...], sigma: float, sites: int, random: Secure) -> NDArray[np.int64]:
    """One site's share of noise of scale *sigma*, of which *sites* honest ones are sure to add theirs."""
    return sample(shape, sigma / math.sqrt(sites), random)


def event(noise_multiplier: float, *, slack: float = 0.0, sampling_rate: float = 1.0) -> DpEvent:
    """What one release costs. slack: the sum of :func:`slack` over its fields; sampling_rate: of secret Poisson
    sampling.

    An event of zero-concentrated DP goes along even if it costs nothing: dp-accounting's PLD accountant does not
    know it, and so only Rényi accounting, which holds for the discrete Gaussian, is used.
    """
    from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, ZCDpEvent

    if sampling_rate >= 1:
        return ZCDpEvent(rho=0.5 / noise_multiplier**2 if noise_multiplier > 0 else math.inf, xi=slack)
    sampled = PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))
    # e^±τ on both probabilities: (2α - 1)/(α - 1) ≤ 3 times τ at whole orders α ≥ 2.
    return ComposedDpEvent([sampled, ZCDpEvent(rho=0.0, xi=3 * slack)])


def slack(sigma: float, sites: int, size: int) -> float:
    """τ·size: what it costs that the sum of *sites* shares is not quite N_Z(0, sigma²), for a field of *size* elements.

    Proposition 14 of Kairouz et al. 2021. Raises PrivacyBudgetError "dp.coarse-grid" when a share's scale is below 1/2.
    """
    if sites == 1 or sigma == 0:
        return 0.0
    local = sigma / math.sqrt(sites)
    if local < 0.5:
        raise PrivacyBudgetError(
            "dp.coarse-grid", "a site's share of the noise is less than half a step of the field's grid",
            remedy="choose a finer resolution (step) for the field, or more noise",
        )  # fmt: skip
    k = np.arange(1, sites)
    return float(10 * np.exp(-2 * (math.pi * local) ** 2 * k / (k + 1)).sum()) * size
