"""Frames that no honest end writes: a link refuses them with ProtocolError and allocates nothing for them."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.wire import PREFIX, Head, Message, encode_bytes
from atoll.transport import link as link_module
from atoll.transport.link import ID_BYTES, Link, frame_id
from atoll.transport.spool import Incoming


class Owner:
    """Keeps what arrives, and refuses what is larger than its limit."""

    def __init__(self, limit_bytes: float = float("inf")) -> None:
        self.limit_bytes = limit_bytes
        self.got: list[Message] = []
        self.refusals: list[str] = []

    def accept(self, head: Head) -> None:
        if head.total_bytes > self.limit_bytes:
            raise ProtocolError("test.too-large", "too large")

    def arrived(self, incoming: Incoming) -> None:
        self.got.append(incoming.message())

    def refused(self, head: Head, error: AtollError) -> None:
        self.refusals.append(error.code)

    def heard(self, frame: bytes, note: dict[str, Any] | None) -> None:
        assert note is None or isinstance(note, dict)

    def acknowledged(self, frame: bytes) -> None:
        assert isinstance(frame, bytes)


def attached(limit_bytes: float = float("inf")) -> tuple[Link, Owner]:
    owner = Owner(limit_bytes)
    link = Link(owner)
    link.attach(Link(Owner()).hello([]))
    return link, owner


async def frames_of(link: Link) -> list[bytes]:
    """All frames that are ready to be written."""
    frames = []
    while True:
        step = link.next_frame()
        try:
            step.send(None)
        except StopIteration as made:
            frames.append(bytes(made.value))
        else:
            step.close()
            return frames


def claim(size: int, name: str = "n") -> bytes:
    """Prefix and header of a message that says it has *size* bytes of body."""
    text = json.dumps({"kind": "m", "meta": {"id": name}, "arrays": [["x", "|u1", [size]]]}).encode()
    start = PREFIX.pack(b"ATOL", 1, 0, len(text), size) + text
    return frame_id(name) + start + bytes(-len(start) % 8)


# ---------------------------------------------------------------- claims


def test_a_claim_that_is_refused_allocates_nothing() -> None:
    link, owner = attached(limit_bytes=1 << 20)
    frames = [b"S" + claim(1 << 56), *(b"D" + frame_id("n") + bytes(8) + bytes(1000) for _ in range(10))]
    tracemalloc.start()
    for frame in frames:
        link.feed(frame)
    with pytest.raises(ProtocolError):  # a whole message that is not whole
        link.feed(b"M" + claim(1 << 56))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert owner.refusals == ["test.too-large"] and peak < 100_000


def test_a_claim_that_memory_does_not_hold_is_refused() -> None:
    """Whatever an owner accepts: the connection goes on, and the sender is told."""
    link, owner = attached()
    link.feed(b"S" + claim(1 << 56))
    link.feed(b"D" + frame_id("n") + bytes(8) + bytes(1000))
    link.feed(b"M" + frame_id("small") + encode_bytes(Message("m", {"id": "small"}, {"x": np.arange(9)})))
    assert owner.refusals == ["spool.memory"] and [got.meta["id"] for got in owner.got] == ["small"]


def test_a_whole_message_must_be_whole() -> None:
    data = encode_bytes(Message("m", {"id": "n"}, {"x": np.arange(9)}))
    for wrong in (data[:-1], data + b"\0", data[:-72]):
        link, owner = attached()
        with pytest.raises(ProtocolError) as error:
            link.feed(b"M" + frame_id("n") + wrong)
        assert error.value.code == "wire.truncated" and not owner.got


@pytest.mark.parametrize("offset", [0, 8, 999, 1001, 2**63])
def test_data_comes_in_order(offset: int) -> None:
    link, owner = attached()
    link.feed(b"S" + claim(5000))
    link.feed(b"D" + frame_id("n") + bytes(8) + bytes(1000))
    with pytest.raises(ProtocolError) as error:
        link.feed(b"D" + frame_id("n") + offset.to_bytes(8, "little") + bytes(1000))
    assert error.value.code == "link.order"
    with pytest.raises(ProtocolError):
        link.feed(b"D" + frame_id("n") + (1000).to_bytes(8, "little") + bytes(4001))
    with pytest.raises(ProtocolError):
        link.feed(b"D" + frame_id("other") + bytes(8) + bytes(1000))
    assert not owner.got


def test_a_frame_is_named_for_its_message() -> None:
    link, owner = attached()
    link.feed(b"M" + frame_id("other") + encode_bytes(Message("m", {"id": "n"})))
    link.feed(b"M" + frame_id("n") + encode_bytes(Message("m", {})))
    assert owner.refusals == ["link.frame", "link.frame"] and not owner.got


# ---------------------------------------------------------------- noise


def conversation() -> list[bytes]:
    """Frames of every kind, as an honest end writes them."""
    original, link_module.CHUNK_BYTES = link_module.CHUNK_BYTES, 256
    try:
        link, _ = attached()
        link.send("small", Message("m", {"id": "small"}, {"x": np.arange(3)}))
        link.send("large", Message("m", {"id": "large"}, {"x": np.arange(60), "y": np.ones(5, "|u1")}))
        link.send("given up", Message("m", {"id": "given up"}, {"x": np.arange(99)}))
        link.control(b"A", bytes(ID_BYTES), frame_id("x") + frame_id("y"))
        link.control(b"P", frame_id("x"), b'{"done":1}')
        link.control(b"X", frame_id("given up"))
        return asyncio.run(frames_of(link))
    finally:
        link_module.CHUNK_BYTES = original


FRAMES = conversation()
FLIPS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 255)), max_size=3)


def feeds_or_refuses(frames: list[bytes]) -> None:
    link, owner = attached(limit_bytes=1 << 22)
    for frame in frames:
        try:
            link.feed(frame)
        except ProtocolError as error:
            assert error.code
    for message in owner.got:
        encode_bytes(message)


def test_the_frames_that_are_fuzzed_are_of_every_kind() -> None:
    assert {frame[:1] for frame in FRAMES} == {b"M", b"S", b"D", b"A", b"P", b"X"}
    feeds_or_refuses(FRAMES)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(FRAMES) - 1), FLIPS, st.none() | st.integers(0, 400)), max_size=6))
def test_frames_with_flipped_and_missing_bytes(script: list[tuple[int, list[tuple[int, int]], int | None]]) -> None:
    made = []
    for number, flips, size in script:
        frame = bytearray(FRAMES[number][:size])
        for place, mask in flips:
            if frame:
                frame[place % len(frame)] ^= mask
        made.append(bytes(frame))
    feeds_or_refuses(made)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*b"MSDAPXHZ"]), st.binary(max_size=60)), max_size=4))
@example([(b"P"[0], bytes(16) + b"[" * 30)])
@example([(b"P"[0], bytes(16) + b"null")])
@example([(b"D"[0], bytes(16) + b"\xff" * 8)])
@example([(b"A"[0], bytes(17))])
def test_frames_of_noise(frames: list[tuple[int, bytes]]) -> None:
    feeds_or_refuses([b"", *(bytes([kind]) + content for kind, content in frames)])


# ---------------------------------------------------------------- hellos

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
NAMES = st.sampled_from([frame_id("large").hex(), frame_id("x").hex(), "", "zz", "00", "é" * 16]) | st.text(max_size=5)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=50),
    st.none() | st.dictionaries(NAMES, st.integers(-(2**64), 2**64) | JSON, max_size=3) | JSON,
    JSON | st.lists(NAMES, max_size=3),
    st.booleans(),
)
def test_any_hello_is_attached_or_refused_and_does_no_harm(noise: bytes, have: Any, holds: Any, same: bool) -> None:
    """Whatever a hello claims, no more than the message's own bytes are sent."""

    async def attach() -> None:
        link = Link(Owner())
        sent = Message("m", {"id": "large"}, {"x": np.arange(500)})
        link.send("large", sent)
        me = json.loads(link.hello([])[1 + ID_BYTES :])["me"] if same else "someone"
        note = json.dumps({"me": "peer", "have": have, "of": me, "holds": holds}).encode()
        try:
            link.attach(b"H" + bytes(ID_BYTES) + (note if have is not None else noise))
        except ProtocolError:
            return
        frames = await frames_of(link)
        assert sum(len(frame) for frame in frames) <= len(encode_bytes(sent)) + 100 * len(frames)

    original, link_module.CHUNK_BYTES = link_module.CHUNK_BYTES, 1000
    try:
        asyncio.run(attach())
    finally:
        link_module.CHUNK_BYTES = original


@pytest.mark.parametrize("first", [b"", b"H", b"H" + bytes(16), b"M" + bytes(16) + b"{}", b"H" + bytes(16) + b"[]"])
def test_a_connection_begins_with_a_hello(first: bytes) -> None:
    with pytest.raises(ProtocolError) as error:
        Link(Owner()).attach(first)
    assert error.value.code in ("link.no-hello", "wire.bad-header")


def test_a_second_hello_is_refused() -> None:
    link, _ = attached()
    with pytest.raises(ProtocolError):
        link.feed(Link(Owner()).hello([]))
