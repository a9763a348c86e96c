"""The wire format: what is encoded comes back, and nothing malformed does more than raise ProtocolError."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from atoll.contract import wire
from atoll.contract.errors import ProtocolError
from atoll.contract.wire import (
    Head,
    Message,
    decode,
    encode,
    encode_bytes,
    head_bytes,
    parse_json,
    read_body,
    read_head,
)

ORDERED = sorted(wire.DTYPES)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Any array that may be sent: every dtype, either byte order, 0 to 8 dimensions, any strides."""
    dtype = np.dtype(draw(st.sampled_from(ORDERED)))
    if draw(st.booleans()):
        dtype = dtype.newbyteorder(">")
    made = draw(npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3)))
    if made.ndim and draw(st.booleans()):
        made = made.T
    if made.ndim and draw(st.booleans()):
        made = made[::-1]
    return made


def raw(header: object, body: bytes = b"", *, body_bytes: int | None = None, header_bytes: int | None = None) -> bytes:
    """A message put together by hand, so that it can lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if header_bytes is None else header_bytes
    prefix = wire.PREFIX.pack(wire.MAGIC, wire.VERSION, 0, size, len(body) if body_bytes is None else body_bytes)
    return prefix + text + bytes(-(len(prefix) + len(text)) % 8) + body


def with_arrays(*specs: object, body: bytes = b"", body_bytes: int | None = None) -> bytes:
    return raw({"kind": "k", "meta": {}, "arrays": list(specs)}, body, body_bytes=body_bytes)


@contextmanager
def allocating_at_most(size_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= size_bytes
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- round trip


@settings(max_examples=300, deadline=None)
@given(NAMES, st.dictionaries(NAMES, JSON, max_size=3), st.dictionaries(NAMES, arrays(), max_size=3))
def test_what_is_encoded_comes_back(kind: str, meta: dict[str, Any], given_arrays: dict[str, Any]) -> None:
    data = encode_bytes(Message(kind, meta, given_arrays))
    message = decode(data)
    assert (message.kind, message.meta) == (kind, meta)
    assert list(message.arrays) == list(given_arrays)
    for name, sent in given_arrays.items():
        got = message.arrays[name]
        assert got.dtype == sent.dtype.newbyteorder("<") and got.shape == sent.shape
        assert got.tobytes() == np.ascontiguousarray(sent, sent.dtype.newbyteorder("<")).tobytes()
        assert got.flags.c_contiguous and not got.flags.writeable
    assert len(data) % 8 == 0 and read_head(data).total_bytes == len(data)
    assert encode_bytes(message) == data


@pytest.mark.parametrize("dtype", ORDERED)
def test_every_dtype_keeps_its_extremes(dtype: str) -> None:
    kind = np.dtype(dtype).kind
    if kind == "f":
        info: Any = np.finfo(dtype)
        values = [info.min, info.max, info.smallest_subnormal, -0.0, np.nan, np.inf]
    elif kind == "b":
        values = [True, False]
    else:
        info = np.iinfo(dtype)
        values = [info.min, info.max, 0]
    sent = np.array(values, dtype)
    got = decode(encode_bytes(Message("k", {}, {"a": sent}))).arrays["a"]
    assert got.tobytes() == sent.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (1,) * 8, (2,) * 8, (0, 2**57), (2**57, 0)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    sent = np.zeros(shape, "<i2")
    assert decode(encode_bytes(Message("k", {}, {"a": sent}))).arrays["a"].shape == shape


def test_big_endian_and_strided_inputs_are_sent_as_little_endian_c_order() -> None:
    straight = np.arange(24, dtype="<i4").reshape(4, 6)
    want = encode_bytes(Message("k", {}, {"a": straight}))
    assert encode_bytes(Message("k", {}, {"a": straight.astype(">i4")})) == want
    assert encode_bytes(Message("k", {}, {"a": np.asfortranarray(straight)})) == want
    spread = np.zeros((8, 12), "<i4")
    spread[::2, ::2] = straight
    assert encode_bytes(Message("k", {}, {"a": spread[::2, ::2]})) == want


def test_encoding_does_not_copy_contiguous_arrays() -> None:
    array = np.zeros(1 << 20)
    with allocating_at_most(100_000):
        parts = encode(Message("k", {}, {"a": array}))
    assert any(np.shares_memory(array, np.frombuffer(part, np.uint8)) for part in parts if len(part) > 1000)


def test_decoding_is_zero_copy_and_read_only() -> None:
    data = encode_bytes(Message("k", {}, {"a": np.arange(1 << 17), "b": np.ones(3, "<f4")}))
    with allocating_at_most(100_000):
        message = decode(data)
    received = np.frombuffer(data, np.uint8)
    for array in message.arrays.values():
        assert np.shares_memory(array, received)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_body_in_a_bytearray_is_read_only_too() -> None:
    data = encode_bytes(Message("k", {}, {"a": np.arange(3)}))
    head = read_head(data)
    body = bytearray(data[head.body_offset :])
    array = read_body(head, body)["a"]
    assert np.shares_memory(array, np.frombuffer(body, np.uint8)) and not array.flags.writeable


def test_check_sees_the_header_before_the_body_is_looked_at() -> None:
    data = encode_bytes(Message("k", {"m": 1}, {"a": np.arange(3)}))
    seen: list[Head] = []

    def refuse(head: Head) -> None:
        seen.append(head)
        raise ProtocolError("test.no", "no")

    with pytest.raises(ProtocolError, match="no"):
        decode(data[:-5], refuse)  # a body that is too short is not what is complained of
    assert seen[0].meta == {"m": 1} and seen[0].specs[0].shape == (3,)


# ---------------------------------------------------------------- what cannot be sent


@pytest.mark.parametrize(
    "value",
    [
        np.array(["text"]),
        np.array([object()]),
        np.array([1 + 2j]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, [("x", "f8")]),
        np.array([b"x"]),
        np.zeros(1, np.longdouble),
    ],
    ids=lambda value: str(value.dtype),
)
def test_other_dtypes_cannot_be_sent(value: Any) -> None:
    with pytest.raises(ProtocolError) as error:
        encode(Message("k", {}, {"a": value}))
    assert error.value.code == "wire.bad-dtype" and error.value.field == "a"


def test_what_could_not_be_decoded_is_not_encoded() -> None:
    with pytest.raises(ProtocolError):
        encode(Message("k", {}, {"a": np.zeros((1,) * 9)}))
    with pytest.raises(ProtocolError) as error:
        encode(Message("k", {"text": "x" * wire.HEADER_LIMIT_BYTES}))
    assert error.value.code == "wire.header-too-large"


# ---------------------------------------------------------------- fuzzing


PARTS = {"x": np.arange(5, dtype="<i2"), "y": np.ones((2, 3)), "z": np.array(True)}
EXAMPLE = encode_bytes(Message("task", {"id": "a/1", "n": [1, None, 2.5]}, PARTS))


@pytest.mark.parametrize("size", range(len(EXAMPLE)))
def test_every_truncation_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError):
        decode(EXAMPLE[:size])


def test_anything_appended_is_refused() -> None:
    for more in (b"\0", bytes(8), EXAMPLE):
        with pytest.raises(ProtocolError):
            decode(EXAMPLE + more)


def decodes_or_refuses(data: bytes) -> None:
    """Decode: a message that can be encoded again, or ProtocolError; no other exception."""
    try:
        message = decode(data)
    except ProtocolError as error:
        assert error.code.startswith("wire.")
    else:
        encode(message)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(EXAMPLE) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(flips: list[tuple[int, int]]) -> None:
    data = bytearray(EXAMPLE)
    for place, mask in flips:
        data[place] ^= mask
    decodes_or_refuses(bytes(data))


def test_every_single_byte_flip_of_prefix_and_header() -> None:
    for place in range(read_head(EXAMPLE).body_offset):
        for mask in (1, 2, 0x10, 0x20, 0x80, 0xFF):
            data = bytearray(EXAMPLE)
            data[place] ^= mask
            decodes_or_refuses(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    decodes_or_refuses(data)
    decodes_or_refuses(raw(data))


SPEC = st.one_of(
    JSON,
    st.tuples(
        st.sampled_from(["a", "b", "", 1, None]),
        st.sampled_from([*ORDERED, "|O", "<U1", ">f8", "f8", "<f16", "", "<V8", 3]),
        st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**62, 2**64, 10**30, 1.0, True, None, "1"]), max_size=10),
    ).map(list),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(SPEC, max_size=3), st.integers(0, 64), st.none() | st.integers(0, 2**64 - 1))
@example([["a", "<f8", [2**61]]], 0, 2**64 - 1)
@example([["a", "<f8", [2**61, 8]]], 0, 0)
def test_lying_headers(specs: list[Any], size: int, body_bytes: int | None) -> None:
    decodes_or_refuses(with_arrays(*specs, body=bytes(size), body_bytes=body_bytes))


def test_an_array_has_a_name() -> None:
    with pytest.raises(ProtocolError) as error:
        decode(with_arrays(["", "<f8", []], body=bytes(8)))
    assert error.value.code == "wire.bad-array"


@pytest.mark.parametrize(
    "header",
    [
        [], None, 1, "text", {}, {"kind": "k", "meta": {}}, {"kind": "k", "meta": {}, "arrays": [], "more": 1},
        {"kind": 1, "meta": {}, "arrays": []}, {"kind": "k", "meta": [], "arrays": []},
        {"kind": "k", "meta": {}, "arrays": {}},
    ],
)  # fmt: skip
def test_headers_of_the_wrong_form(header: object) -> None:
    with pytest.raises(ProtocolError) as error:
        decode(raw(header))
    assert error.value.code == "wire.bad-header"


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff\xfe", b"{'kind': 1}", b"NaN", b'{"kind":"k","meta":{"x":NaN},"arrays":[]}',
        b'{"kind":"k","meta":{"x":-Infinity},"arrays":[]}', b'{"kind":"k","meta":{"x":1e999},"arrays":[]}',
        b'{"kind":"k","meta":{"x":-1e400},"arrays":[]}',
        b'{"kind":"k","meta":{"x":' + b"9" * 5000 + b'},"arrays":[]}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"kind":"k","meta":' + b"[" * 900_000 + b"]" * 900_000 + b',"arrays":[]}',
        b'{"kind":"k","meta":{},"arrays":[]} x', b'{"kind":"k","meta":{},"arrays":[]}\0',
    ],
    ids=lambda text: repr(text[:40]),
)  # fmt: skip
def test_headers_that_are_not_json(text: bytes) -> None:
    with pytest.raises(ProtocolError) as error:
        decode(raw(text))
    assert error.value.code == "wire.bad-header"


def test_parsed_json_can_always_be_said_again() -> None:
    """NaN has several spellings in Python's parser, and an overflowing number is one of them."""
    for text in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"[1E400]", rb'"\ud800"', rb'{"\uDFFF":1}'):
        with pytest.raises(ProtocolError):
            parse_json(text)
    assert parse_json(b"[1e308, -0.0, 5e-324]") == [1e308, -0.0, 5e-324]
    assert parse_json(rb'"\ud83d\ude00\u0000"') == "\U0001f600\0"


