"""A link: messages over one stream of small frames, sans-IO, the same at both ends.

    frame   = type (1 byte) + id (16 bytes) + content
    "M"     a whole message that fits into one frame
    "S"     start of a larger one: its prefix and header
    "D"     data: body offset (8 bytes, little-endian) + up to 64 KiB of body
    "A"     acknowledges replies (their ids follow): they need not be kept any longer
    "X"     the rest of a message will not come: what there is of it may be forgotten
    "P"     progress on a request, JSON
    "H"     hello, JSON: what this end holds of the other's messages (first frame of a connection)

A message's id is BLAKE2b-128 of its ``meta["id"]`` or ``meta["re"]``. Large messages are
interleaved chunk by chunk, so that small ones do not wait behind them; array data is
sliced from its own buffer and never copied as a whole. After a reconnect each end
goes on from the offset that the other's hello names.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atoll.contract.errors import AtollError, ProtocolError, TransportError
from atoll.contract.wire import Head, Json, Message, encode, head_bytes, parse_json, read_head, to_json
from atoll.transport.spool import Incoming

CHUNK_BYTES = 1 << 16
"""Of one frame: over 64 kbit/s it takes 8 s, so that such a link is heard of well within any deadline."""
ID_BYTES = 16
ACK_DELAY_S = 0.1
"""Acknowledgements of that long are sent in one frame: a small round trip costs no frame more."""


def frame_id(text: str) -> bytes:
    """The 16-byte id of a message named *text*."""
    return hashlib.blake2b(text.encode(), digest_size=ID_BYTES).digest()


class Owner(Protocol):
    """What a link's two ends do differently."""

    def accept(self, head: Head) -> None:
        """See a header before memory is allocated for its body; raises to refuse the message."""

    def arrived(self, incoming: Incoming) -> None:
        """A message is complete."""

    def refused(self, head: Head, error: AtollError) -> None:
        """A message was refused by accept; its body is being discarded."""

    def heard(self, frame: bytes, note: dict[str, Json] | None) -> None:
        """Part of the message *frame* went over the link, or the peer tells progress on it."""

    def acknowledged(self, frame: bytes) -> None:
        """The peer holds our message *frame*."""


@dataclass(slots=True)
class _Out:
    parts: list[memoryview | bytes]
    total: int
    part: int = 0
    at: int = 0
    sent: int = 0
    started: bool = False

    @property
    def done(self) -> bool:
        """All of it was written."""
        return self.started and self.part == len(self.parts)


