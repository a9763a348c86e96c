"""A clip that adapts: towards the norm that a share of the units stay below.

Source: Andrew, Thakkar, McMahan & Ramaswamy 2021, Differentially Private Learning with Adaptive Clipping, Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


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