@pytest.mark.parametrize(
    ("place", "value", "code"),
    [
        (0, b"BTOL", "wire.bad-magic"), (4, b"\x02\x00", "wire.bad-version"), (4, b"\x00\x00", "wire.bad-version"),
        (4, b"\x01\x01", "wire.bad-version"), (6, b"\x01\x00", "wire.bad-version"),
        (8, (wire.HEADER_LIMIT_BYTES + 1).to_bytes(4, "little"), "wire.header-too-large"),
        (8, b"\xff\xff\xff\xff", "wire.header-too-large"), (8, b"\x00\x00\x00\x00", "wire.bad-header"),
        (12, (10**15).to_bytes(8, "little"), "wire.bad-size"), (12, b"\xff" * 8, "wire.bad-size"),
        (12, bytes(8), "wire.bad-size"),
    ],
)  # fmt: skip
def test_wrong_prefixes(place: int, value: bytes, code: str) -> None:
    data = bytearray(EXAMPLE)
    data[place : place + len(value)] = value
    with pytest.raises(ProtocolError) as error:
        decode(bytes(data))
    assert error.value.code == code and error.value.remedy


@pytest.mark.parametrize(
    "spec",
    [
        ["a", "|O", [1]], ["a", "<U4", [1]], ["a", ">f8", [1]], ["a", "f8", [1]], ["a", "<f8", [-1]],
        ["a", "<f8", [1.0]], ["a", "<f8", [True]], ["a", "<f8", ["1"]], ["a", "<f8", [None]], ["a", "<f8", 1],
        ["a", "<f8", [1] * 9], ["a", "<f8", [2**62]], ["a", "<f8", [2**32, 2**32]], ["a", "<f8", [0, 2**60]],
        ["a", "<f8", [2**31] * 8], ["a", "<f8", [10**4000] * 8], [1, "<f8", [1]], [None, "<f8", [1]], ["a", "<f8"],
        ["a", "<f8", [1], 0], [], None, "a", {"name": "a", "dtype": "<f8", "shape": [1]},
    ],
    ids=lambda spec: repr(spec)[:30],
)  # fmt: skip
@pytest.mark.parametrize("body_bytes", [0, 8, 10**15])
def test_arrays_of_the_wrong_form(spec: object, body_bytes: int) -> None:
    with allocating_at_most(200_000), pytest.raises(ProtocolError) as error:
        decode(with_arrays(spec, body=bytes(8), body_bytes=body_bytes))
    assert error.value.code == "wire.bad-array"


