"""Noise and fixed point: how finely sums are declared, what a record changes of them, and what is made of noisy ones.

Under differential privacy (``Cohort.exact`` is False) noise protects people, and thresholds do not: a program
withholds nothing, asks a number of rounds that does not depend on the data, asks for the cells of a table instead of
cumulative counts (which one record changes all), and brings sums back to what sums can be: counts that rise,
moments within the schema's range, correlation matrices without negative eigenvalues. That is post-processing, and
costs no privacy (Dwork & Roth 2014, Proposition 2.1). P-values and intervals take the noise for data.

The norms that handlers declare hold where ``site.min_group_size`` is 1: what a site merges or withholds by the size of
its own groups can change as a whole with one record.

Sources: Barlow et al. 1972 (isotonic regression); Rousseeuw & Molenberghs 1993, §3 (the eigenvalue method).
"""

from __future__ import annotations

import math

import numpy as np
import scipy
from numpy.typing import NDArray

from atoll.contract.errors import DisclosureError
from atoll.contract.program import Cohort, SiteView
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array

Floats = NDArray[np.float64]
NOTHING = touches(0)
"""A field that no record changes: what a gate fills in, and flags that are constant where nothing is withheld."""
LEAST = 1e-6
"""Smallest eigenvalue of a mended correlation matrix."""
NOISED = "noise is not accounted for in p-values and intervals"


def fine(bound: float, bits: int = 0) -> float:
    """The step of a real field: 2⁻⁵³ of its *bound*, so that sums of up to 512 sites fit a ring of 64 bits;
    with 2⁻ᵇⁱᵗˢ of that, for a few numbers whose differences matter, one of 128."""
    return math.ldexp(1.0, math.frexp(bound)[1] - 54 - bits)


def coarse(most: float) -> float:
    """The step under noise: 2⁻²⁰ of the *most* that one record adds, far below the noise that hides it."""
    return math.ldexp(1.0, math.frexp(most)[1] - 21)


def smallest(cohort: Cohort) -> int:
    """The fewest people in a cell that is reported: any number of them under noise."""
    return cohort.min_group_size if cohort.exact else 1


def only_summed(site: SiteView) -> None:
    """Raise DisclosureError where others see this site's own numbers: single cells, beside what the site told
    merged, would tell small groups."""
    if site.min_group_size > 1:
        raise DisclosureError(
            "disclosure.cells", "single cells are told only in sums that nobody sees apart", field="protection",
            remedy="choose a protection that shows only sums",
        )  # fmt: skip


def powers(reach: Floats) -> tuple[Norms, Norms]:
    """What a record changes of Σz and Σz² of several columns when |z| ≤ *reach*: [num_columns], or [groups,
    num_columns] when it is in one of the groups."""
    with np.errstate(over="ignore"):
        first = [Norms(float(r.sum()), float(np.sqrt((r**2).sum()))) for r in np.atleast_2d(reach)]
        second = [Norms(float((r**2).sum()), float(np.sqrt((r**4).sum()))) for r in np.atleast_2d(reach)]
    return _most(first), _most(second)


def _most(norms: list[Norms]) -> Norms:
    return Norms(max(n.l1 for n in norms), max(n.l2 for n in norms))


def reach(low: Floats, high: Floats, center: Floats, unit: Floats) -> Floats:
    """Most that |x − center| / unit can be of any x in [low, high]."""
    return np.asarray(np.maximum(np.abs(high - center), np.abs(low - center)) / unit)


def cumulated(cells: Array) -> NDArray[np.int64]:
    """Cumulative counts of noisy *cells* [..., size], along the last axis: whole, never negative, never falling."""
    return rising(np.cumsum(np.asarray(cells, np.float64), axis=-1))


def rising(counts: Array) -> NDArray[np.int64]:
    """The nearest (least squares) counts to *counts* [..., size] that do not fall along the last axis, nor below 0."""
    flat = np.asarray(counts, np.float64).reshape(-1, counts.shape[-1] or 1)
    fitted = [scipy.optimize.isotonic_regression(row).x for row in flat]
    whole: NDArray[np.int64] = np.rint(np.maximum(np.array(fitted).reshape(counts.shape), 0)).astype(np.int64)
    return whole


def mended(matrix: Floats) -> Floats:
    """A symmetric matrix with a diagonal of ones as a correlation matrix: no eigenvalue below LEAST."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    made = (vectors * np.maximum(values, LEAST)) @ vectors.T
    unit = np.sqrt(np.diag(made))
    return np.asarray(made / np.outer(unit, unit))
