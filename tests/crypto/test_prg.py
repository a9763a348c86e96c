"""Key derivation and expansion against published vectors, and what must never be equal."""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from atoll.crypto.prg import CHUNK_BYTES, KEY_BYTES, Stream, derive, fresh_key, label, pieces_of

RFC_5869 = [  # appendix A.1 … A.3: IKM, salt, info, length, OKM
    (
        "0b" * 22, "000102030405060708090a0b0c", "f0f1f2f3f4f5f6f7f8f9", 42,
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(), bytes(range(0x60, 0xB0)).hex(), bytes(range(0xB0, 0x100)).hex(), 82,
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22, "", "", 42,
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]  # fmt: skip


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 as RFC 5869 §2 writes it, on hmac alone: the second implementation."""
    key = hmac.digest(salt or bytes(32), secret, "sha256")
    block, out = b"", b""
    for i in range(1, -(-size // 32) + 1):
        block = hmac.digest(key, block + info + bytes([i]), "sha256")
        out += block
    return out[:size]


@pytest.mark.parametrize(("secret", "salt", "info", "size", "wanted"), RFC_5869)
def test_the_second_implementation_is_rfc_5869(secret: str, salt: str, info: str, size: int, wanted: str) -> None:
    assert hkdf(*map(bytes.fromhex, (secret, salt, info)), size).hex() == wanted


def test_a_key_without_info_is_the_vectors_first_bytes() -> None:
    """RFC 5869 A.3 has neither salt nor info; derive() differs from it in its label alone."""
    secret, _, _, _, wanted = RFC_5869[2]
    assert hkdf(bytes.fromhex(secret), b"", b"", KEY_BYTES).hex() == wanted[: 2 * KEY_BYTES]
    assert derive(bytes.fromhex(secret)) == hkdf(bytes.fromhex(secret), b"", label("atoll"), KEY_BYTES)


@given(st.binary(min_size=1, max_size=80), st.lists(st.one_of(st.binary(), st.text(), st.integers())))
def test_derive_is_hkdf_sha256_over_an_unambiguous_label(secret: bytes, parts: list[str | int | bytes]) -> None:
    info = b""
    for part in ("atoll", *parts):
        data = part if isinstance(part, bytes) else str(part).encode()
        info += len(data).to_bytes(4, "big") + data
    assert derive(secret, *parts) == hkdf(secret, b"", info, 32)


@given(st.lists(st.binary(max_size=9), max_size=5), st.lists(st.binary(max_size=9), max_size=5))
def test_labels_are_equal_only_when_their_parts_are(one: list[bytes], other: list[bytes]) -> None:
    assert (label(*one) == label(*other)) == (one == other)


def test_labels_that_a_concatenation_would_confuse() -> None:
    assert len({label("ab", "c"), label("a", "bc"), label("abc"), label("abc", ""), label("", "abc")}) == 5
    assert label("run", 11, 1) != label("run", 1, 11)


def test_the_stream_is_aes_256_ctr() -> None:
    """NIST SP 800-38A F.5.5 starts at another counter block; its key and blocks through the stream's own cipher."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    wanted = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    counter = bytes(range(0xF0, 0x100))
    assert Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(plain).hex() == wanted
    one_block = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    blocks = b"".join(one_block.update(i.to_bytes(16, "big")) for i in range(300))
    assert Stream(key).bytes(4800) == blocks  # counts from zero, carrying into the second byte
    assert one_block.update(counter) == bytes(
        a ^ b for a, b in zip(bytes.fromhex(wanted[:32]), plain[:16], strict=True)
    )


@given(st.lists(st.integers(0, 5000), max_size=12))
def test_a_stream_goes_on_where_it_was(sizes: list[int]) -> None:
    key = hashlib.sha256(b"a test's key").digest()
    whole, parts = Stream(key), Stream(key)
    assert whole.bytes(sum(sizes)) == b"".join(parts.bytes(size) for size in sizes)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("size", [0, 1, 7, CHUNK_BYTES // 8, CHUNK_BYTES // 4 + 3, 200_001])
def test_pieces_are_the_streams_bytes_in_order(dtype: str, size: int) -> None:
    """However a vector is cut, element i is under the same bytes."""
    keys = [fresh_key(), fresh_key()]
    vector = np.zeros(size, dtype)
    starts = []
    for start, piece, masks in pieces_of(vector, [Stream(key) for key in keys]):
        starts.append((start, len(piece)))
        for mask in masks:
            piece += mask
    assert sum(length for _, length in starts) == size
    wanted = sum(np.frombuffer(Stream(key).bytes(vector.nbytes), dtype) for key in keys)
    assert np.array_equal(vector, np.zeros(0, dtype) if not size else wanted)


def test_fresh_keys_differ() -> None:
    assert len({fresh_key() for _ in range(100)}) == 100
    assert len(fresh_key()) == KEY_BYTES
