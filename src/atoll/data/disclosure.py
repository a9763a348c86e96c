"""How well a table hides the people in it: the k of k-anonymity and the l of l-diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def classes(columns: Mapping[str, Sequence[Any] | NDArray[Any]]) -> NDArray[np.int64]:
    """Which rows are equal in all *columns* (missing equals missing): their class, 0, 1 …, [num_rows]."""
    found: NDArray[np.int64] | None = None
    for column in columns.values():
        cells = np.asarray(column)
        if cells.dtype == object:  # text: None has no place in an order
            place = {cell: i for i, cell in enumerate(dict.fromkeys(cells.tolist()))}
            codes = np.fromiter((place[cell] for cell in cells.tolist()), np.int64, len(cells))
        else:
            _, codes = np.unique(cells, return_inverse=True, equal_nan=True)
        if found is None:
            found = codes
        else:
            _, found = np.unique(found * (codes.max(initial=0) + 1) + codes, return_inverse=True)
    return np.zeros(0, np.int64) if found is None else found


def achieved_k(columns: Mapping[str, Sequence[Any] | NDArray[Any]]) -> int:
    """The size of the smallest class of rows that are equal in all *columns*, the quasi-identifiers (Sweeney
    2002); 0 without rows."""
    sizes = np.bincount(classes(columns))
    return int(sizes.min()) if len(sizes) else 0


def achieved_l(columns: Mapping[str, Sequence[Any] | NDArray[Any]], sensitive: Sequence[Any] | NDArray[Any]) -> int:
    """The fewest different values of *sensitive* in any class of rows that are equal in all *columns*
    (distinct l-diversity, Machanavajjhala et al. 2007); missing is no value. 0 without rows."""
    found = classes(columns)
    if not len(found):
        return 0
    codes, values = classes({"sensitive": sensitive}), np.asarray(sensitive)
    missing = np.array([cell is None for cell in values]) if values.dtype == object else values != values
    size = codes.max() + 1
    pairs = np.unique((found * size + codes)[~missing])
    return int(np.bincount(pairs // size, minlength=found.max() + 1).min())
