"""Clipping: what bounds a record's, an entity's or a site's contribution before noise; and a clip that adapts.

A contribution that is not finite becomes zero (and counts as clipped): an error would itself tell that it is there.

Source: Abadi et al. 2016, Deep Learning with Differential Privacy, Algorithm 1 (flat); Andrew, Thakkar, McMahan &
Ramaswamy 2021, Differentially Private Learning with Adaptive Clipping, Algorithm 1 and Theorem 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError

Reals = NDArray[np.floating[Any]]


def clip(values: Reals, norm: float) -> tuple[Reals, bool]:
    """*values* (any shape) with L2 norm at most *norm*, and whether they had to be changed."""
    rows, clipped = clip_rows(values.reshape(1, -1), norm)
    return rows.reshape(values.shape), bool(clipped[0])


def clip_rows(rows: Reals, norm: float) -> tuple[Reals, NDArray[np.bool_]]:
    """Each row of *rows* [n, d] with L2 norm at most *norm*, and which rows had to be changed [n].

    Norms are taken in float64, and rows that are scaled end a rounding error below *norm*, not above.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    finite = np.isfinite(found)
    clipped = ~(found <= norm)
    below = norm * (1 - 8 * float(np.finfo(rows.dtype).eps))
    scale = np.where(clipped, below / np.where(finite & (found > 0), found, 1.0), 1.0)
    scaled = np.where(finite[:, None], rows, 0) * scale[:, None]
    return scaled.astype(rows.dtype), clipped


@dataclass(frozen=True, slots=True)
class QuantileClip:
    """A clip that moves to a quantile of the contributions' norms (Andrew et al. 2021).

    Each unit also sends whether its norm was within the clip, as +1/2 or -1/2, so that one unit moves that sum by 1/2.
    norm: the clip C. quantile: γ, the share of units to be left unclipped. rate: η, the learning rate of log C.
    """

    norm: float
    quantile: float = 0.5
    rate: float = 0.2

    def updated(self, noised_sum: float, units: float) -> QuantileClip:
        """After a round: C ← C·exp(-η(b - γ)), b = noised_sum/units + 1/2 in [0, 1].

        noised_sum: Σ ±1/2 with its noise; units: how many were expected (public: never the round's own count).
        """
        within = min(max(noised_sum / units + 0.5, 0.0), 1.0)
        return replace(self, norm=self.norm * math.exp(-self.rate * (within - self.quantile)))


def votes(within: NDArray[np.bool_]) -> float:
    """Σ ±1/2 over units, for :meth:`QuantileClip.updated`; L2 sensitivity 1/2."""
    return float(np.count_nonzero(within)) - len(within) / 2


def split(noise_multiplier: float, vote_sigma: float) -> float:
    """z_Δ for the values, so that values and votes (noise σ_b = *vote_sigma*) together have *noise_multiplier* z.

    Theorem 1: z_Δ = (z⁻² - (2σ_b)⁻²)^(-1/2). The paper takes σ_b = units/20, which makes z_Δ barely larger than z.
    Raises PlanError "dp.vote-noise" when the votes alone would spend it all.
    """
    left = noise_multiplier**-2 - (2 * vote_sigma) ** -2 if vote_sigma > 0 else 0.0
    if left <= 0:
        raise PlanError(
            "dp.vote-noise", "the clip's own noise is too small for the noise multiplier", field="vote_sigma",
            remedy="choose more than half the noise multiplier, such as a twentieth of the number of units",
        )  # fmt: skip
    return float(left**-0.5)
