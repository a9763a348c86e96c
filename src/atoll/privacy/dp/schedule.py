"""Adaptive noise by training stage: one total (ε, δ) spent unevenly over the rounds.

Noise may rise (accurate early steps, when gradients are large and direction is everything), fall (accurate last steps,
near the optimum), or stay. Only the *shape* is chosen; one common factor is then calibrated so that the heterogeneous
composition meets the total. The shape must not depend on the data.

Source: Lee & Kifer 2018, Concentrated Differentially Private Gradient Descent with Adaptive per-Iteration Privacy
Budget; Yu, Liu, Pu, Gursoy & Truex 2019, Differentially Private Model Publishing for Deep Learning, §VI.
"""

from __future__ import annotations

from typing import Literal

from atoll.contract.errors import PlanError

Kind = Literal["constant", "rising", "falling"]


def shape(
    releases: int, kind: Kind, ratio: float = 4.0, *, measure: Literal["noise", "rho"] = "noise", stages: int = 8
) -> list[float]:
    """Relative noise of each release, largest/smallest = *ratio*, geometric from the first stage to the last.

    kind: what the noise does. measure: whether *ratio* is of noise or of budget (rho ∝ 1/noise²: noise moves by its
    root). stages: equal runs of rounds with the same noise, at most *releases*. Raises PlanError "dp.schedule".
    """
    if releases < 1 or stages < 1 or not ratio >= 1 or kind not in ("constant", "rising", "falling"):
        raise PlanError(
            "dp.schedule", "a noise schedule needs a known kind, a release, a stage, and a ratio of at least 1",
            field="schedule", remedy="kind: constant, rising or falling; ratio: largest over smallest noise",
        )  # fmt: skip
    stages = min(stages, releases)
    grown = 1.0 if kind == "constant" else ratio if measure == "noise" else ratio**0.5
    steps = [grown ** (stage / max(stages - 1, 1)) for stage in range(stages)]
    if kind == "falling":
        steps.reverse()
    return [steps[release * stages // releases] for release in range(releases)]
