"""The link, sans-IO: two ends joined by queues that are cut at any frame."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter, deque
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.wire import HEADER_LIMIT_BYTES, Head, Message, encode_bytes, read_head
from atoll.transport import link as link_module
from atoll.transport.link import CHUNK_BYTES, ID_BYTES, Link, frame_id
from atoll.transport.spool import Incoming


def message(name: str, size: int, **meta: Any) -> Message:
    """A message of *size* body bytes (in two arrays, one of them odd) that no other message equals."""
    seed = list(name.encode())
    rng = np.random.default_rng(seed)
    first = size // 3
    parts = {"x": first, "y": size - first} if size > 64 else {"x": size}
    arrays = {key: rng.integers(0, 256, n, dtype="|u1") for key, n in parts.items()}
    return Message("m", {"id": name, **meta}, arrays)


class End:
    """One end: a link and its owner, who keeps what arrives and refuses what a test says."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.link = Link(self)
        self.limit_bytes = limit_bytes
        self.arrived_messages: list[Message] = []
        self.refusals: list[str] = []
        self.attached = False
        self.fed: Counter[str] = Counter()

    def accept(self, head: Head) -> None:
        if self.limit_bytes is not None and head.total_bytes > self.limit_bytes:
            raise ProtocolError("test.too-large", "too large")

    def arrived(self, incoming: Incoming) -> None:
        self.arrived_messages.append(incoming.message())

    def refused(self, head: Head, error: AtollError) -> None:
        self.refusals.append(error.code)

    def heard(self, frame: bytes, note: dict[str, Any] | None) -> None:
        pass

    def acknowledged(self, frame: bytes) -> None:
        pass

    @property
    def holds(self) -> list[bytes]:
        return [frame_id(got.meta["id"]) for got in self.arrived_messages]

    def pull(self) -> bytes | None:
        """The next frame, or None when there is none to write. Needs a running loop."""
        step = self.link.next_frame()
        try:
            step.send(None)
        except StopIteration as made:
            return bytes(made.value)
        step.close()
        return None

    def take(self, frame: bytes) -> None:
        """What a connection does with a received frame: the first is the hello."""
        if not self.attached:
            self.link.attach(frame)
            self.attached = True
            return
        self.fed[chr(frame[0])] += 1
        self.fed["body"] += len(frame) - ID_BYTES - 9 if frame[:1] == b"D" else 0
        self.link.feed(frame)


class Wire:
    """Two ends and what is under way between them."""

    def __init__(self, *ends: End) -> None:
        self.ends = ends or (End(), End())
        self.connect()

    def connect(self) -> None:
        """A new connection: what was under way is lost, and each end says hello."""
        self.queues: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
        for end, queue in zip(self.ends, self.queues, strict=True):
            end.attached = False
            queue.append(end.link.hello(end.holds))

    def write(self, side: int) -> bool:
        frame = self.ends[side].pull() if self.ends[side].attached else None
        if frame is not None:
            self.queues[side].append(frame)
        return frame is not None

    def deliver(self, side: int) -> bool:
        if not self.queues[side]:
            return False
        self.ends[1 - side].take(self.queues[side].popleft())
        return True

    def step(self) -> bool:
        """Each end writes a frame and takes one, if there is any."""
        return any([self.deliver(0), self.deliver(1), self.write(0), self.write(1)])

    def drain(self) -> None:
        """Everything arrives that can."""
        while self.step():
            pass


def right(end: End, sent: list[Message]) -> None:
    """Every message once, complete and bit-exact."""
    assert sorted(got.meta["id"] for got in end.arrived_messages) == sorted(m.meta["id"] for m in sent)
    want = {m.meta["id"]: encode_bytes(m) for m in sent}
    for got in end.arrived_messages:
        assert encode_bytes(got) == want[got.meta["id"]]


# ---------------------------------------------------------------- any order, any cut

SIDES = st.integers(0, 1)


def scripts(chunk: int) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    """What may happen: messages of sizes around the chunk's, frames going on, cuts at any frame."""
    near = st.builds(lambda times, off: max(0, times * chunk + off), st.integers(0, 5), st.integers(-150, 9))
    send = st.tuples(st.just("send"), SIDES, near | st.integers(0, 6 * chunk))
    go = st.tuples(st.just("go"), SIDES, st.integers(1, 9))
    part = st.tuples(st.sampled_from(["write", "deliver"]), SIDES, st.integers(1, 6))
    cut = st.tuples(st.just("cut"), SIDES, st.just(0))
    return st.lists(st.one_of(send, go, part, cut), min_size=4, max_size=40)


