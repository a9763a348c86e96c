"""Pseudo-random bytes: key derivation (HKDF, RFC 5869) and expansion (AES-256-CTR, NIST SP 800-38A).

A key is derived for one purpose only: every label (run, round, attempt, pair, …) is hashed with its
length, so that no two purposes share one. A stream's key is used once, so its counter starts at zero.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from atoll.contract.wire import Array

KEY_BYTES = 32
CHUNK_BYTES = 1 << 18
"""Masks are made and added piece by piece, each small enough to stay in a core's cache."""
_ZEROS = memoryview(bytes(CHUNK_BYTES))


def fresh_key() -> bytes:
    """32 bytes of the operating system's randomness."""
    return os.urandom(KEY_BYTES)


def label(*parts: str | int | bytes) -> bytes:
    """An unambiguous encoding of *parts*: each with its length."""
    encoded = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def derive(secret: bytes, *parts: str | int | bytes) -> bytes:
    """A 32-byte key for the purpose that *parts* name (HKDF-SHA256)."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=label("atoll", *parts)).derive(secret)


class Stream:
    """The pseudo-random bytes of one key, from its first to its last."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def bytes(self, size: int) -> bytes:
        """The next *size* bytes."""
        return self._encryptor.update(bytes(size))

    def into(self, buffer: Any) -> None:
        """Fill a writable buffer of at most CHUNK_BYTES with the next bytes."""
        self._encryptor.update_into(_ZEROS[: len(buffer)], buffer)


def pieces_of(vector: Array, streams: Sequence[Stream]) -> Iterator[tuple[int, Array, Iterator[Array]]]:
    """*vector* in pieces along its first axis: (where it begins, the piece, every stream's next bytes like the piece).

    The bytes are in the same memory each time: use them before asking for the next.
    """
    step = CHUNK_BYTES // (vector.nbytes // len(vector)) if len(vector) else 1
    scratch = memoryview(bytearray(min(CHUNK_BYTES, vector.nbytes)))
    for start in range(0, len(vector), step):
        piece = vector[start : start + step]
        view = scratch[: piece.nbytes]
        mask = np.frombuffer(view, vector.dtype).reshape(piece.shape)

        def masks(view: memoryview = view, mask: Array = mask) -> Iterator[Array]:
            for stream in streams:
                stream.into(view)
                yield mask

        yield start, piece, masks()


@cache
def mask_bytes_s() -> float:
    """How many bytes of mask a core of this machine makes in a second; measured once."""
    stream, buffer = Stream(fresh_key()), bytearray(CHUNK_BYTES)
    start = time.perf_counter()
    for _ in range(32):
        stream.into(buffer)
    return 32 * CHUNK_BYTES / (time.perf_counter() - start)
