"""Identities: Ed25519 as in RFC 8032, in files that only their owner can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import IntegrityError
from atoll.crypto.identity import (
    PUBLIC_BYTES,
    SIGNATURE_BYTES,
    Identity,
    check_private,
    fingerprint,
    verify,
    write_private,
)
from atoll.crypto.pki import key_pem

RFC_8032_7_1 = [  # TEST 1, TEST 2, TEST 3: secret key, public key, message, signature
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize("vector", RFC_8032_7_1, ids=["test-1", "test-2", "test-3"])
def test_published_vectors(vector: tuple[str, str, str, str]) -> None:
    secret, public, message, signature = map(bytes.fromhex, vector)
    identity = Identity("north", Ed25519PrivateKey.from_private_bytes(secret))
    assert identity.public == public and len(public) == PUBLIC_BYTES
    assert identity.sign(message) == signature and len(signature) == SIGNATURE_BYTES
    verify(public, signature, message)
    for wrong in (message + b"\0", b"x" + message):
        with pytest.raises(IntegrityError):
            verify(public, signature, wrong)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=64), st.integers(0, SIGNATURE_BYTES * 8 - 1), st.integers(0, PUBLIC_BYTES * 8 - 1))
def test_any_flipped_bit_is_found(message: bytes, signature_bit: int, key_bit: int) -> None:
    identity = Identity.generate("north")
    signature = identity.sign(message)
    verify(identity.public, signature, message)

    def flipped(data: bytes, bit: int) -> bytes:
        return (int.from_bytes(data, "big") ^ (1 << bit)).to_bytes(len(data), "big")

    for public, sig in [
        (identity.public, flipped(signature, signature_bit)),
        (flipped(identity.public, key_bit), signature),
        (Identity.generate("south").public, signature),
    ]:
        with pytest.raises(IntegrityError) as error:
            verify(public, sig, message)
        assert error.value.code == "signature.wrong"


@pytest.mark.parametrize("public", [b"", b"short", bytes(31), bytes(33), b"\xff" * 32])
@pytest.mark.parametrize("signature", [b"", b"short", bytes(63), bytes(64), bytes(65)])
def test_malformed_keys_and_signatures(public: bytes, signature: bytes) -> None:
    with pytest.raises(IntegrityError):
        verify(public, signature, b"message")


def test_a_failed_verification_is_not_remembered_as_a_success() -> None:
    identity = Identity.generate("north")
    signature = identity.sign(b"message")
    for _ in range(3):
        with pytest.raises(IntegrityError):
            verify(identity.public, signature, b"other")
        verify(identity.public, signature, b"message")


# ---------------------------------------------------------------- files


def test_a_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    identity = Identity.generate("north")
    previous = os.umask(0)
    try:
        identity.save(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = Identity.load("north", path)
    assert loaded.public == identity.public
    verify(identity.public, loaded.sign(b"message"), b"message")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601, 0o610, 0o666, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    Identity.generate("north").save(path)
    path.chmod(mode)
    with pytest.raises(IntegrityError) as error:
        Identity.load("north", path)
    assert error.value.code == "key.permissions" and "chmod 600" in error.value.remedy
    path.chmod(0o400)
    Identity.load("north", path)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    Identity.generate("north").save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        Identity.generate("north").save(path)
    with pytest.raises(FileExistsError):
        write_private(path, b"other")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "link", b"other")
    assert path.read_bytes() == before == check_private(path) and not (tmp_path / "elsewhere").exists()


def test_other_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    write_private(path, key_pem(generate_private_key(SECP256R1())))
    with pytest.raises(IntegrityError) as error:
        Identity.load("north", path)
    assert error.value.code == "key.type"


@pytest.mark.parametrize("content", [b"", b"text", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_key_file_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    write_private(path, content)
    with pytest.raises(IntegrityError) as error:
        Identity.load("north", path)
    assert (error.value.field == "identity.key" and content.decode() not in str(error.value)) or not content


def test_the_private_key_is_not_shown(tmp_path: Path) -> None:
    identity = Identity.generate("north")
    identity.save(tmp_path / "k")
    shown = repr(identity) + str(identity)
    assert "north" in shown and fingerprint(identity.public) in shown
    secret = Ed25519PrivateKey.from_private_bytes(bytes(32)).private_bytes_raw()
    assert secret.hex() not in repr(Identity("n", Ed25519PrivateKey.from_private_bytes(secret)))


def test_a_fingerprint_can_be_read_aloud() -> None:
    one, two = (Identity.generate("north").public for _ in range(2))
    shown = fingerprint(one)
    assert shown == fingerprint(one) != fingerprint(two)
    groups = shown.split(":")
    assert len(groups) == 8 and all(len(group) == 4 and set(group) <= set("0123456789abcdef") for group in groups)
