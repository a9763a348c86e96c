"""Incoming bodies: the same in memory and on disk, never more than was declared, never silently less."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from atoll.contract.errors import ProtocolError, TransportError
from atoll.contract.wire import DTYPES, Head, Message, encode_bytes, read_head
from atoll.transport import spool
from atoll.transport.spool import Incoming

PLACES = ["memory", "disk"]


@pytest.fixture(params=PLACES)
def spooling(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Where bodies go; on disk even small ones."""
    if request.param == "memory":
        return None
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", -1)
    return tmp_path


def split(message: Message) -> tuple[Head, bytes]:
    data = encode_bytes(message)
    head = read_head(data)
    return head, data[head.body_offset :]


def received(head: Head, body: bytes, spool_dir: Path | None, chunk: int = 1000) -> Incoming:
    incoming = Incoming(head, spool_dir)
    for start in range(0, len(body), chunk):
        assert incoming.missing_bytes == len(body) - start and incoming.body_received == start
        incoming.write(memoryview(body)[start : start + chunk])
    return incoming


MESSAGE = Message(
    "release",
    {"re": "x", "n": 1},
    {"a": np.arange(1000.0).reshape(10, 100), "b": np.array(7, "<i2"), "c": np.zeros((0, 3), "<f4"), "d": np.ones(5)},
)


