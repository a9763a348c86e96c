"""The Gaussian mechanism in floating point, N(0, σ²) by the inverse of its distribution function.

Floating point: the low bits of value + noise can tell the value (Mironov 2012), whatever σ is. So both are put on the
field's grid: *step* rounds the noise, and with a value on that grid the release is round(value + ideal noise), which is
post-processing of the ideal mechanism as far as 64 random bits and float64's tails resolve it: draws end at 9.2σ
(probability 2^-64 an element). Where the noise is *shared out* over sites, rounding each share is no longer
post-processing of the sum; use ``discrete_gaussian``, for which nothing has to be argued away.

Source: Dwork & Roth 2014, Appendix A; Balle & Wang 2018, Improving the Gaussian Mechanism for Differential Privacy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy
from numpy.typing import NDArray

from atoll.privacy.dp.randomness import Secure, fill, words

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def sample(
    shape: int | tuple[int, ...], sigma: float, random: Secure, *, step: float | None = None
) -> NDArray[np.float64]:
    """Independent draws of N(0, sigma²), float64 of *shape*, rounded to multiples of *step*."""

    def draw(size: int) -> NDArray[np.float64]:
        drawn = words(size, random)
        tail = ((drawn >> np.uint64(1)) + 0.5) * 2.0**-64  # in (0, 1/2]: small tails keep all their bits
        low = scipy.special.ndtri(tail) * sigma
        noise: NDArray[np.float64] = np.where(drawn & np.uint64(1), low, -low)
        return np.rint(noise / step) * step if step else noise

    return fill(shape, draw, np.float64, accepted=1)


def event(noise_multiplier: float, *, sampling_rate: float = 1.0) -> DpEvent:
    """What one release costs; sampling_rate: of Poisson sampling that nobody outside the site knows."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    gaussian = GaussianDpEvent(noise_multiplier)
    return gaussian if sampling_rate >= 1 else PoissonSampledDpEvent(sampling_rate, gaussian)
