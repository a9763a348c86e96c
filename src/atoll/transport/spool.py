"""Incoming message bodies: small ones in memory, large ones spooled to an unlinked temporary file.

Memory is allocated only after the header was checked. The body's SHA-256 is computed
while it arrives, so that a digest can be verified without reading the body again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from atoll.contract.errors import ProtocolError, TransportError
from atoll.contract.wire import Array, ArraySpec, Head, Json, Message, padded, read_body

IN_MEMORY_BYTES = 4 << 20
PIECE_BYTES = 4 << 20


class Incoming:
    """One message being received, then read. Bytes must be written in order."""

    def __init__(self, head: Head, spool_dir: Path | None = None) -> None:
        """spool_dir: where bodies above 4 MiB are written; None keeps every body in memory."""
        self.head = head
        self._hash = hashlib.sha256()
        self._written = 0
        self._file: IO[bytes] | None = None
        self._memory = bytearray()
        try:
            if spool_dir is not None and head.body_bytes > IN_MEMORY_BYTES:
                self._file = tempfile.TemporaryFile(dir=spool_dir, buffering=0)  # noqa: SIM115 (closed with us)
            else:
                self._memory = bytearray(head.body_bytes)
        except OSError as error:
            raise _no_disk(error) from None
        except MemoryError:
            raise TransportError(
                "spool.memory", "there is not enough memory for a message", remedy="give the process more memory"
            ) from None

    @property
    def kind(self) -> str:
        return self.head.kind

    @property
    def meta(self) -> dict[str, Json]:
        return self.head.meta

    @property
    def missing_bytes(self) -> int:
        """Body bytes still to come."""
        return self.head.body_bytes - self._written

    @property
    def body_received(self) -> int:
        """Body bytes that have come."""
        return self._written

    @property
    def body_sha256(self) -> bytes:
        """SHA-256 of the body received so far."""
        return self._hash.digest()

    def write(self, data: bytes | memoryview) -> None:
        """Append body bytes; raises ProtocolError if more come than were declared."""
        if len(data) > self.missing_bytes:
            raise ProtocolError("wire.too-long", "a body is longer than its header declares")
        if self._file is None:
            self._memory[self._written : self._written + len(data)] = data
        else:
            left = memoryview(data)
            try:
                while left:  # a disk that is nearly full takes a part
                    left = left[self._file.write(left) :]
            except OSError as error:
                raise _no_disk(error) from None
        self._hash.update(data)
        self._written += len(data)

    def _place(self, name: str) -> tuple[ArraySpec, int]:
        offset = 0
        for spec in self.head.specs:
            if spec.name == name:
                return spec, offset
            offset += padded(spec.size_bytes)
        raise ProtocolError("reply.fields", "a reply lacks a declared field", field=name)

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        """One array in flat pieces of at most 4 MiB: (offset in elements, read-only piece)."""
        spec, start = self._place(name)
        item = int(spec.dtype[2:])
        for done in range(0, spec.size_bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, spec.size_bytes - done)
            piece = np.frombuffer(self._read(start + done, size), dtype=spec.dtype)
            piece.flags.writeable = False
            yield done // item, piece

    def array(self, name: str) -> Array:
        """One whole array, read-only."""
        spec, start = self._place(name)
        array = np.frombuffer(self._read(start, spec.size_bytes), dtype=spec.dtype).reshape(spec.shape)
        array.flags.writeable = False
        return array

    def arrays(self) -> dict[str, Array]:
        """All arrays, read-only (views of the received buffer when it is in memory)."""
        if self._file is None:
            return read_body(self.head, self._memory)
        return {spec.name: self.array(spec.name) for spec in self.head.specs}

    def _read(self, start: int, size: int) -> memoryview:
        if self._file is None:
            return memoryview(self._memory)[start : start + size]
        left = whole = memoryview(bytearray(size))
        while left:  # one read gives at most 2 GiB
            got = os.preadv(self._file.fileno(), [left], start + size - len(left))
            if not got:
                raise ProtocolError("wire.truncated", "a body is read before it has come")
            left = left[got:]
        return whole

    def message(self) -> Message:
        """The whole message, in memory."""
        return Message(self.kind, self.meta, self.arrays())

    def close(self) -> None:
        """Give up the file or memory."""
        if self._file is not None:
            self._file.close()
        self._memory = bytearray()


def _no_disk(error: OSError) -> TransportError:
    return TransportError(
        "spool.disk", f"a message cannot be spooled: {os.strerror(error.errno or 0)}",
        remedy="free disk space in the coordinator's folder",
    )  # fmt: skip