class Link:
    """Frames in, frames out, for one peer, across reconnects."""

    def __init__(self, owner: Owner, spool_dir: Path | None = None) -> None:
        self._owner, self._spool_dir = owner, spool_dir
        self._out: dict[bytes, _Out] = {}
        self._turns: deque[bytes] = deque()
        self._control: deque[bytes] = deque()
        self._acks: list[bytes] = []
        self._partial: dict[bytes, Incoming] = {}
        self._discard: set[bytes] = set()
        self._work = asyncio.Event()
        self._me, self._peer = secrets.token_hex(8), ""
        self._clock = time.time() - time.monotonic()
        self.generation = 0

    # -- sending

    def send(self, name: str, message: Message) -> int:
        """Queue a message; it is kept until :meth:`forget`. Returns its size in bytes."""
        parts = [memoryview(part) for part in encode(message)]
        total = sum(len(part) for part in parts)
        frame = frame_id(name)
        if frame in self._acks:  # of an earlier message: it must not be taken for this one's
            self._flush_acks()
        self._out[frame] = _Out(list(parts), total)
        self._turns.append(frame)
        self._work.set()
        return total

    def forget(self, name: str) -> None:
        """Drop an outgoing message."""
        frame = frame_id(name)
        out = self._out.pop(frame, None)
        if out is not None and out.started and not out.done:
            self.control(b"X", frame)

    def acknowledge(self, frame: bytes) -> None:
        """Tell the peer, soon and together with others, that its message *frame* is here."""
        if not self._acks:
            asyncio.get_running_loop().call_later(ACK_DELAY_S, self._flush_acks)
        self._acks.append(frame)

    def _flush_acks(self) -> None:
        acks, self._acks = self._acks, []
        if acks:
            self.control(b"A", bytes(ID_BYTES), b"".join(acks))

    def control(self, kind: bytes, frame: bytes, content: bytes = b"") -> None:
        """Queue a small frame ahead of all data."""
        self._control.append(kind + frame + content)
        self._work.set()

    def hello(self, holds: list[bytes]) -> bytes:
        """This end's first frame of a connection; *holds*: complete messages that need not be sent again."""
        have = {frame.hex(): part.body_received for frame, part in self._partial.items()}
        held = [frame.hex() for frame in holds]
        note = {"me": self._me, "have": have, "of": self._peer, "holds": held, "time": time.time()}
        return b"H" + bytes(ID_BYTES) + to_json(note)

    def attach(self, peer_hello: bytes) -> int:
        """Begin a connection with the peer's first frame: queue again what the peer lacks.

        Returns the connection's generation. Raises ProtocolError for anything but a hello.
        """
        note = parse_json(peer_hello[1 + ID_BYTES :]) if peer_hello[:1] == b"H" else None
        match note:
            case {"me": str(peer), "have": dict(have), "of": str(me), "holds": list(holds), **more}:
                pass
            case _:
                raise ProtocolError("link.no-hello", "a connection does not begin with a hello")
        told = more.get("time")
        clock = float(told) if isinstance(told, int | float) and 0 <= told < 2**33 else time.time()
        self._clock = clock - time.monotonic()
        offsets = {_frame(name): offset for name, offset in have.items()} if me == self._me else {}
        held = {name for name in holds if isinstance(name, str)}
        self.generation += 1
        self._control.clear()
        self._turns.clear()
        self._discard.clear()
        if peer != self._peer:  # it began anew, and will not continue what it sent before
            for frame in list(self._partial):
                self._drop(frame)
            self._peer = peer
        for frame, out in self._out.items():
            if frame.hex() in held:
                continue
            offset = offsets.pop(frame, None)
            _seek(out, offset if isinstance(offset, int) else None)
            self._turns.append(frame)
        for frame in offsets:
            self.control(b"X", frame)
        self._work.set()
        return self.generation

    def peer_time(self) -> float:
        """What the peer's clock says now, seconds since 1970: as its hello said, and the time that passed since,
        whatever this end's clock did."""
        return self._clock + time.monotonic()

    async def next_frame(self) -> bytes:
        """The next frame to write: control frames first, then one chunk of each message in turn."""
        while True:
            if self._control:
                return self._control.popleft()
            if self._turns:
                frame = self._turns.popleft()
                out = self._out.get(frame)
                if out is not None and not out.done:
                    made = self._next_chunk(frame, out)
                    self._owner.heard(frame, None)
                    return made
                continue
            self._work.clear()
            await self._work.wait()

    def _next_chunk(self, frame: bytes, out: _Out) -> bytes:
        if not out.started:
            out.started = True
            if out.total <= CHUNK_BYTES:
                out.part = len(out.parts)
                return b"".join((b"M", frame, *out.parts))
            out.part, out.at = 1, 0
            self._turns.append(frame)
            return b"".join((b"S", frame, out.parts[0]))
        offset = out.sent
        taken: list[memoryview | bytes] = []
        room = CHUNK_BYTES
        while room and out.part < len(out.parts):
            piece = out.parts[out.part][out.at : out.at + room]
            taken.append(piece)
            room -= len(piece)
            out.at += len(piece)
            out.sent += len(piece)
            if out.at == len(out.parts[out.part]):
                out.part, out.at = out.part + 1, 0
        if out.part < len(out.parts):
            self._turns.append(frame)
        return b"".join((b"D", frame, offset.to_bytes(8, "little"), *taken))

    # -- receiving

    def feed(self, data: bytes) -> None:
        """Take in one frame. Raises ProtocolError when the peer breaks the protocol."""
        kind, frame, content = data[:1], data[1 : 1 + ID_BYTES], memoryview(data)[1 + ID_BYTES :]
        if len(frame) != ID_BYTES:
            raise ProtocolError("link.frame", "a frame is too short")
        if kind in (b"M", b"S"):
            self._start(frame, content, whole=kind == b"M")
        elif kind == b"D":
            self._data(frame, int.from_bytes(content[:8], "little"), content[8:])
        elif kind == b"X":
            self._discard.discard(frame)
            self._drop(frame)
        elif kind == b"A":
            for start in range(0, len(content), ID_BYTES):
                self._owner.acknowledged(bytes(content[start : start + ID_BYTES]))
        elif kind == b"P":
            note = parse_json(bytes(content))
            self._owner.heard(frame, note if isinstance(note, dict) else {})
        else:
            raise ProtocolError("link.frame", "a frame of unknown type")

    def _start(self, frame: bytes, content: memoryview, *, whole: bool) -> None:
        head = read_head(content)
        if not whole and len(content) != head_bytes(content):
            raise ProtocolError("link.frame", "a start frame holds more than a header")
        if whole and len(content) != head.total_bytes:
            raise ProtocolError("wire.truncated", "a message is shorter or longer than it declares")
        self._discard.discard(frame)
        self._drop(frame)
        try:
            if frame != frame_id(str(head.meta.get("id", head.meta.get("re")))):
                raise ProtocolError("link.frame", "a frame's id is not its message's")
            self._owner.accept(head)
            incoming = Incoming(head, self._spool_dir)
        except AtollError as error:
            if not whole:
                self._discard.add(frame)
            self._owner.refused(head, error)
            return
        self._partial[frame] = incoming
        self._write(frame, incoming, content[head.body_offset :])

    def _data(self, frame: bytes, offset: int, content: memoryview) -> None:
        if frame in self._discard:
            return
        incoming = self._partial.get(frame)
        if incoming is None or offset != incoming.body_received:
            raise ProtocolError("link.order", "a data frame does not follow what came before")
        self._owner.heard(frame, None)
        self._write(frame, incoming, content)

    def _write(self, frame: bytes, incoming: Incoming, content: memoryview) -> None:
        try:
            incoming.write(content)
        except TransportError as error:  # no room for it here
            self._drop(frame)
            self._discard.add(frame)
            self._owner.refused(incoming.head, error)
            return
        if not incoming.missing_bytes:
            del self._partial[frame]
            self._owner.arrived(incoming)

    def _drop(self, frame: bytes) -> None:
        """Forget what has come of a message."""
        incoming = self._partial.pop(frame, None)
        if incoming is not None:
            incoming.close()


def _frame(name: str) -> bytes:
    try:
        frame = bytes.fromhex(name)
    except ValueError:
        frame = b""
    if len(frame) != ID_BYTES:
        raise ProtocolError("link.no-hello", "a hello names what is no message")
    return frame


def _seek(out: _Out, body_offset: int | None) -> None:
    """Go on sending the body at *body_offset*, or the whole message anew (None)."""
    out.started, out.part, out.at, out.sent = body_offset is not None, 1, 0, 0
    left = body_offset or 0
    while left > 0 and out.part < len(out.parts):
        step = min(left, len(out.parts[out.part]))
        left, out.sent, out.at = left - step, out.sent + step, step
        if step == len(out.parts[out.part]):
            out.part, out.at = out.part + 1, 0