@pytest.mark.parametrize("chunk", [1, 7, 8192, 10**6])
def test_what_was_sent_is_received(spooling: Path | None, chunk: int) -> None:
    head, body = split(MESSAGE)
    incoming = received(head, body, spooling, chunk)
    assert (incoming.kind, incoming.meta, incoming.missing_bytes) == ("release", MESSAGE.meta, 0)
    assert incoming.body_sha256 == hashlib.sha256(body).digest()
    arrays = incoming.arrays()
    assert list(arrays) == list(MESSAGE.arrays)
    for name, sent in MESSAGE.arrays.items():
        for got in (arrays[name], incoming.array(name), incoming.message().arrays[name]):
            assert got.dtype == sent.dtype and got.shape == sent.shape and np.array_equal(got, sent)
            assert not got.flags.writeable
    incoming.close()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(sorted(DTYPES)).flatmap(
            lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
        ),
        max_size=4,
    ),
    st.sampled_from(PLACES),
    st.integers(8, 64).map(lambda n: n // 8 * 8),
)
def test_pieces_array_and_arrays_are_the_same_bits(sent: list[Any], place: str, piece_bytes: int) -> None:
    head, body = split(Message("k", {}, {str(n): array for n, array in enumerate(sent)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PIECE_BYTES", piece_bytes)
        patch.setattr(spool, "IN_MEMORY_BYTES", -1)
        incoming = received(head, body, Path(tempfile.gettempdir()) if place == "disk" else None)
        for n, array in enumerate(sent):
            whole = incoming.array(str(n))
            assert whole.tobytes() == incoming.arrays()[str(n)].tobytes() == array.tobytes()
            assert whole.shape == array.shape
            done = 0
            for offset, piece in incoming.pieces(str(n)):
                assert offset == done and piece.ndim == 1 and piece.dtype == whole.dtype and not piece.flags.writeable
                assert 0 < piece.nbytes <= piece_bytes
                assert piece.tobytes() == whole.reshape(-1)[offset : offset + piece.size].tobytes()
                done += piece.size
            assert done == whole.size
        incoming.close()


def test_pieces_of_a_large_array(tmp_path: Path) -> None:
    """With the real limits: 10 MiB go to disk and come back in pieces of 4 MiB."""
    sent = np.random.default_rng(0).standard_normal((10 << 20) // 8)
    head, body = split(Message("k", {}, {"a": np.zeros(3), "x": sent}))
    incoming = received(head, body, tmp_path, 1 << 20)
    assert incoming.body_sha256 == hashlib.sha256(body).digest()
    pieces = list(incoming.pieces("x"))
    assert [offset for offset, _ in pieces] == [0, 1 << 19, 2 << 19]
    assert np.array_equal(np.concatenate([piece for _, piece in pieces]), sent)
    assert list(tmp_path.iterdir()) == []  # no name that could be opened, or left behind
    incoming.close()


def test_only_large_bodies_go_to_disk(tmp_path: Path) -> None:
    for size, on_disk in ((spool.IN_MEMORY_BYTES, False), (spool.IN_MEMORY_BYTES + 8, True)):
        head, body = split(Message("k", {}, {"x": np.zeros(size, "|u1")}))
        incoming = received(head, body, tmp_path, 1 << 20)
        before = incoming.array("x")
        incoming.close()
        assert on_disk == (incoming._file is not None)
        assert before.sum() == 0  # what was read stays


def test_more_than_was_declared_is_refused(spooling: Path | None) -> None:
    head, body = split(MESSAGE)
    for first, more in ((body, b"\0"), (b"", body + b"\0"), (body[:-1], b"xy")):
        incoming = Incoming(head, spooling)
        incoming.write(first)
        with pytest.raises(ProtocolError) as error:
            incoming.write(more)
        assert error.value.code == "wire.too-long"
        assert incoming.body_sha256 == hashlib.sha256(first).digest()
        incoming.close()


def test_an_undeclared_array_is_not_there(spooling: Path | None) -> None:
    head, body = split(MESSAGE)
    incoming = received(head, body, spooling)
    for read in (incoming.array, lambda name: list(incoming.pieces(name))):
        with pytest.raises(ProtocolError) as error:
            read("z")
        assert (error.value.code, error.value.field) == ("reply.fields", "z")
    incoming.close()


def test_an_empty_body(spooling: Path | None) -> None:
    for arrays in ({}, {"e": np.zeros((0, 4))}):
        head, body = split(Message("k", {"m": 1}, arrays))
        incoming = received(head, body, spooling)
        assert body == b"" and incoming.body_sha256 == hashlib.sha256(b"").digest()
        assert [a.shape for a in incoming.arrays().values()] == [a.shape for a in arrays.values()]
        assert all(list(incoming.pieces(name)) == [] for name in arrays)
        incoming.close()


def test_memory_is_not_taken_for_a_body_on_disk(tmp_path: Path) -> None:
    head = Head("k", {}, read_head(encode_bytes(Message("k", {}, {"x": np.zeros(8, "|u1")}))).specs, 0, 2**50)
    incoming = Incoming(head, tmp_path)
    assert incoming.missing_bytes == 2**50
    incoming.close()
    with pytest.raises(TransportError) as error:
        Incoming(Head("k", {}, head.specs, 0, 2**62))
    assert error.value.code == "spool.memory"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    head = Head("k", {}, (), 0, 2**30)
    with pytest.raises(TransportError) as error:
        Incoming(head, tmp_path / "nowhere")
    assert error.value.code == "spool.disk"


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from atoll.contract.errors import TransportError
from atoll.contract.wire import Message, encode_bytes, read_head
from atoll.transport import spool

data = encode_bytes(Message("k", {}, {"x": np.arange(1 << 20)}))
head = read_head(data)
incoming = spool.Incoming(head, Path(sys.argv[1]))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
half = len(data) // 2 + 1  # in the middle of a chunk: the first write that fails takes a part
resource.setrlimit(resource.RLIMIT_FSIZE, (half, hard))
try:
    incoming.write(memoryview(data)[head.body_offset:])
except TransportError as error:
    assert error.code == "spool.disk" and error.remedy, error
else:
    sys.exit("a full disk was not noticed")
"""


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_disk_that_takes_only_parts_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write(2) may take less than it was given; pread(2) may give less than it was asked for."""
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", -1)
    head, body = split(MESSAGE)
    incoming = Incoming(head, tmp_path)
    file = incoming._file

    class Slow:
        def write(self, data: memoryview) -> int:
            return file.write(data[:100])  # type: ignore[union-attr]

        def fileno(self) -> int:
            return file.fileno()  # type: ignore[union-attr]

        def close(self) -> None:
            file.close()  # type: ignore[union-attr]

    incoming._file = Slow()  # type: ignore[assignment]
    incoming.write(body)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:64]], offset))
    assert np.array_equal(incoming.array("a"), MESSAGE.arrays["a"])
    assert incoming.body_sha256 == hashlib.sha256(body).digest()
    incoming.close()


def test_reading_too_early_on_disk_is_no_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", -1)
    head, body = split(MESSAGE)
    incoming = Incoming(head, tmp_path)
    incoming.write(body[:100])
    with pytest.raises(ProtocolError):
        incoming.array("a")
    incoming.close()
