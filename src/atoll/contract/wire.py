"""The wire format: a versioned header, then raw little-endian array buffers.

    offset  size  what
    0       4     magic  b"ATOL"
    4       2     version, little-endian unsigned (1)
    6       2     reserved, zero
    8       4     header_bytes, at most HEADER_LIMIT_BYTES
    12      8     body_bytes
    20      …     header: JSON {"kind", "meta", "arrays": [[name, dtype, shape], …]}
    …       …     zero padding to a multiple of 8, then each array in C order, each padded to 8

Everything a buffer claims is checked against everything else *before* memory is
allocated for it; nothing is ever unpickled. Decoding is zero-copy: arrays are
read-only views of the received buffer.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import ProtocolError

Array = NDArray[Any]
Json = Any

MAGIC = b"ATOL"
VERSION = 1
PREFIX = struct.Struct("<4sHHIQ")
HEADER_LIMIT_BYTES = 4 << 20
ALIGN = 8
MAX_DIMENSIONS = 8
DTYPES = frozenset({"<f2", "<f4", "<f8", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "|i1", "|u1", "|b1"})


_IN_ORDER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_CANONICAL = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, sort_keys=True)


def canonical_json(value: Json) -> bytes:
    """The one spelling of *value* that is hashed and signed (sorted keys, no spaces, no NaN).

    Raises ValueError for NaN or infinity and TypeError for what JSON cannot say.
    """
    return _CANONICAL.encode(value).encode()


def to_json(value: Json) -> bytes:
    """*value* as JSON in its own order (a schema's columns have one). Raises like :func:`canonical_json`."""
    return _IN_ORDER.encode(value).encode()


def _no_constants(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


_STRICT = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constants)


def parse_json(data: bytes) -> Json:
    """Parse strict JSON, so that it can be said again; raises ProtocolError for anything else
    (bad UTF-8, half a surrogate pair, NaN, numbers that overflow, deep nesting)."""
    try:
        text = data.decode("utf-8")
        value = _STRICT.decode(text)
        if "\\u" in text:
            to_json(value)  # raises for half a surrogate pair
        return value
    except (ValueError, RecursionError):
        raise ProtocolError(
            "wire.bad-header", "a message header is not valid JSON", remedy="use the same Atoll version at both ends"
        ) from None


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """What a header says of one array: its name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype[2:])


@dataclass(frozen=True, slots=True)
class Message:
    """One message between parties. Arrays are little-endian and C-contiguous once encoded."""

    kind: str
    meta: dict[str, Json] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """A checked header: what the body will hold, before any of it is read."""

    kind: str
    meta: dict[str, Json]
    specs: tuple[ArraySpec, ...]
    body_offset: int
    body_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.body_offset + self.body_bytes


def padded(size: int) -> int:
    """*size* rounded up to the alignment."""
    return -(-size // ALIGN) * ALIGN


def body_parts(arrays: Mapping[str, Array]) -> tuple[list[list[Json]], list[memoryview | bytes]]:
    """The specs of *arrays* and their buffers, without copying contiguous little-endian arrays."""
    specs: list[list[Json]] = []
    parts: list[memoryview | bytes] = []
    for name, value in arrays.items():
        array = np.asarray(value)
        if array.dtype.str not in DTYPES or not array.flags.c_contiguous:
            array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
        dtype, size = array.dtype.str, array.nbytes
        if dtype not in DTYPES:
            raise ProtocolError("wire.bad-dtype", f"arrays of dtype {array.dtype} cannot be sent", field=name)
        if array.ndim > MAX_DIMENSIONS:
            raise ProtocolError("wire.bad-array", f"arrays of {array.ndim} dimensions cannot be sent", field=name)
        specs.append([name, dtype, list(array.shape)])
        if size:
            parts.append(array.reshape(-1).view(np.uint8).data)
            if size % ALIGN:
                parts.append(bytes(ALIGN - size % ALIGN))
    return specs, parts


def encode(message: Message) -> list[memoryview | bytes]:
    """The message as buffers to be sent one after another; array data is not copied.

    Raises ProtocolError when a dtype or the header's size is not allowed.
    """
    specs, parts = body_parts(message.arrays)
    header = to_json({"kind": message.kind, "meta": message.meta, "arrays": specs})
    if len(header) > HEADER_LIMIT_BYTES:
        raise ProtocolError("wire.header-too-large", "a message header exceeds 4 MiB", field=message.kind)
    start = PREFIX.size + len(header)
    prefix = PREFIX.pack(MAGIC, VERSION, 0, len(header), sum(len(part) for part in parts))
    return [prefix + header + bytes(padded(start) - start), *parts]


def encode_bytes(message: Message) -> bytes:
    """The message as one bytes object."""
    return b"".join(encode(message))


def _bad(code: str, text: str) -> ProtocolError:
    return ProtocolError(code, text, remedy="use the same Atoll version at both ends")


def head_bytes(prefix: bytes | memoryview) -> int:
    """How many bytes, from the start, prefix and header take together (with padding).

    prefix: at least the first 20 bytes. Raises ProtocolError if they are not a prefix.
    """
    if len(prefix) < PREFIX.size:
        raise _bad("wire.truncated", "a message is shorter than its prefix")
    magic, version, reserved, header_bytes, _ = PREFIX.unpack_from(prefix)
    if magic != MAGIC:
        raise _bad("wire.bad-magic", "a message does not start with the Atoll mark")
    if version != VERSION or reserved:
        raise _bad("wire.bad-version", f"wire version {version} is not {VERSION}")
    if header_bytes > HEADER_LIMIT_BYTES:
        raise _bad("wire.header-too-large", "a message header exceeds 4 MiB")
    return padded(PREFIX.size + header_bytes)


def read_head(data: bytes | memoryview) -> Head:
    """Read and check prefix and header (*data* may hold more, or only them).

    Raises ProtocolError on any disagreement; allocates no more than the header itself.
    """
    offset = head_bytes(data)
    _, _, _, header_bytes, body_bytes = PREFIX.unpack_from(data)
    if len(data) < offset:
        raise _bad("wire.truncated", "a message is shorter than its header")
    header = parse_json(bytes(data[PREFIX.size : PREFIX.size + header_bytes]))
    if not isinstance(header, dict) or set(header) != {"kind", "meta", "arrays"}:
        raise _bad("wire.bad-header", "a message header lacks kind, meta or arrays")
    kind, meta, arrays = header["kind"], header["meta"], header["arrays"]
    if not (isinstance(kind, str) and isinstance(meta, dict) and isinstance(arrays, list)):
        raise _bad("wire.bad-header", "a message header has parts of the wrong type")
    specs = tuple(_spec(item) for item in arrays)
    if len({spec.name for spec in specs}) != len(specs):
        raise _bad("wire.bad-header", "a message names one array twice")
    if sum(padded(spec.size_bytes) for spec in specs) != body_bytes:
        raise _bad("wire.bad-size", "a message's size does not equal the sum of its arrays")
    return Head(kind, meta, specs, offset, body_bytes)


def _spec(item: Json) -> ArraySpec:
    if type(item) is list and len(item) == 3:  # a match statement takes three times as long
        name, dtype, shape = item
        named = name and type(name) is type(dtype) is str and dtype in DTYPES
        if named and type(shape) is list and len(shape) <= MAX_DIMENSIONS and _sizes(shape):
            return ArraySpec(name, dtype, tuple(shape))
    raise _bad("wire.bad-array", "a message declares an array without a name, or of unknown dtype or shape")


def _sizes(shape: list[Json]) -> bool:
    """Is *shape* one of whole numbers, whose product no machine's addresses exceed?"""
    elements = 1
    for size in shape:
        if type(size) is not int or size < 0:
            return False
        elements *= size or 1
    return elements < 2**58


def read_body(head: Head, body: bytes | bytearray | memoryview) -> dict[str, Array]:
    """The arrays of a message as read-only views of *body*. Raises ProtocolError if sizes differ."""
    view = memoryview(body)
    if len(view) != head.body_bytes:
        raise _bad("wire.truncated", "a message's body is shorter or longer than it declares")
    arrays: dict[str, Array] = {}
    offset = 0
    for spec in head.specs:
        size = spec.size_bytes
        array = np.frombuffer(view[offset : offset + size], spec.dtype) if size else np.empty(0, spec.dtype)
        if spec.shape != array.shape:
            array = array.reshape(spec.shape)
        array.flags.writeable = False
        arrays[spec.name] = array
        offset += padded(size)
    return arrays


def decode(data: bytes | memoryview, check: Callable[[Head], None] | None = None) -> Message:
    """Decode one whole message; *check* sees the header before the body is touched."""
    head = read_head(data)
    if check is not None:
        check(head)
    return Message(head.kind, head.meta, read_body(head, memoryview(data)[head.body_offset :]))
