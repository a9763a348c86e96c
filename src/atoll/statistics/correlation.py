"""Correlation matrices: Pearson exactly, Spearman to a bound that is told for every pair.

Parties: sites and coordinator. Messages: Pearson: a round of moments (a second one where a column's
spread is so small that the first lost digits), which give each column's centre and scale, then a round of
centred cross-products (``pearson.py``). Spearman: up to 1 + *refinements* rounds of histograms, which give the
ranks, then the cross-products of ranks (``spearman.py``). All are Sums.

Missing cells: ``pairwise`` takes, for each pair, the rows that have both columns; ``listwise`` the rows that
have all columns. Ranks are mid-ranks over a column's non-missing values (listwise: over the complete rows),
so that Spearman is pandas' ``df.rank().corr()``, which is ``df.corr("spearman")`` if nothing is missing.

Error. With the rows of a bin at its middle rank, the vector u of a column's ranks is known but for some e, whose size
``spearman.py`` bounds. So u's direction is within arcsin(|e|/|u|) of the truth, and a correlation, the cosine between
two, within what both together may turn it. Bins hold one value each, and the answer is exact, where the codes or
integers fit into *bins*.

Small groups. A pair is withheld where fewer than k rows have both columns, or have the one but not the other:
the difference of the column's sums would tell those. (Differences between three columns' rows are not looked
at: use ``listwise``.) Sums over complete rows are withheld, all of them, where fewer than k other rows have some
column: available-case sums are often told too (``statistics.describe``), and the difference would tell those.
Pearson's sums of a column that a few people dominate are withheld, and its pairs; ranks have no magnitude, and
``spearman.py`` says how histograms hide few people.

Noise. Pearson: one round, "products", about the middle of the schema's ranges in halves of them. Spearman: one
histogram, then "grade_products". The matrix is mended to have no negative eigenvalue.

The coordinator learns, of the cohort's total: counts, moments or histograms of each column, and for each
pair the count, sums, squares and cross-product; listwise, how many incomplete rows have each column, and how
many sites left out theirs; under ``plain`` each site's. Threat model: as the plan's protection. Dropout: the
answer is over the sites of the last round; a site absent from a round is not asked again. Cost: p columns:
66 p² bytes a site, and 33 p for moments or 9 p · bins for each histogram.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.program import Cohort, ProgramParams, program
from atoll.contract.rounds import Round, Steps, Sum, count, real, withheld
from atoll.contract.wire import Array
from atoll.statistics.moments import LOST
from atoll.statistics.noise import NOISED, coarse, fine, mended, smallest
from atoll.statistics.pairs import PAIRS, Scores, counted, tell_tale
from atoll.statistics.pearson import Pearson
from atoll.statistics.spearman import Spearman

Floats = NDArray[np.float64]


@program("statistics.correlation", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Correlation(Pearson, Spearman):
    """Pearson or Spearman correlation matrix of numeric columns, with counts and p-values, by Sum."""

    class Params(ProgramParams):
        """columns: numeric columns (default: all). method, missing: see the module. bins: of the histograms that
        ranks come from; refinements: how often, at most, these are drawn anew where the rows are."""

        columns: tuple[str, ...] = ()
        method: Literal["pearson", "spearman"] = "pearson"
        missing: Literal["pairwise", "listwise"] = "pairwise"
        bins: int = Field(default=2048, ge=16, le=65_536)
        refinements: int = Field(default=3, ge=0, le=8)

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"correlation": {"method", "missing", "columns", "matrix", "pairs_count", "p_values",
        "error_bound", "mean", "std", "notes"}}.

        Matrices are lists of rows in the order of *columns*; None where a correlation is undefined (a column
        that does not vary) or withheld. error_bound: None for Pearson, and under noise. p_values: two-sided, of
        Student's t with n − 2 degrees of freedom. mean, std: of each column (Pearson), for programs
        that go on from here.
        """
        names, rows = self._names(cohort.schema), cohort.schema.max_rows
        p, ranked = len(names), self.params.method == "spearman"
        scores: Scores = yield from (self._ranked if ranked else self._standardised)(cohort, names)
        step = fine(scores.bound, 20) if cohort.exact else coarse(1.0)
        fields = {
            **counted(cohort.schema, p),
            "pairs": count((p, p, 2), bound=rows),
            "sums": real((p, p, 2, 3), bound=scores.bound, step=step),
            "withheld": withheld((p, p, 2)),
            **scores.fields,
        }
        total = yield Round(scores.asked, Sum(), fields, scores.send, sites=scores.sites)
        hidden = PAIRS.hidden(total, smallest(cohort))[..., 0]
        hidden |= hidden.T | tell_tale(total, smallest(cohort))
        n = total["pairs"][..., 0].astype(np.float64)
        s, q, c = np.moveaxis(total["sums"][..., 0, :], -1, 0)
        if not cohort.exact:
            n, s, q, c = self._averaged(n, s, q, c)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.maximum(q - s**2 / n, 0)
            r = (c - s * s.T / n) / np.sqrt(spread * spread.T)
        flat = ~(spread > np.maximum(LOST * q, 0)) | (n < 2)
        undefined = flat | flat.T | hidden
        r = np.where(undefined, np.nan, np.clip(r, -1, 1))
        if not cohort.exact:
            r = _mended(r)
        np.fill_diagonal(r, np.where(np.diag(undefined), np.nan, 1.0))
        bounds = None
        if scores.error is not None:
            error = scores.error + scores.scale * np.sqrt(total["blur"])
            with np.errstate(invalid="ignore", divide="ignore"):
                bounds = _turned(r, error[:, None] / (scores.scale[:, None] * np.sqrt(spread)))
        notes = _notes(names, hidden, flat & ~hidden, " beyond a bin" if ranked else "")
        found = {
            "method": self.params.method,
            "missing": self.params.missing,
            "columns": list(names),
            "matrix": _told(r),
            "pairs_count": _told(np.where(hidden, np.nan, n), int),
            "p_values": _told(_p_values(r, n)),
            "error_bound": None if bounds is None else _told(bounds),
        }
        if not ranked:
            known = ~hidden.diagonal() & (n.diagonal() > 1)
            mean, std = _described(scores, cohort, *(matrix.diagonal() for matrix in (n, s, spread)))
            found["mean"] = _told(np.where(known, mean, np.nan))
            found["std"] = _told(np.where(known, np.where(flat.diagonal(), 0, std), np.nan))
        return {"correlation": {**found, "notes": notes if cohort.exact else [*notes, NOISED]}}

    def _averaged(self, *sums: Floats) -> tuple[Floats, ...]:
        """Rows, sums, squares and cross-products [columns, columns], where what is told twice has noise twice."""
        n, s, q, c = sums
        if self._listwise and n.size:
            n = np.full_like(n, np.rint(n.mean()))
            s, q = (np.repeat(power.mean(axis=1, keepdims=True), len(n), axis=1) for power in (s, q))
        n = np.rint((n + n.T) / 2)
        limit = np.maximum(n, 0)
        return n, np.clip(s, -limit, limit), np.clip(q, 0, limit), (c + c.T) / 2


