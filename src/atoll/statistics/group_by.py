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

Moments are taken as in ``statistics.describe``: about the middle of the schema's range in units of half of
it, and about each group's own mean where that loses digits (Chan, Golub & LeVeque 1983, §1).
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
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, Yielded, count, real, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
LOST = 1e-6
"""A variance below this share of the mean square is computed anew about the mean."""
SLICE = 1 << 20
"""Rows looked at together."""
_VALUES = {"counts": "count", "withheld": "withheld", "values": ("s1", "s2"), "largest": "top"}
GROUPS = {n: Cells("rows", "rows_withheld", ("count", "s1", "s2"), tuple(range(n))) for n in (1, 2)}
VALUES = {n: Cells(**_VALUES, lines=tuple(range(n))) for n in (1, 2)}


@dataclass(frozen=True)
class GroupMoments:
    """What the groups hold; shapes are [groups] and [groups, columns].

    keys: each group's codes. A mean is center + offset: differences of means keep their digits when they are
    taken of both parts. rows_hidden, hidden: not to be reported.
    """

    keys: tuple[tuple[Any, ...], ...]
    rows: NDArray[np.int64]
    rows_hidden: Mask
    count: NDArray[np.int64]
    hidden: Mask
    center: Floats
    offset: Floats
    variance: Floats


class _GroupParams(ProgramParams):
    """by: one or two columns with a code list. columns: numeric columns (default: all others)."""

    by: tuple[str, ...] = Field(min_length=1, max_length=2)
    columns: tuple[str, ...] = ()


class _Grouping:
    """Both halves, for tables of one and of two code lists: the gate's lines are the code lists' axes."""


@program("statistics.group_by", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class GroupBy:
    """Count, sum, mean, variance of numeric columns in every group of one or two code lists, by one Sum."""
