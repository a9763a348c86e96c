"""A link: messages over one stream of small frames, sans-IO, the same at both ends.

    frame   = type (1 byte) + id (16 bytes) + content
    "M"     a whole message that fits into one frame
    "S"     start of a larger one: its prefix and header
    "D"     data: body offset (8 bytes, little-endian) + up to 1 MiB of body
    "A"     acknowledges a reply: it need not be kept any longer
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
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.wire import Head, Json, Message, encode, head_bytes, parse_json, read_head, to_json
from atoll.transport.spool import Incoming

CHUNK_BYTES = 1 << 20
ID_BYTES = 16


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


class Link:
    """Frames in, frames out, for one peer, across reconnects."""

    def __init__(self, owner: Owner, spool_dir: Path | None = None) -> None:
        self._owner, self._spool_dir = owner, spool_dir
        self._out: dict[bytes, _Out] = {}
        self._turns: deque[bytes] = deque()
        self._control: deque[bytes] = deque()
        self._partial: dict[bytes, Incoming] = {}
        self._discard: dict[bytes, int] = {}
        self._work = asyncio.Event()
        self.generation = 0

    # -- sending

    def send(self, name: str, message: Message) -> int:
        """Queue a message; it is kept until :meth:`forget`. Returns its size in bytes."""
        parts = [memoryview(part) for part in encode(message)]
        total = sum(len(part) for part in parts)
        frame = frame_id(name)
        self._out[frame] = _Out(list(parts), total)
        self._turns.append(frame)
        self._work.set()
        return total

    def forget(self, name: str) -> None:
        """Drop an outgoing message."""
        self._out.pop(frame_id(name), None)

    def control(self, kind: bytes, frame: bytes, content: bytes = b"") -> None:
        """Queue a small frame ahead of all data."""
        self._control.append(kind + frame + content)
        self._work.set()

    def hello(self, holds: list[bytes]) -> bytes:
        """This end's first frame of a connection; *holds*: complete messages that need not be sent again."""
        have = {frame.hex(): part.body_received for frame, part in self._partial.items()}
        return b"H" + bytes(ID_BYTES) + to_json({"have": have, "holds": [frame.hex() for frame in holds]})

    def attach(self, peer_hello: bytes) -> int:
        """Begin a connection with the peer's first frame: queue again what the peer lacks.

        Returns the connection's generation. Raises ProtocolError for anything but a hello.
        """
        note = parse_json(peer_hello[1 + ID_BYTES :]) if peer_hello[:1] == b"H" else None
        match note:
            case {"have": dict(have), "holds": list(holds)}:
                pass
            case _:
                raise ProtocolError("link.no-hello", "a connection does not begin with a hello")
        self.generation += 1
        self._control.clear()
        self._turns.clear()
        self._discard.clear()
        for frame, out in self._out.items():
            if frame.hex() in holds:
                continue
            offset = have.get(frame.hex())
            _seek(out, offset if isinstance(offset, int) else None)
            self._turns.append(frame)
        self._work.set()
        return self.generation

    async def next_frame(self) -> bytes:
        """The next frame to write: control frames first, then one chunk of each message in turn."""
        while True:
            if self._control:
                return self._control.popleft()
            if self._turns:
                frame = self._turns.popleft()
                out = self._out.get(frame)
                if out is not None:
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
        elif kind == b"A":
            self._owner.acknowledged(frame)
        elif kind == b"P":
            note = parse_json(bytes(content))
            self._owner.heard(frame, note if isinstance(note, dict) else {})
        else:
            raise ProtocolError("link.frame", "a frame of unknown type")

    def _start(self, frame: bytes, content: memoryview, *, whole: bool) -> None:
        head = read_head(content)
        if not whole and len(content) != head_bytes(content):
            raise ProtocolError("link.frame", "a start frame holds more than a header")
        try:
            if frame != frame_id(str(head.meta.get("id", head.meta.get("re")))):
                raise ProtocolError("link.frame", "a frame's id is not its message's")
            self._owner.accept(head)
        except AtollError as error:
            if not whole:
                self._discard[frame] = head.body_bytes
            self._owner.refused(head, error)
            return
        incoming = Incoming(head, self._spool_dir)
        if whole:
            incoming.write(content[head.body_offset :])
            if incoming.missing_bytes:
                raise ProtocolError("wire.truncated", "a message is shorter than it declares")
        if incoming.missing_bytes:
            self._partial[frame] = incoming
        else:
            self._owner.arrived(incoming)

    def _data(self, frame: bytes, offset: int, content: memoryview) -> None:
        if frame in self._discard:
            return
        incoming = self._partial.get(frame)
        if incoming is None or offset != incoming.body_received:
            raise ProtocolError("link.order", "a data frame does not follow what came before")
        incoming.write(content)
        self._owner.heard(frame, None)
        if not incoming.missing_bytes:
            del self._partial[frame]
            self._owner.arrived(incoming)


def _seek(out: _Out, body_offset: int | None) -> None:
    """Go on sending the body at *body_offset*, or the whole message anew (None)."""
    out.started, out.part, out.at, out.sent = body_offset is not None, 1, 0, 0
    left = body_offset or 0
    while left > 0 and out.part < len(out.parts):
        step = min(left, len(out.parts[out.part]))
        left, out.sent, out.at = left - step, out.sent + step, step
        if step == len(out.parts[out.part]):
            out.part, out.at = out.part + 1, 0
