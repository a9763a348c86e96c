"""Drift detectors over a stream's errors, a closed period at a time: Page-Hinkley and ADWIN.

A detector is fed, period by period, how many rows there were, the mean of their errors (each within [0, 1]) and the
mean of the errors' squares: what a sum over sites gives, so that a coordinator needs no single row, and a site can run
the same detector on its own. Its state is an array, stored like any other. It warns when errors have *risen*.

Sources: Page 1954, Continuous Inspection Schemes (Biometrika), §2; Gama et al. 2014, A Survey on Concept Drift
Adaptation, §3.2; Bifet & Gavaldà 2007, Learning from Time-Changing Data with Adaptive Windowing (SDM), §3.1, Figure 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Detector(Protocol):
    """What the two have in common."""

    def start(self) -> Floats:
        """The state before any period."""

    def update(self, state: Floats, rows: float, mean: float, square: float) -> tuple[Floats, bool]:
        """(the state after a period, whether errors have risen). rows: at least one."""


@dataclass(frozen=True, slots=True)
class PageHinkley:
    """Page's test for an increase of the mean; an observation is a period's mean error. It warns when Σ (x − x̄ − δ) is
    more than λ above its least value so far, and then starts anew. tolerance: δ. threshold: λ."""

    tolerance: float
    threshold: float

    def start(self) -> Floats:
        """[periods, x̄, the sum, its least value]."""
        return np.zeros(4)

    def update(self, state: Floats, rows: float, mean: float, square: float) -> tuple[Floats, bool]:
        """See the class: periods count alike, whatever their rows."""
        periods, average, total, least = state.tolist()
        average += (mean - average) / (periods + 1)
        total += mean - average - self.tolerance
        least = min(least, total)
        if total - least > self.threshold:
            return self.start(), True
        return np.array([periods + 1, average, total, least]), False


@dataclass(frozen=True, slots=True)
class Adwin:
    """A window of rows that is cut where its older and its newer part differ by more than chance; cuts are between
    periods. It warns when what is left has the higher mean. confidence: δ, the chance of a false cut. design_effect: so
    many rows tell as much as one independent row would, as neighbouring hours of neighbouring stations err alike (Kish
    1965, Survey Sampling, §8.2)."""

    confidence: float
    design_effect: float = 1.0

    def start(self) -> Floats:
        """[periods in the window, (rows, Σ errors, Σ squares)]."""
        return np.empty((0, 3))

    def update(self, state: Floats, rows: float, mean: float, square: float) -> tuple[Floats, bool]:
        """Figure 1, with the bound of §3.1 that knows the variance: drop the oldest period while any split of the
        window has |μ₀ − μ₁| ≥ ε."""
        rows, rose = rows / self.design_effect, False
        window = np.vstack([state, [rows, rows * mean, rows * square]])
        while len(window) > 1:
            apart = self._apart(window)
            if not apart.any():
                break
            rose = rose or bool((apart > 0).any())
            window = window[1:]
        return window, rose

    def _apart(self, window: Floats) -> Floats:
        """By how much the newer part's mean is above the older one's, zero within ε, at each split [periods − 1]."""
        before, (n, total, squares) = window.cumsum(0)[:-1], window.sum(0)
        n0, n1 = before[:, 0], n - before[:, 0]
        variance = max(squares / n - (total / n) ** 2, 0.0)
        m = 1 / (1 / n0 + 1 / n1)
        chance = math.log(2 * max(math.log(n), 1.0) / self.confidence)
        bound = np.sqrt(2 / m * variance * chance) + 2 / (3 * m) * chance
        rise: Floats = (total - before[:, 1]) / n1 - before[:, 1] / n0
        return np.where(np.abs(rise) >= bound, rise, 0.0)