async def play(script: list[tuple[str, int, int]]) -> Wire:
    wire, sent = Wire(), ([], [])  # type: ignore[var-annotated]
    for number, (what, side, size) in enumerate(script):
        if what == "send":
            made = message(f"{side}/{number}", size, text="x" * (size % 7 * link_module.CHUNK_BYTES // 4))
            wire.ends[side].link.send(made.meta["id"], made)
            sent[side].append(made)
        elif what == "cut":
            wire.connect()
        elif what == "go":
            for _ in range(size):
                wire.step()
        else:
            for _ in range(size):
                (wire.write if what == "write" else wire.deliver)(side)
    wire.drain()
    for side in (0, 1):
        right(wire.ends[1 - side], sent[side])
        # Starts and bytes that came are not sent again, whatever was cut.
        fed = wire.ends[1 - side].fed
        whole = [m for m in sent[side] if len(encode_bytes(m)) <= link_module.CHUNK_BYTES]
        assert (fed["M"], fed["S"]) == (len(whole), len(sent[side]) - len(whole))
        parted = [m for m in sent[side] if len(encode_bytes(m)) > link_module.CHUNK_BYTES]
        assert fed["body"] == sum(read_head(encode_bytes(m)).body_bytes for m in parted)
    return wire


@settings(max_examples=300, deadline=None)
@given(script=scripts(256))
def test_every_message_arrives_once_whatever_is_cut(script: list[tuple[str, int, int]]) -> None:
    original = link_module.CHUNK_BYTES
    link_module.CHUNK_BYTES = 256  # small, so that thousands of frames fit into a test
    try:
        asyncio.run(play(script))
    finally:
        link_module.CHUNK_BYTES = original


@settings(max_examples=15, deadline=None)
@given(script=scripts(CHUNK_BYTES))
def test_every_message_arrives_once_with_real_chunks(script: list[tuple[str, int, int]]) -> None:
    asyncio.run(play(script))


def test_a_cut_at_every_single_frame() -> None:
    async def with_cuts(first: int, second: int) -> int:
        wire, sent = Wire(), message("0/large", 3 * CHUNK_BYTES)
        other = message("1/small", 100)
        wire.ends[0].link.send("0/large", sent)
        wire.ends[1].link.send("1/small", other)
        steps = 0
        for cut in (first, second):
            for _ in range(cut):
                steps += wire.step()
            wire.connect()
        wire.drain()
        right(wire.ends[1], [sent])
        right(wire.ends[0], [other])
        return steps

    for first in range(7):
        for second in range(0, 7, 2):
            asyncio.run(with_cuts(first, second))


# ---------------------------------------------------------------- one message's way


async def test_a_small_message_overtakes_a_large_one() -> None:
    wire = Wire()
    wire.drain()
    wire.ends[0].link.send("large", message("large", 20 * CHUNK_BYTES))
    for _ in range(4):
        wire.write(0)
    wire.ends[0].link.send("small", message("small", 100))
    wire.drain()
    assert [got.meta["id"] for got in wire.ends[1].arrived_messages] == ["small", "large"]


async def test_large_messages_take_turns_and_control_goes_first() -> None:
    end = End()
    end.link.attach(End().link.hello([]))
    for name in "abc":
        end.link.send(name, message(name, 3 * CHUNK_BYTES))
    for _ in range(5):
        assert end.pull()
    end.link.control(b"P", frame_id("x"), b"{}")
    assert (end.pull() or b"")[:1] == b"P"
    frames = [end.pull() or b"" for _ in range(6)]
    assert len({frame[1 : 1 + ID_BYTES] for frame in frames[:3]}) == 3
    assert frames[0][1 : 1 + ID_BYTES] == frames[3][1 : 1 + ID_BYTES]


async def test_a_resumed_message_goes_on_where_it_was_cut() -> None:
    wire, sent = Wire(), message("large", 40 * CHUNK_BYTES)
    wire.drain()
    wire.ends[0].link.send("large", sent)
    for _ in range(30):
        wire.write(0)
        wire.deliver(0)
    wire.connect()
    again = 0
    while wire.deliver(0) or wire.deliver(1) or wire.write(0):
        again += sum(len(frame) for frame in wire.queues[0])
    right(wire.ends[1], [sent])
    assert again < 12 * CHUNK_BYTES


async def test_a_peer_that_began_anew_does_not_continue_another_message() -> None:
    """The sender's process was restarted and sends another message under the same name."""
    for size in (5 * CHUNK_BYTES, 9 * CHUNK_BYTES, 100):
        wire = Wire()
        wire.drain()
        wire.ends[0].link.send("n", message("n", 5 * CHUNK_BYTES, attempt=1))
        for _ in range(3):
            wire.write(0)
            wire.deliver(0)
        wire.ends = (End(), wire.ends[1])
        sent = Message("m", {"id": "n", "attempt": 2}, {"x": np.ones(size, "|u1")})
        wire.ends[0].link.send("n", sent)
        wire.connect()
        wire.drain()
        right(wire.ends[1], [sent])
        wire.ends[0].link.send("later", message("later", 100))
        wire.drain()
        assert len(wire.ends[1].arrived_messages) == 2


async def test_a_message_sent_anew_under_its_name_arrives_anew() -> None:
    """Forgotten while it was under way, then sent again on the same connection."""
    wire, sent = Wire(), message("n", 6 * CHUNK_BYTES)
    wire.drain()
    for frames in (0, 1, 2, 4):
        before = len(wire.ends[1].arrived_messages)
        wire.ends[0].link.send("n", sent)
        for _ in range(frames):
            wire.write(0)
        wire.ends[0].link.forget("n")
        wire.ends[0].link.send("n", sent)
        wire.drain()
        assert len(wire.ends[1].arrived_messages) == before + 1
    assert all(encode_bytes(got) == encode_bytes(sent) for got in wire.ends[1].arrived_messages)


async def test_a_refused_message_may_be_sent_again() -> None:
    wire, sent = Wire(End(), End(CHUNK_BYTES)), message("n", 2 * CHUNK_BYTES)
    wire.drain()
    wire.ends[0].link.send("n", sent)
    wire.drain()
    assert wire.ends[1].refusals == ["test.too-large"] and not wire.ends[1].arrived_messages
    wire.ends[1].limit_bytes = None
    wire.ends[0].link.send("n", sent)
    wire.drain()
    right(wire.ends[1], [sent])


async def test_a_large_header_without_any_body() -> None:
    wire = Wire()
    for number, size in enumerate((CHUNK_BYTES - 100, CHUNK_BYTES + 100, HEADER_LIMIT_BYTES - 200)):
        sent = Message("m", {"id": str(number), "text": "x" * size})
        wire.ends[0].link.send(str(number), sent)
        wire.drain()
        assert encode_bytes(wire.ends[1].arrived_messages[number]) == encode_bytes(sent)


async def test_what_the_sender_gave_up_is_not_kept_at_the_other_end() -> None:
    """Half a message of a cancelled run must not stay in memory for ever, whenever the cancelling happens."""
    for cut in (False, True):
        wire = Wire()
        wire.drain()
        tracemalloc.start()
        wire.ends[0].link.send("large", message("large", 30 * CHUNK_BYTES))
        for _ in range(20):
            wire.write(0)
            wire.deliver(0)
        held = tracemalloc.get_traced_memory()[0]
        if cut:
            wire.connect()
        wire.ends[0].link.forget("large")
        wire.drain()
        left = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held > 30 * CHUNK_BYTES > 4 * CHUNK_BYTES > left and not wire.ends[1].arrived_messages
        wire.connect()
        wire.drain()


async def test_acknowledgements_are_sent_before_what_comes_after_them() -> None:
    """Else the peer would take them for its answer to a request repeated meanwhile."""
    end = End()
    end.link.attach(End().link.hello([]))
    end.link.acknowledge(frame_id("n"))
    end.link.acknowledge(frame_id("other"))
    end.link.send("n", message("n", 10))
    first, second = end.pull() or b"", end.pull() or b""
    assert first[:1] == b"A" and first[1 + ID_BYTES :] == frame_id("n") + frame_id("other")
    assert second[:1] == b"M" and end.pull() is None
