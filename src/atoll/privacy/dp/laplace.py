"""The Laplace mechanism in floating point, density ∝ exp(-|x|/scale): (ε, 0)-DP with scale = Δ₁/ε.

What ``gaussian`` says of floating point holds here, and is where it was found (Mironov 2012): put values on
the field's grid and round the noise to it. For counts use ``geometric``, which is exact.

Source: Dwork, McSherry, Nissim & Smith 2006, Calibrating Noise to Sensitivity in Private Data Analysis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atoll.privacy.dp.randomness import Secure, fill, words

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def sample(
    shape: int | tuple[int, ...], scale: float, random: Secure, *, step: float | None = None
) -> NDArray[np.float64]:
    """Independent draws, float64 of *shape*, rounded to multiples of *step*."""

    def draw(size: int) -> NDArray[np.float64]:
        drawn = words(size, random)
        far = -np.log(((drawn >> np.uint64(1)) + 0.5) * 2.0**-63) * scale
        noise: NDArray[np.float64] = np.where(drawn & np.uint64(1), far, -far)
        return np.rint(noise / step) * step if step else noise

    return fill(shape, draw, np.float64, accepted=1)


def event(noise_multiplier: float, *, sampling_rate: float = 1.0) -> DpEvent:
    """What one release costs; sampling_rate: of Poisson sampling that nobody outside the site knows."""
    from dp_accounting import LaplaceDpEvent, PoissonSampledDpEvent

    laplace = LaplaceDpEvent(noise_multiplier)
    return laplace if sampling_rate >= 1 else PoissonSampledDpEvent(sampling_rate, laplace)