def test_one_name_twice_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(with_arrays(["a", "|u1", [8]], ["a", "|u1", [8]], body=bytes(16)))


@pytest.mark.parametrize("claimed", [10**9, 10**15, 2**60])
def test_a_claim_of_any_size_allocates_nothing(claimed: int) -> None:
    """A header that agrees with itself about a huge body is accepted as a header; memory is the next step."""
    data = with_arrays(["a", "|u1", [claimed // 8 * 8]], body_bytes=claimed // 8 * 8)
    with allocating_at_most(100_000):
        if claimed < 2**58:
            head = read_head(data)
            assert head.body_bytes == claimed
        with pytest.raises(ProtocolError):
            decode(data)
        with pytest.raises(ProtocolError):
            decode(with_arrays(["a", "|u1", [8]], body_bytes=claimed, body=bytes(8)))


def test_a_claimed_header_of_any_size_allocates_nothing() -> None:
    for size in (wire.HEADER_LIMIT_BYTES, wire.HEADER_LIMIT_BYTES + 1, 2**32 - 1):
        with allocating_at_most(100_000), pytest.raises(ProtocolError):
            decode(raw(b"{}", header_bytes=size))


def test_head_bytes_says_how_much_to_read_first() -> None:
    assert head_bytes(EXAMPLE[:20]) == read_head(EXAMPLE).body_offset
    assert read_head(EXAMPLE[: head_bytes(EXAMPLE)]).total_bytes == len(EXAMPLE)
    assert decode(memoryview(EXAMPLE)).meta == decode(EXAMPLE).meta


def test_canonical_json_is_one_spelling() -> None:
    assert wire.canonical_json({"b": 1, "a": ["é", None, 1.5]}) == '{"a":["é",null,1.5],"b":1}'.encode()
    assert wire.canonical_json({"a": 1, "b": 2}) == wire.canonical_json({"b": 2, "a": 1})
    assert wire.to_json({"b": 1, "a": 2}) == b'{"b":1,"a":2}'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            wire.canonical_json([value])
    with pytest.raises(TypeError):
        wire.canonical_json({1, 2})


def test_a_whole_message_in_pieces_is_the_same_bytes() -> None:
    message = Message("k", {}, {"a": np.arange(7, dtype="|u1"), "b": np.zeros((0, 3))})
    assert b"".join(encode(message)) == encode_bytes(message)
