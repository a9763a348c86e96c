"""A party's identity: one Ed25519 key (RFC 8032), which signs its ledger and thereby its releases."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from atoll.contract.errors import IntegrityError

PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64


def write_private(path: Path, data: bytes) -> None:
    """Write *data* to a new file readable by its owner only; raises FileExistsError rather than overwrite."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def check_private(path: Path) -> bytes:
    """Read a secret file; raises IntegrityError when other users may read it."""
    if path.stat().st_mode & 0o077:
        raise IntegrityError(
            "key.permissions", f"{path.name} can be read by other users", field=path.name, remedy="chmod 600 the file"
        )
    return path.read_bytes()


def fingerprint(public: bytes) -> str:
    """SHA-256 of a raw public key as people compare it: 32 hex digits (128 bits) in groups of four."""
    digits = hashlib.sha256(b"atoll identity 1\0" + public).hexdigest()[:32]
    return ":".join(digits[i : i + 4] for i in range(0, 32, 4))


class Identity:
    """A named party with its signing key. The private key is never printed or sent."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self.name = name
        self._key = key
        self.public = key.public_key().public_bytes_raw()

    @staticmethod
    def generate(name: str) -> Identity:
        """A fresh identity from the operating system's randomness."""
        return Identity(name, Ed25519PrivateKey.generate())

    @staticmethod
    def load(name: str, path: Path) -> Identity:
        """Read the key from a PEM file (mode 0600, else IntegrityError)."""
        try:
            key = load_pem_private_key(check_private(path), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise IntegrityError(
                "key.malformed", f"{path.name} holds no readable key", field=path.name, remedy="restore it from a copy"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise IntegrityError("key.type", f"{path.name} is not an Ed25519 key", field=path.name)
        return Identity(name, key)

    def save(self, path: Path) -> None:
        """Write the key as PKCS #8 PEM, mode 0600; raises FileExistsError rather than overwrite."""
        write_private(path, self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature of *data*, 64 bytes. Callers prefix a context of their own."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"Identity({self.name!r}, {fingerprint(self.public)})"


@lru_cache(maxsize=4096)
def verify(public: bytes, signature: bytes, data: bytes) -> None:
    """Raise IntegrityError unless *signature* is *public*'s over *data*.

    Successes are remembered (verifying is a pure function), so that many sites of one
    process checking one grouped signature pay once.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise IntegrityError(
            "signature.wrong", "a signature does not verify", remedy="check that the roster holds the party's own key"
        ) from None
