"""Moments of columns, about a centre and in units of half the schema's range.

So that bounds and resolution are known before any value is seen, and shifted data keep their digits (Chan, Golub &
LeVeque 1983, §1): for ``describe``, ``group_by`` and ``correlation``, which ask anew, about the mean, where the first
answer lost digits (the corrected two-pass algorithm, ibid.).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from atoll.contract.disclosure import TOP
from atoll.contract.schema import TableSchema

Floats = NDArray[np.float64]
LOST = 1e-6
"""A variance below this share of the mean square has lost digits."""

SLICE = 1 << 20
"""Rows looked at together, so that a large column needs little memory."""


def ranges(schema: TableSchema, names: Iterable[str]) -> tuple[Floats, Floats]:
    """(middle, half) of each column's range, each [num_columns]; half is 1 where there is one value only."""
    low, high = np.array([schema.columns[name].bounds() for name in names], float).reshape(-1, 2).T
    return (low + high) / 2, np.where(high > low, (high - low) / 2, 1.0)


def add_largest(known: Floats, more: Floats) -> None:
    """Into *known*, what ``contract.disclosure.largest`` found among other rows: both are [size, TOP + 1]."""
    both = np.concatenate([known[:, :TOP], more[:, :TOP]], axis=1)
    known[:, TOP] += more[:, TOP]
    known[:, :TOP] = np.sort(both, axis=1)[:, : -TOP - 1 : -1]
