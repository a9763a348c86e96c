"""Which elements of a vector: their places in about a byte each, or a bit for every element, whichever is less.

A gap is how many elements lie between one place and the next. It is written as bytes of 255, and one that is less.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atoll.contract.bits import Bytes
from atoll.contract.errors import ProtocolError

Indices = NDArray[np.int64]
Manner = Literal["all", "mask", "gaps"]
MANNERS: tuple[Manner, ...] = ("all", "mask", "gaps")


def largest(values: NDArray[np.floating], count: int) -> Indices:
    """The places of the *count* largest of |values|, [count], in order; of equal ones the first. Aji & Heafield 2017,
    Sparse Communication for Distributed Gradient Descent, §3."""
    sizes = np.abs(values)
    if count >= len(sizes) or count == 0:
        return np.arange(count and len(sizes))
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    chosen = sizes > least
    chosen[np.flatnonzero(sizes == least)[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def written(places: Indices, size: int) -> tuple[Manner, Bytes]:
    """*places* [k] of [size], strictly ascending, and the manner they are written in."""
    if len(places) == size:
        return "all", np.zeros(0, np.uint8)
    gaps = np.diff(places, prepend=-1) - 1
    long = gaps // 255
    if len(places) + int(long.sum()) >= -(-size // 8):
        mask = np.zeros(size, bool)
        mask[places] = True
        return "mask", np.packbits(mask)
    out = np.full(len(places) + int(long.sum()), 255, np.uint8)
    out[np.cumsum(long + 1) - 1] = gaps % 255
    return "gaps", out


def longest(count: int, size: int) -> int:
    """Most bytes that *count* places of [size] take."""
    return 0 if count == size else min(-(-size // 8), count + size // 255)


def read(manner: Manner, data: Bytes, count: int, size: int) -> Indices:
    """Inverse of :func:`written`; raises ProtocolError for anything else than *count* places of [size]."""
    found: Indices = np.arange(size)
    if manner == "mask" and len(data) == -(-size // 8):
        bits = np.unpackbits(data)
        found = np.flatnonzero(bits) if not bits[size:].any() else found[:0]
    elif manner == "gaps":
        ends = np.flatnonzero(data != 255)
        found = np.cumsum(data.astype(np.int64))[ends] + np.arange(len(ends))
        if len(data) and data[-1] == 255:
            found = found[:0]
    elif manner != "all" or len(data):
        found = found[:0]
    if len(found) != count or (count and found[-1] >= size):
        raise ProtocolError("compression.malformed", "a message does not say which values it holds", field="places",
                            remedy="use the same Atoll version at both ends")  # fmt: skip
    return found
