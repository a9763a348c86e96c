"""What a site can say of its rows' quality by itself, before anybody asks: missing cells, repeats, outliers."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from atoll.contract.program import TableView
from atoll.statistics.duplicates import duplicates

FLOOR = 0.01
"""The least that a component of quality counts as, so that one of zero does not silence a site."""
OUTLIER = 4.0
"""Values farther from the median than so many robust standard deviations are outliers."""
NORMAL_IQR = 1.349
"""The interquartile range of a normal distribution, in standard deviations."""


def own_quality(table: TableView) -> float:
    """What a site can say of its rows by itself, in [FLOOR, 1]: the geometric mean of completeness, uniqueness and
    plausibility, the last by its own quartiles. No rows: FLOOR."""
    if not len(table):
        return FLOOR
    names = [name for name, column in table.schema.columns.items() if column.role != "ignore"]
    plain = {name for name in table.schema.numeric_columns() if table.schema.columns[name].values is None}
    shares = {"plausibility": [], "completeness": [1 - missing_cells(table, name) / len(table) for name in names]}
    for name in sorted(plain & set(names)):
        values = table[name][~np.isnan(table[name])]
        lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else np.zeros(3)
        if upper > lower:
            reach = OUTLIER * (upper - lower) / NORMAL_IQR
            shares["plausibility"].append(float((np.abs(values - median) <= reach).mean()))
    shares["uniqueness"] = [1 - duplicates(table) / len(table)]
    means = [max(float(np.mean(found)), FLOOR) for found in shares.values() if found]
    return math.exp(math.fsum(map(math.log, means)) / len(means))


def completeness(table: TableView, withheld: Collection[str] = ()) -> float:
    """Share of the cells in feature columns (but those *withheld*) that are not missing, in [FLOOR, 1], to two digits:
    so little that it tells of no single row. No cells: 1."""
    columns = table.schema.columns.items()
    names = [name for name, column in columns if column.role == "feature" and name not in withheld]
    missing = sum(missing_cells(table, name) for name in names)
    return max(round(1 - missing / max(len(names) * len(table), 1), 2), FLOOR)


def missing_cells(table: TableView, name: str) -> int:
    """Missing cells of one column."""
    column = table.schema.columns[name]
    if column.dtype == "image":
        return 0
    if column.dtype == "text" and column.values is not None:
        return int((table.codes(name) < 0).sum())
    cells = table[name]
    if column.numeric:
        return int(np.isnan(cells).sum())
    return sum(cell is None for cell in cells) if column.dtype == "text" else int(np.isnat(cells).sum())
