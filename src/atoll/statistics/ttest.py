"""Student's t-test: of two groups (Welch, or with one pooled variance), of one mean, or of paired columns.

Parties: sites and coordinator. Messages: two groups: those of ``statistics.group_by``; else one round, one
Sum, of the column's moments (of the pairs' differences), and a second one about the mean where the first
lost digits. The coordinator learns, of the cohort's total, counts, sums and squares of each group (each site's
under ``plain``), and how many have only one value of a pair. What too few people or mostly one person make is
withheld, and then nothing is tested; so are pairs where fewer than k people have only one value, as a column's
sum less that of the pairs would tell theirs. Threat model: as the plan's protection. Dropout: the test of the
survivors' rows. Cost: 57 bytes a site and round, or 50 for every group.

Sources: Student 1908; Welch 1947 (unequal variances, degrees of freedom); Cohen 1988, §2 (d).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any, Literal, Self

import numpy as np
import scipy
from pydantic import Field, model_validator

from atoll.contract.disclosure import TOP, Cells, largest
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, real, taken, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.group_by import group_moments
from atoll.statistics.moments import SLICE, add_largest
from atoll.statistics.noise import NOISED, NOTHING, coarse, fine, powers, reach, smallest

LOST = 1e-6
"""A variance below this share of the mean square is computed anew about the mean."""
VALUES = Cells("count", "withheld", values=("s1", "s2"), largest="top")
Sample = tuple[int, float, float, float]
"""(count, a point near the mean, the mean less that point, variance)."""


@program(
    "statistics.ttest",
    needs={"sum"},
    offers={"bounded", "resolution", "bounded-weight"},
    calls={"statistics.group_by"},
)
class TTest:
    """Two-group (Welch or pooled), one-sample or paired t-test, with effect size and confidence interval."""

    class Params(ProgramParams):
        """column: a numeric column. One of: by, a column with a code list, with groups, the two codes to compare
        (default: the list's two); mean, what the column's mean is compared with; paired, another column.
        equal_variance: pool the groups' variances. confidence: of the interval."""

        column: str
        by: str | None = None
        groups: tuple[int | float | str, int | float | str] | None = None
        mean: float | None = None
        paired: str | None = None
        equal_variance: bool = False
        alternative: Literal["two-sided", "less", "greater"] = "two-sided"
        confidence: float = Field(default=0.95, gt=0, lt=1)

        @model_validator(mode="after")
        def _one_question(self) -> Self:
            if sum(given is not None for given in (self.by, self.mean, self.paired)) != 1:
                raise ValueError("a t-test needs exactly one of by, mean and paired")
            if self.by is None and (self.groups is not None or self.equal_variance):
                raise ValueError("groups and equal_variance belong to by")
            return self

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"ttest": {"test", "column", "groups", "samples": [{"count", "mean", "std"}], "difference",
        "t", "df", "p_value", "confidence", "interval": [low, high], "cohens_d", "note"}}.

        difference: of the groups' means (first less second), from *mean*, or of the pairs; the interval is its
        own, None at an end that a one-sided test leaves open. Everything is None that is undefined or withheld.
        """
        asked = self.params
        samples: list[Sample | None] = []
        if asked.by is not None:
            pair = self._pair(cohort.schema, asked.by)
            found = yield from group_moments(cohort, (asked.by,), (asked.column,))
            for code in pair:
                g = found.keys.index((code,))
                n, *moments = (a[g, 0].item() for a in (found.count, found.center, found.offset, found.variance))
                samples.append(None if found.hidden[g, 0] else (n, moments[0], moments[1], moments[2]))
            test, groups = "pooled" if asked.equal_variance else "welch", list(pair)
        else:
            samples = [(yield from self._moments(cohort))]
            test, groups = "paired" if asked.paired else "one-sample", [asked.paired] if asked.paired else []
        told: dict[str, Any] = {"test": test, "column": asked.column, "by": asked.by, "groups": groups}
        told["samples"] = [_described(sample) for sample in samples]
        shown = ("difference", "t", "df", "p_value", "interval", "cohens_d")
        told |= dict.fromkeys(shown) | {"confidence": asked.confidence, "note": "" if cohort.exact else NOISED}
        known = [sample for sample in samples if sample is not None]
        if len(known) < len(samples):
            told["note"] = "withheld, so nothing is tested: too few people, or a few make most of the sum" + (
                ", or have only one value of the pair" if asked.paired else ""
            )
        elif min(sample[0] for sample in known) < 2:
            told["note"] = "too few values for a test"
        else:
            told |= self._tested(known)
        return {"ttest": told}

    def _pair(self, schema: TableSchema, by: str) -> tuple[Any, Any]:
        values = schema.columns[by].values if by in schema.columns else None
        pair = self.params.groups or values
        if values is None or pair is None or len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(values):
            raise PlanError(
                "plan.bad-column", "a t-test compares two codes of a column with a code list", field=by,
                remedy="name two of the column's codes as groups",
            )  # fmt: skip
        return pair[0], pair[1]

    def _tested(self, samples: list[Sample]) -> dict[str, Any]:
        (n, center, offset, variance), *others = samples
        if others:
            m, center2, offset2, variance2 = others[0]
            pooled = ((n - 1) * variance + (m - 1) * variance2) / (n + m - 2)
            difference, deviation = (center - center2) + (offset - offset2), math.sqrt(pooled)
            if self.params.equal_variance:
                error, df = math.sqrt(pooled * (1 / n + 1 / m)), float(n + m - 2)
            else:
                a, b = variance / n, variance2 / m
                error = math.sqrt(a + b)
                df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1)) if a + b else math.nan
        else:
            difference, deviation = (center - (self.params.mean or 0.0)) + offset, math.sqrt(variance)
            error, df = deviation / math.sqrt(n), float(n - 1)
        if not error:
            return {"difference": difference, "note": "values do not vary: t is undefined"}
        t, side, student = difference / error, self.params.alternative, scipy.stats.t
        tail = {"two-sided": 2 * student.sf(abs(t), df), "less": student.cdf(t, df), "greater": student.sf(t, df)}
        outer = (1 - self.params.confidence) / (2 if side == "two-sided" else 1)
        reach = float(student.isf(outer, df)) * error
        interval = [
            None if side == "less" else difference - reach,
            None if side == "greater" else difference + reach,
        ]
        effect = {"interval": interval, "cohens_d": difference / deviation}
        return {"difference": difference, "t": t, "df": df, "p_value": float(tail[side]), **effect}

    # ---------------------------------------------------------------- one sample, or pairs

    def _scale(self, schema: TableSchema) -> tuple[float, float]:
        """(middle, half) of the range of the column, or of the pairs' differences."""
        names = (self.params.column, *([self.params.paired] if self.params.paired else []))
        if bad := sorted(set(names) - set(schema.numeric_columns())):
            raise PlanError("plan.bad-column", "a t-test needs numeric columns of the schema", field=", ".join(bad))
        low, high = schema.columns[self.params.column].bounds()
        if self.params.paired:
            less, most = schema.columns[self.params.paired].bounds()
            low, high = low - most, high - less
        return (low + high) / 2, (high - low) / 2 or 1.0

    def _moments(self, cohort: Cohort) -> Generator[Any, Any, Sample | None]:
        (center, half), rows, sites = self._scale(cohort.schema), cohort.schema.max_rows, None
        for factor in (1, 2):
            steps = [fine(factor**i * rows, 20 * factor) if cohort.exact else coarse(1.0) for i in (1, 2)]
            fields = {
                "rows": count(bound=rows),
                "count": count(1, bound=rows),
                "s1": real(1, bound=factor * rows, step=steps[0]),
                "s2": real(1, bound=factor**2 * rows, step=steps[1]),
                "withheld": withheld(1),
                "single": count(2, bound=rows),
                "left_out": count(bound=1),
            }
            total = yield Round("moments", Sum(), fields, {"center": np.array([center])}, sites=sites)
            few = (total["single"] > 0) & (total["single"] < smallest(cohort))
            if VALUES.hidden(total, smallest(cohort)).any() or few.any() or total["left_out"]:
                return None
            sites, n = total.sites, max(int(total["count"][0]), 1)
            offset, square = half * float(total["s1"][0]) / n, half**2 * float(total["s2"][0]) / n
            if not cohort.exact:
                offset = min(max(offset, -half), half)
            spread = max(square - offset**2, 0.0)
            if not spread < LOST * square or not cohort.exact:
                break
            if factor == 1:
                center += offset
            else:
                spread = 0.0  # lost about the mean itself: rounding is all there is
        return int(total["count"][0]), center, offset, spread * n / max(n - 1, 1)

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        middle, half = self._scale(schema)
        center, ends = taken(sent, "center", (1,)), np.array([middle - half, middle + half])
        s1, s2 = powers(reach(ends[:1], ends[1:], center, np.array([half])))
        single = touches(1 if self.params.paired else 0)
        told = {"rows": touches(), "count": touches(), "s1": s1, "s2": s2, "withheld": NOTHING}
        return {**told, "single": single, "left_out": NOTHING}

    @handler("moments", groups=("rows",), cells=VALUES, record=_per_record)
    def moments(self, site: SiteView, task: Task) -> Reply:
        """At the site: count and moments of the column (or of the pairs' differences) about the centre sent, and
        how many rows have only the first, or the second, of a pair; nothing where these are few."""
        center, (_, half) = task.take("center", (1,)), self._scale(site.table.schema)
        column = site.table[self.params.column]
        other = site.table[self.params.paired] if self.params.paired else None
        counts, s1, s2, top = np.zeros(1, np.int64), np.zeros(1), np.zeros(1), np.zeros((1, TOP + 1))
        single = np.zeros(2, np.int64)
        for start in range(0, len(column), SLICE):
            part = slice(start, start + SLICE)
            values = column[part]
            if other is not None:
                known = ~np.isnan(values), ~np.isnan(other[part])
                single += (known[0] & ~known[1]).sum(), (known[1] & ~known[0]).sum()
                values = values - other[part]
            values = values[~np.isnan(values)]
            add_largest(top, largest(values))
            z = (values - center[0]) / half
            counts += len(z)
            s1 += z.sum()
            s2 += (z**2).sum()
            site.progress(min(part.stop, len(column)), len(column))
        told = {"rows": len(column), "count": counts, "s1": s1, "s2": s2, "top": top, "single": single}
        if other is not None and ((single > 0) & (single < site.min_group_size)).any():
            return {**{name: np.zeros_like(array) for name, array in told.items()}, "left_out": 1}
        return {**told, "left_out": 0}


def _described(sample: Sample | None) -> dict[str, Any]:
    if sample is None or not sample[0]:
        return {"count": None if sample is None else 0, "mean": None, "std": None}
    n, center, offset, variance = sample
    return {"count": n, "mean": center + offset, "std": math.sqrt(variance) if n > 1 else None}


__all__ = ["TTest"]
