"""Group-by: count, sum, mean, variance of numeric columns in the groups that one or two code lists make.

Parties: sites and coordinator. Messages: one round, one Sum; a second one, about the means, where
a group's spread is so small that the first lost digits. The coordinator learns, of the cohort's total,
each group's rows and each column's count, sum and squares within it; under ``plain`` each site's. A
group of fewer than k people is withheld, with all of its columns; so is, for one column, a group with
fewer than k values or where a few people make most of the column's sum; and as totals over all groups are
known, so are the next smallest groups, until subtracting tells nothing. Rows without a code are a
group of their own (key None), as they are part of those totals. Threat model: as the plan's protection.
Dropout: the statistics of the survivors; a site absent from the first round is not asked in the second.
Cost: 8 bytes a group, and 25 bytes a group and column, a round and site.

Moments are taken about the middle of the schema's range (``moments.py``), and about each group's own mean where that
loses digits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import TOP, Cells, largest
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program, relay
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, real, taken, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.moments import LOST, SLICE, add_largest, ranges
from atoll.statistics.noise import NOTHING, coarse, fine, powers, reach, smallest

Floats = NDArray[np.float64]
GROUPS = Cells("rows", "rows_withheld", values=("count", "s1", "s2"), lines=(0, 1))
VALUES = Cells("count", "withheld", values=("s1", "s2"), lines=(0, 1), largest="top")
"""A group that is withheld takes its columns with it; then each column is judged by its own counts."""


@dataclass(frozen=True)
class GroupMoments:
    """What the groups hold; shapes are [groups], or [groups, columns] for moments.

    keys: each group's codes, None where missing. A mean is center + offset: a difference of means keeps its
    digits when it is taken of both parts. rows_hidden, hidden: not to be reported. variance: with n − 1.
    """

    keys: tuple[tuple[Any, ...], ...]
    columns: tuple[str, ...]
    rows: NDArray[np.int64]
    rows_hidden: NDArray[np.bool_]
    count: NDArray[np.int64]
    hidden: NDArray[np.bool_]
    center: Floats
    offset: Floats
    variance: Floats


@program("statistics.group_by", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class GroupBy:
    """Count, sum, mean and variance of numeric columns in every group of one or two code lists, by Sum."""

    class Params(ProgramParams):
        """by: one or two columns with a code list. columns: numeric columns (default: all others)."""

        by: tuple[str, ...] = Field(min_length=1, max_length=2)
        columns: tuple[str, ...] = ()

    def __init__(self, params: Params) -> None:
        self.params = params

    def _columns(self, schema: TableSchema) -> tuple[str, ...]:
        by = self.params.by
        if bad := [n for n in by if n not in schema.columns or schema.columns[n].values is None]:
            raise PlanError(
                "plan.bad-column", "groups are made by columns with a code list", field=", ".join(bad),
                remedy="list the column's values in the schema, or bin it in the recipe",
            )  # fmt: skip
        numeric = schema.numeric_columns()
        names = self.params.columns or tuple(n for n in numeric if n not in by)
        if bad := sorted(set(names) - set(numeric)):
            raise PlanError("plan.bad-column", "group_by needs numeric columns of the schema", field=", ".join(bad))
        return names

    def _shape(self, schema: TableSchema) -> tuple[int, int]:
        """Groups along each code list, the last being that of missing codes; one column of them for one list."""
        sizes = [len(schema.columns[name].values or ()) + 1 for name in self.params.by]
        return sizes[0], sizes[1] if len(sizes) > 1 else 1

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"group_by": {"by", "columns", "groups": [{"key": [codes], "count", "columns": {name: {"count",
        "sum", "mean", "variance", "std"}}}], "notes"}}.

        Groups are in the order of the code lists. What is withheld is None, and so are a mean of no values and
        a variance of fewer than two. Groups of rows without a code (key None) are told only if there are any.
        """
        found = yield from self.summarised(cohort)
        groups = []
        for g, key in enumerate(found.keys):
            if None in key and not found.rows[g] and not found.rows_hidden[g]:
                continue
            n = None if found.rows_hidden[g] else int(found.rows[g])
            columns = {name: _reported(found, g, c, smallest(cohort)) for c, name in enumerate(found.columns)}
            groups.append({"key": list(key), "count": n, "columns": columns})
        notes = []
        if hidden := sum(group["count"] is None for group in groups):
            notes.append(f"{hidden} groups are withheld: they are too small, or would tell one that is")
        if hidden := int((found.hidden & ~found.rows_hidden[:, None]).sum()):
            notes.append(
                f"{hidden} groups' values of a column are withheld: too few, or a few people make most of them"
            )
        told = {"by": list(self.params.by), "columns": list(found.columns), "groups": groups, "notes": notes}
        return {"group_by": told}

    def summarised(self, cohort: Cohort) -> Generator[Any, Any, GroupMoments]:
        """The rounds, and what they found."""
        schema, names = cohort.schema, self._columns(cohort.schema)
        shape, p, rows = self._shape(schema), len(names), schema.max_rows
        middle, half = ranges(schema, names)
        center, sites = np.broadcast_to(middle, (*shape, p)), None
        for factor in (1, 2):  # values are within half of the middle, and within two halves of any mean
            steps = [fine(factor**i * rows, 20 * factor) if cohort.exact else coarse(1.0) for i in (1, 2)]
            fields = {
                "all_rows": count(bound=rows),
                "rows": count(shape, bound=rows),
                "rows_withheld": withheld(shape),
                "count": count((*shape, p), bound=rows),
                "s1": real((*shape, p), bound=factor * rows, step=steps[0]),
                "s2": real((*shape, p), bound=factor**2 * rows, step=steps[1]),
                "withheld": withheld((*shape, p)),
            }
            total = yield Round("moments", Sum(), fields, {"center": np.ascontiguousarray(center)}, sites=sites)
            sites, counts = total.sites, total["count"]
            rows_hidden = GROUPS.hidden(total, smallest(cohort))
            left = {"withheld": total["withheld"] | rows_hidden[..., None], "count": counts}
            hidden = VALUES.hidden(left, smallest(cohort)) | rows_hidden[..., None]
            n = np.maximum(counts, 1)
            offset, square = half * total["s1"] / n, half**2 * total["s2"] / n
            if not cohort.exact:
                offset = np.clip(offset, -half, half)
            spread = np.maximum(square - offset**2, 0.0)
            lost = (counts > 1) & ~hidden & (spread < LOST * square) & cohort.exact
            if factor == 2 or not lost.any():
                break
            center = np.where((counts > 0) & ~hidden, center + offset, middle)
        spread = np.where(lost, 0.0, spread)  # lost about the mean itself: rounding is all there is
        values = [[*(schema.columns[name].values or ()), None] for name in self.params.by]
        keys = (
            tuple((a, b) for a in values[0] for b in values[1]) if len(values) > 1 else tuple((a,) for a in values[0])
        )
        return GroupMoments(
            keys=keys,
            columns=names,
            rows=total["rows"].reshape(-1),
            rows_hidden=rows_hidden.reshape(-1),
            count=counts.reshape(-1, p),
            hidden=hidden.reshape(-1, p),
            center=center.reshape(-1, p),
            offset=offset.reshape(-1, p),
            variance=(spread * n / np.maximum(n - 1, 1)).reshape(-1, p),
        )

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        """A record is in one group; *center* may differ between groups."""
        names, shape = self._columns(schema), self._shape(schema)
        middle, half = ranges(schema, names)
        center = taken(sent, "center", (*shape, len(names))).reshape(-1, len(names))
        s1, s2 = powers(reach(middle - half, middle + half, center, half))
        told = {"all_rows": touches(), "rows": touches(), "count": touches(len(names)), "s1": s1, "s2": s2}
        return {**told, "rows_withheld": NOTHING, "withheld": NOTHING}

    @handler("moments", groups=("all_rows",), cells=(GROUPS, VALUES), record=_per_record)
    def moments(self, site: SiteView, task: Task) -> Reply:
        """At the site: each group's rows, and each column's count and moments in it about the centre sent."""
        table = site.table
        names, shape = self._columns(table.schema), self._shape(table.schema)
        size, p = shape[0] * shape[1], len(names)
        center = task.take("center", (*shape, p)).reshape(size, p)
        _, half = ranges(table.schema, names)
        codes = [table.codes(name) for name in self.params.by]
        rows, counts = np.zeros(size, np.int64), np.zeros((size, p), np.int64)
        s1, s2, top = np.zeros((size, p)), np.zeros((size, p)), np.zeros((size, p, TOP + 1))
        starts = range(0, len(table), SLICE)
        for c, name in enumerate(names or ("",)):
            column = table[name] if name else np.empty(0)
            for start in starts:
                part = slice(start, start + SLICE)
                cell = np.where(codes[0][part] < 0, shape[0] - 1, codes[0][part]).astype(np.int64)
                if len(codes) > 1:
                    cell = cell * shape[1] + np.where(codes[1][part] < 0, shape[1] - 1, codes[1][part])
                if c == 0:
                    rows += np.bincount(cell, minlength=size)
                if not name:
                    continue
                values = column[part]
                known = ~np.isnan(values)
                values, cell = values[known], cell[known]
                z = (values - center[cell, c]) / half[c]
                counts[:, c] += np.bincount(cell, minlength=size)
                s1[:, c] += np.bincount(cell, z, size)
                s2[:, c] += np.bincount(cell, z**2, size)
                add_largest(top[:, c], largest(values, cell, size))
            site.progress(c + 1, max(p, 1))
        told = {"count": counts, "s1": s1, "s2": s2}
        return {
            "all_rows": len(table),
            "rows": rows.reshape(shape),
            "top": top.reshape(*shape, p, TOP + 1),
            **{field: array.reshape(*shape, p) for field, array in told.items()},
        }


