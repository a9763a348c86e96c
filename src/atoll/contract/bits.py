"""Whole numbers in as few bits as they need, side by side in bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import ProtocolError

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.uint64]
WIDEST = 64
PIECE = 1 << 15
"""Numbers at a time; a multiple of 8, so that every piece ends with a whole byte."""


def packed_bytes(count: int, width: int) -> int:
    """How many bytes *count* numbers of *width* bits take."""
    return -(-count * width // 8)


def pack(numbers: NDArray[np.unsignedinteger], width: int) -> Bytes:
    """*numbers* [k], each below 2^width, as [packed_bytes(k, width)]: the most significant bit first. Higher bits than
    these are lost."""
    if width in (8, 16, 32, 64):
        return np.ascontiguousarray(numbers, f">u{width // 8}").view(np.uint8)
    out, shifts = np.empty(packed_bytes(len(numbers), width), np.uint8), np.arange(width)[::-1].astype(np.uint64)
    for start in range(0, len(numbers), PIECE):
        piece = numbers[start : start + PIECE].astype(np.uint64)
        bits = (piece[:, None] >> shifts & np.uint64(1)).astype(np.uint8)
        first = start * width // 8
        out[first : first + packed_bytes(len(piece), width)] = np.packbits(bits)
    return out


def unpack(data: Bytes, count: int, width: int) -> Numbers:
    """Inverse of :func:`pack`, [count]. Raises ProtocolError where *data* is not of the size, or is not as
    :func:`pack` makes it."""
    spare = 8 * len(data) - count * width
    if not 0 <= width <= WIDEST or data.shape != (packed_bytes(count, width),) or (spare and data[-1] % (1 << spare)):
        raise ProtocolError("wire.bad-size", "packed numbers are not of the size that they say", field="bits")
    if width in (8, 16, 32, 64):
        return data.view(f">u{width // 8}").astype(np.uint64)
    out, weights = np.empty(count, np.uint64), np.uint64(1) << np.arange(width)[::-1].astype(np.uint64)
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        first = start * width // 8
        bits = np.unpackbits(data[first : first + packed_bytes(size, width)])[: size * width]
        out[start : start + size] = (bits.reshape(size, width) * weights).sum(axis=1, dtype=np.uint64)
    return out
