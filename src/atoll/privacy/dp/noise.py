"""How much noise: from declared sensitivity to each field's scale, and to each site's share of it.

Shares: under a protection that shows only sums, n honest sites each add noise of variance σ²/n and the sum carries σ².
What counts is the fewest honest sites that can be left: dropouts below the threshold stop the round, and
colluding sites can subtract their own noise. So n = (fewest survivors allowed) - (colluders tolerated), fixed
beforehand; when more survive there is more noise than promised, never less.

Source: Kairouz, Liu & Steinke 2021, §1 and §4 (shares, rounding); Dwork & Roth 2014, Theorem A.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from atoll.contract.errors import PlanError, PrivacyBudgetError
from atoll.contract.sensitivity import Norms


def honest(survivors: int, colluders: int = 0) -> int:
    """Sites whose noise is sure to be there: fewest *survivors* allowed less *colluders*.

    Raises PrivacyBudgetError "dp.no-honest-site".
    """
    if survivors - colluders < 1:
        raise PrivacyBudgetError(
            "dp.no-honest-site", "with so few survivors and so many colluders nobody's noise is sure to stay secret",
            field="colluders", remedy="raise the fewest survivors of a round, or tolerate fewer colluders",
        )  # fmt: skip
    return survivors - colluders


def share(total_sigma: float, sites_guaranteed: int) -> float:
    """One site's σ, so that *sites_guaranteed* of them make *total_sigma*. Raises "dp.no-honest-site" below 1."""
    return total_sigma / math.sqrt(honest(sites_guaranteed))


def delta_warning(delta: float, units: int) -> str:
    """A warning when *delta* is not below one over the number of *units* (records, entities or sites), else ""."""
    if delta * units < 1:
        return ""
    return (
        f"delta = {delta:g} is not below 1/{units}: a mechanism that publishes one whole record at random would keep it"
    )


def field_scales(
    norms: Mapping[str, Norms],
    noise_multiplier: float,
    *,
    weights: Iterable[float] = (1.0,),
    split: Mapping[str, float] | None = None,
    norm: Literal["l1", "l2"] = "l2",
) -> dict[str, float]:
    """The noise's scale for each field of one release, so that the whole release has *noise_multiplier*.

    Fields released together are one mechanism. With shares w_f of the budget (Σ w = 1; equal unless *split* says
    otherwise) and sensitivities D_f: σ_f = z·D_f/√w_f for Gaussian kinds, since Σ D_f²/σ_f² = 1/z²; for Laplace kinds
    (norm="l1") z·D_f/w_f, since Σ D_f/σ_f = 1/z. Equal shares give each field the same noise relative to what one
    unit can change, whatever its unit; least total squared error would be w_f ∝ D_f·√size_f.

    weights: what sites multiply their values by; the largest |weight| decides, since any site may hold the record.
    A field that no record moves gets no noise and no share. Raises PlanError "dp.split", "dp.unbounded".
    """
    heaviest = max(abs(weight) for weight in weights)
    moved = {name: getattr(one, norm) * heaviest for name, one in norms.items()}
    for name, change in moved.items():
        if not 0 <= change < math.inf:
            raise PlanError(
                "dp.unbounded", "one record can change a field by any amount", field=name,
                remedy="clip it, or bound the column's range or the sites' weights",
            )  # fmt: skip
    live = [name for name, change in moved.items() if change > 0]
    given = dict.fromkeys(live, 1.0) if split is None else {name: split.get(name, 0.0) for name in live}
    if any(part <= 0 for part in given.values()):
        raise PlanError(
            "dp.split", "every field that is released needs a share of the budget", field="split",
            remedy="give each field of the release a share above 0",
        )  # fmt: skip
    total = sum(given.values())
    power = 1.0 if norm == "l1" else 0.5
    return {
        name: noise_multiplier * change / (given[name] / total) ** power if change else 0.0
        for name, change in moved.items()
    }


def on_grid(norms: Norms, step: float, size: int, *, exact: bool = False) -> Norms:
    """Sensitivity in steps of a field's grid, of a field of *size* elements.

    Rounding a site's value to the grid moves each element by up to half a step with and half a step without the record:
    one step an element. exact: values are on the grid anyway (counts), nothing is rounded.
    """
    extra = 0 if exact else size
    return Norms(norms.l1 / step + extra, norms.l2 / step + math.sqrt(extra))


def reach(sigma: float, size: int, failure: float = 2.0**-40) -> float:
    """Noise that none of *size* elements exceeds in absolute value, except with probability *failure*.

    For room in a ring: bound + reach(σ of the sum) must fit. Holds for Gaussian and discrete Gaussian noise (both
    are σ²-subgaussian) and sums of their shares.
    """
    return sigma * math.sqrt(2 * math.log(2 * max(size, 1) / failure))
