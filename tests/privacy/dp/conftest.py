"""Streams for the samplers: a seeded SHAKE-256, and one that is scripted word by word."""

import hashlib

import pytest


class Shake:
    """SHAKE-256 in counter mode."""

    def __init__(self, seed: int) -> None:
        self._seed, self._calls = seed, 0

    def bytes(self, n: int) -> bytes:
        self._calls += 1
        return hashlib.shake_256(f"{self._seed}/{self._calls}".encode()).digest(n)


class Scripted:
    """Gives the 64-bit words it was made of, and fails when there are no more."""

    def __init__(self, *words: int) -> None:
        self.left = b"".join(word.to_bytes(8, "little") for word in words)

    def bytes(self, n: int) -> bytes:
        assert n <= len(self.left), "more was drawn than scripted"
        given, self.left = self.left[:n], self.left[n:]
        return given


@pytest.fixture
def shake():
    return Shake


@pytest.fixture
def scripted():
    return Scripted
