"""A message that stands alone: some elements of one vector, each in few bits, and what is left of that by zstd.

    offset  size  what
    0       1     how places are written (``places.py``)
    1       1     how many bits a value has on its grid; 0: it is a float
    2       1     1: what follows the header is compressed by zstd
    3       1     zero
    4       4     how many values
    8       4     bytes of places
    12      4     bytes of values
    16      …     places, then values: floats' bytes, first all of the lowest, and so on (equal ones stand together);
                  or each bucket's scale (float32) and the packed grid places

The receiver knows the vector's size and form from the plan; whatever else a message says of itself is checked against
them before memory is allocated. Source of zstd: RFC 8878.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.compression import grid, places
from atoll.compression.half import Precision, halved, whole
from atoll.contract.bits import Bytes, pack, packed_bytes, unpack
from atoll.contract.errors import ProtocolError

HEAD = struct.Struct("<BBBBIII")
LEVEL = 3
"""Of zstd; higher ones gain little on such bytes."""


@dataclass(frozen=True, slots=True)
class Form:
    """How values are written. bits: on a grid. precision: else as such floats. words: else unchanged, as they lie in so
    many bytes. lossless: and by zstd, where that is less."""

    bits: int | None = None
    precision: Precision = "float32"
    words: int = 0
    lossless: bool = False

    def values_bytes(self, count: int) -> int:
        """Of *count* values."""
        if self.bits is not None:
            return 4 * -(-count // grid.BUCKET) + packed_bytes(count, self.bits)
        return count * (self.words or (4 if self.precision == "float32" else 2))

    def limit_bytes(self, count: int, size: int) -> int:
        """Most bytes that *count* values of [size] take."""
        return HEAD.size + places.longest(count, size) + self.values_bytes(count)


def encode(
    values: NDArray[Any], chosen: places.Indices, size: int, form: Form, random: np.random.Generator | None = None
) -> Bytes:
    """*values* [k] at the places *chosen* [k] of [size]. random: for the grid; None: to the nearest. With ``words``,
    values are unsigned integers of so many bytes."""
    manner, where = places.written(chosen, size)
    if form.bits is not None:
        numbers, scales = grid.quantised(values, form.bits, random)
        what = np.concatenate([scales.astype("<f4").view(np.uint8), pack(numbers, form.bits)])
    else:
        words = values if form.words else halved(values, form.precision)
        little = np.ascontiguousarray(words, words.dtype.newbyteorder("<"))
        what = little.view(np.uint8).reshape(len(values), little.itemsize).T.reshape(-1)
    body, less = np.concatenate([where, what]), b""
    if form.lossless:
        less = pa.Codec("zstd", LEVEL).compress(body.tobytes(), asbytes=True)
    smaller = form.lossless and len(less) < len(body)
    head = HEAD.pack(
        places.MANNERS.index(manner), form.bits or 0, smaller, 0, len(values), len(where), len(what)
    )  # fmt: skip
    return np.frombuffer(head + (less if smaller else body.tobytes()), np.uint8)


def decode(data: NDArray[Any], size: int, form: Form, most: int | None = None) -> tuple[places.Indices, NDArray[Any]]:
    """(places [k], values [k]) of a message made by anybody. most: values that it may hold. Raises ProtocolError."""
    if data.dtype != np.uint8 or data.ndim != 1 or len(data) < HEAD.size:
        raise _malformed()
    manner, bits, compressed, zero, count, where, what = HEAD.unpack(data[: HEAD.size].tobytes())
    limit = size if most is None else most
    if manner >= len(places.MANNERS) or bits != (form.bits or 0) or compressed > form.lossless or zero or count > limit:
        raise _malformed()
    if what != form.values_bytes(count) or where > places.longest(count, size):
        raise _malformed()
    body = data[HEAD.size :]
    if compressed:
        try:
            with pa.CompressedInputStream(pa.py_buffer(body.tobytes()), "zstd") as stream:
                body = np.frombuffer(stream.read(where + what + 1), np.uint8)
        except (OSError, pa.ArrowException):
            raise _malformed() from None
    if len(body) != where + what:
        raise _malformed()
    chosen = places.read(places.MANNERS[manner], body[:where], count, size)
    return chosen, _values(body[where:], count, form)


def _values(data: Bytes, count: int, form: Form) -> NDArray[Any]:
    if form.bits is not None:
        ends = 4 * -(-count // grid.BUCKET)
        scales, numbers = data[:ends].copy().view("<f4"), unpack(data[ends:], count, form.bits)
        if not np.isfinite(scales).all() or (numbers > 2 * grid.levels(form.bits)).any():
            raise _malformed()
        return grid.restored(numbers, scales.astype(np.float32), form.bits)
    width = form.values_bytes(1)
    words = np.ascontiguousarray(data.reshape(width, count).T).reshape(-1)
    if form.words:
        return words.view(f"<u{form.words}")
    told = whole(words.view("<f4" if form.precision == "float32" else "<u2"), form.precision)
    if not np.isfinite(told).all():
        raise _malformed()
    return told


def _malformed() -> ProtocolError:
    return ProtocolError(
        "compression.malformed", "a compressed message is not as the plan's compression makes it", field="coded",
        remedy="use the same Atoll version at both ends",
    )  # fmt: skip