def _described(scores: Scores, cohort: Cohort, n: Floats, s: Floats, spread: Floats) -> tuple[Floats, Floats]:
    """(mean, standard deviation), each [columns], of each column's rows, sum and squares about its mean."""
    center, scale = scores.center, scores.scale
    mean = center + scale * s / n.clip(1)
    std = scale * np.sqrt(spread / (n - 1).clip(1))
    if not cohort.exact:
        mean, std = center + np.clip(mean - center, -scale, scale), np.minimum(std, 2 * scale)
    return mean, std


def _turned(r: Floats, size: Floats) -> Floats:
    """Most that cosines *r* are off when each vector may be off by *size* of its length."""
    angle = np.where(size < 1, np.arcsin(np.minimum(size, 1)), np.pi)
    turn, theta = angle + angle.T, np.arccos(r)
    bound = np.maximum(np.cos(np.maximum(theta - turn, 0)) - r, r - np.cos(np.minimum(theta + turn, np.pi)))
    bound = np.where(turn > 0, bound, 0.0)
    np.fill_diagonal(bound, 0.0)
    return np.where(np.isnan(r), np.nan, bound)


def _p_values(r: Floats, n: Floats) -> Floats:
    """Two-sided p-values of no correlation, of Student's t: 1 − I(r²) of a beta distribution."""
    with np.errstate(invalid="ignore"):
        tail = scipy.special.betainc(np.maximum(n - 2, 1) / 2, 0.5, (1 - r) * (1 + r))
    return np.where(np.isnan(r), np.nan, np.where(n > 2, tail, 1.0))


def _mended(r: Floats) -> Floats:
    """Of the columns whose correlations are all defined, a matrix that is one; others stay."""
    whole = ~np.isnan(r.diagonal())
    place = np.ix_(whole, whole)
    if whole.any() and not np.isnan(r[place]).any():
        r[place] = mended(r[place])
    return r


def _told(values: Floats, kind: type = float) -> list[Any]:
    """As (lists of) lists, None for NaN."""
    return [_told(v, kind) if v.ndim else None if np.isnan(v) else kind(v) for v in values]


def _notes(names: tuple[str, ...], hidden: NDArray[np.bool_], flat: NDArray[np.bool_], beyond: str) -> list[str]:
    """Why correlations are not told: *hidden*, and *flat* (the first column, in the rows that both have)."""
    notes, still = [], flat.diagonal()
    if still.any():
        notes.append(f"does not vary{beyond}, so correlations are undefined: " + ", ".join(np.array(names)[still]))
    for mask, why in (
        (hidden, "withheld, as too few people have both columns, or one without the other, or make most of a column"),
        ((flat | flat.T) & ~still & ~still[:, None], "undefined, as one hardly varies in the rows that have both"),
    ):
        pairs = [f"{names[i]}-{names[j]}" if i < j else names[i] for i, j in np.argwhere(np.triu(mask))]
        if pairs:
            notes.append(f"{why}: {', '.join(pairs)}")
    return notes


def complete_cases(
    cohort: Cohort, columns: tuple[str, ...]
) -> Generator[Any, Any, tuple[dict[str, Any], Floats, Floats, Floats]]:
    """Covariance of *columns* over the rows that have all of them; for programs that call "statistics.correlation".

    Returns (the result under "correlation", means [p], standard deviations [p], correlations [p, p]); NaN
    where undefined or withheld. Covariances are correlations times standard deviations.
    """
    steps = Correlation(Correlation.Params(columns=columns, missing="listwise"))
    found = (yield from steps.coordinate(cohort))["correlation"]
    mean, std, matrix = (np.array(found[name], np.float64) for name in ("mean", "std", "matrix"))
    return found, mean, std, matrix.reshape(len(mean), len(mean))


__all__ = ["Correlation", "complete_cases"]
