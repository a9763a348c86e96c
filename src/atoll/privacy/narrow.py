"""Reals on a coarse grid as whole numbers in few bits: how ``plain`` sends a field whose declared step is coarse.

A field qualifies when ±bound is at most 2³² steps wide, so that both sides know it from the declaration. Its values are
then multiples of the step; if they have a common factor (a site's weight, mostly), they are divided by it first. What
is off the grid by more than a millionth of a step travels as it is. So nothing is rounded beyond that.

    offset  size  what
    0       1     bits of each number; 0: the values follow as they are
    1       8     the common factor, unsigned
    9       …     the numbers, each with half of 2^bits added, packed; or the values
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import numpy as np

from atoll.contract.bits import Bytes, pack, packed_bytes, unpack
from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import Field
from atoll.contract.wire import Array

HEAD = struct.Struct("<BQ")
FEWEST = 64
"""Values below which a field travels as it is."""
WIDEST_BITS = 32
PIECE = 1 << 18
"""Numbers that are read at a time; a multiple of 8, so that every piece ends with a whole byte."""
NEAR = 1e-6


def narrow(field: Field) -> bool:
    """Does *field* travel as :func:`encode` writes it?"""
    if field.dtype[1] != "f" or None in field.shape or not field.bound or not field.step:
        return False
    steps = field.bound / field.step
    return math.prod(int(n or 0) for n in field.shape) >= FEWEST and _bits(steps) < min(
        WIDEST_BITS + 1, 8 * int(field.dtype[2:])
    )


def declared(field: Field) -> Field:
    """What travels in a narrow *field*'s place."""
    return Field("|u1", (None,), 255, 1, limit_bytes=HEAD.size + field.size_bytes)


def encode(values: Array, field: Field) -> Bytes:
    """A narrow *field*'s values, within its bound."""
    flat, step = np.ascontiguousarray(values, field.dtype).reshape(-1), float(field.step or 1)
    scaled = flat.astype(np.float64) / step
    whole = np.rint(scaled)
    if np.abs(scaled - whole).max(initial=0) > NEAR:
        return np.frombuffer(HEAD.pack(0, 0) + flat.astype(flat.dtype.newbyteorder("<")).tobytes(), np.uint8)
    numbers = whole.astype(np.int64)
    factor = max(int(np.gcd.reduce(np.abs(numbers))), 1)
    numbers //= factor
    bits = _bits(float(np.abs(numbers).max(initial=0)))
    shifted = (numbers + (1 << bits - 1)).astype(np.uint64)
    return np.concatenate([np.frombuffer(HEAD.pack(bits, factor), np.uint8), pack(shifted, bits)])


def decode(data: Array, field: Field) -> Iterator[tuple[int, Array]]:
    """Inverse of :func:`encode`, in flat pieces: (offset in elements, piece), so that memory is of one. Raises
    ProtocolError for what it does not make."""
    size = math.prod(int(n or 0) for n in field.shape)
    bits, factor = HEAD.unpack(data[: HEAD.size].tobytes()) if len(data) >= HEAD.size else (255, 0)
    body = data[HEAD.size :]
    plain = bits == 0 and len(body) == field.size_bytes
    if not plain and (not 0 < bits <= WIDEST_BITS + 1 or len(body) != packed_bytes(size, bits)):
        raise ProtocolError("reply.shape", "a packed field is not of the size that it says", field="bits")
    width = 8 * field.size_bytes // max(size, 1) if plain else bits
    for start in range(0, size, PIECE):
        here = min(PIECE, size - start)
        part = body[start * width // 8 :][: packed_bytes(here, width)]
        if plain:
            yield start, np.frombuffer(part.tobytes(), field.dtype)
        else:
            numbers = unpack(part, here, bits).astype(np.int64) - (1 << bits - 1)
            yield start, numbers * float(factor) * float(field.step or 1)


def _bits(most: float) -> int:
    """Of whole numbers within ±most, at least 1."""
    return max(1, math.ceil(math.log2(2 * math.floor(most + NEAR) + 1)))
