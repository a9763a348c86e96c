"""Rows that repeat an earlier one, by 64-bit hashes: no row is ever compared as it is, and no pair of rows is tried.

At ten million rows there is a chance of 3e-6 that two unlike rows count as alike. Source of the mixer: Steele, Lea &
Flood 2014, Fast Splittable Pseudorandom Number Generators (splitmix64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.program import TableView


def duplicates(table: TableView) -> int:
    """Rows that repeat an earlier row in every column (missing cells are alike), by 64-bit hashes."""
    hashes = np.zeros(len(table), np.uint64)
    for name, column in table.schema.columns.items():
        if column.role != "ignore":
            for start, bits in _bits(table, name):
                part = hashes[start : start + len(bits)]
                part *= np.uint64(0x9E3779B97F4A7C15)
                part ^= bits
                for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's mixer
                    part ^= part >> np.uint64(shift)
                    part *= np.uint64(factor)
                part ^= part >> np.uint64(31)
                part += np.uint64(0x9E3779B97F4A7C15)
    hashes.sort()
    return int((hashes[1:] == hashes[:-1]).sum())


def _bits(table: TableView, name: str, size: int = 1 << 20) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """(first row, cells as 64 bits, alike where cells are) of one column, batch by batch."""
    column = table.schema.columns[name]
    seen: dict[Any, int] = {}
    cells = table.codes(name) if column.dtype == "text" and column.values is not None else table[name]
    if column.dtype == "image":
        width = math.prod(column.shape or (1,))
        size = max(size // width, 1)
        mixers = np.random.Generator(np.random.Philox(key=1)).integers(1, 2**64, width, np.uint64, endpoint=False)
    for start in range(0, len(cells), size):
        batch = cells[start : start + size]
        if column.dtype == "image":
            bits = batch.reshape(len(batch), -1).astype(np.uint64) @ mixers
        elif batch.dtype == object:
            bits = np.fromiter((seen.setdefault(cell, len(seen)) for cell in batch), np.uint64, len(batch))
        elif batch.dtype.kind == "f":
            bits = np.where(np.isnan(batch), np.nan, batch + 0.0).view(np.uint64)  # one NaN, and no −0
        else:
            bits = batch.astype(np.int64).view(np.uint64)
        yield start, bits