def _reported(found: GroupMoments, group: int, column: int, smallest: int) -> dict[str, Any]:
    """Count and sum are left out where they would tell that too few of the group's rows have no value."""
    n = int(found.count[group, column])
    few = 0 < found.rows[group] - n < smallest and not found.rows_hidden[group]
    if found.hidden[group, column]:
        return dict.fromkeys(("count", "sum", "mean", "variance", "std"))
    center, offset = float(found.center[group, column]), float(found.offset[group, column])
    variance = float(found.variance[group, column]) if n > 1 else None
    return {
        "count": None if few else n,
        "sum": None if few else n * (center + offset) if n else 0.0,
        "mean": center + offset if n else None,
        "variance": variance,
        "std": None if variance is None else math.sqrt(variance),
    }


def group_moments(cohort: Cohort, by: tuple[str, ...], columns: tuple[str, ...]) -> Generator[Any, Any, GroupMoments]:
    """The groups' moments by ``yield from``, for a program with ``calls={"statistics.group_by"}``."""
    params = GroupBy.Params(by=by, columns=columns)
    told = params.model_dump(mode="json")
    steps = relay(
        GroupBy(params).summarised(cohort), lambda asked: replace(asked, program="statistics.group_by", params=told)
    )
    found: GroupMoments = yield from steps
    return found


__all__ = ["GroupBy", "GroupMoments", "group_moments"]
