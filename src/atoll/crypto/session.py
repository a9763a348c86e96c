"""A party's key for one run: agreement with others (X25519, RFC 7748) and sealed envelopes between them.

The public key is signed by the party's identity for this run and roster alone, so that neither another
run's key nor one that the coordinator made up passes. An envelope's key is derived for one (run, round,
attempt, step, sender, receiver), which are its associated data too (ChaCha20-Poly1305, RFC 8439).
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from atoll.contract.errors import IntegrityError
from atoll.crypto.identity import SIGNATURE_BYTES, verify
from atoll.crypto.prg import derive, label

PUBLIC_BYTES = 32
SIGNED_BYTES = PUBLIC_BYTES + SIGNATURE_BYTES
NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16
"""How much longer an envelope is than what it holds."""


class Session:
    """An X25519 key. The private part is 32 bytes, kept by the site's journal until the run ends."""

    def __init__(self, private: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()
        self._agreed: dict[bytes, bytes] = {}

    @staticmethod
    def fresh() -> bytes:
        """A new private key."""
        return Session.fresh_pair()[0]

    @staticmethod
    def fresh_pair() -> tuple[bytes, bytes]:
        """A new key: (private, public)."""
        key = X25519PrivateKey.generate()
        return key.private_bytes_raw(), key.public_key().public_bytes_raw()

    def pair(self, other: bytes, *purpose: str | int | bytes) -> bytes:
        """A 32-byte key that only this party and the holder of *other* have. Raises IntegrityError for a
        public key of low order."""
        if other not in self._agreed:  # every round seals for the same others
            try:
                self._agreed[other] = self._key.exchange(X25519PublicKey.from_public_bytes(other))
            except ValueError:
                raise IntegrityError("session.key", "a public key is not one", field="session") from None
        both = sorted((self.public, other))
        return derive(self._agreed[other], "pair", *both, *purpose)

    def seal(self, receiver: bytes, about: bytes, data: bytes) -> bytes:
        """*data* for the holder of *receiver* alone, bound to *about*: SEAL_BYTES longer."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + ChaCha20Poly1305(self.pair(receiver, "envelope", about)).encrypt(nonce, data, about)

    def unseal(self, sender: bytes, about: bytes, sealed: bytes) -> bytes:
        """What the holder of *sender* sealed; raises IntegrityError if it was altered or is about something else."""
        try:
            key = ChaCha20Poly1305(self.pair(sender, "envelope", about))
            return key.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about)
        except (InvalidTag, ValueError):
            raise IntegrityError(
                "envelope.altered", "a sealed envelope was altered, or is another round's", field="envelope",
                remedy="compare both parties' ledgers; do not go on with a party that does this",
            ) from None  # fmt: skip

    def __repr__(self) -> str:
        return "Session()"


def claim(run: str, agreed: str, site: str, public: bytes) -> bytes:
    """What an identity signs of a session key: it is *site*'s, in this run, by this plan among this roster (their
    digest)."""
    return label("atoll session 1", run, agreed, site, public)


def check_claim(signed: bytes, run: str, agreed: str, site: str, identity: bytes) -> bytes:
    """The public session key in *signed* (key, then signature), after checking that *site*'s identity signed it
    for this run, plan and roster; raises IntegrityError otherwise."""
    try:
        verify(identity, signed[PUBLIC_BYTES:], claim(run, agreed, site, signed[:PUBLIC_BYTES]))
    except IntegrityError:
        raise IntegrityError(
            "session.not-signed", "a session key is not signed by its site's approved identity for this run",
            field=site, remedy="compare identity fingerprints with that site's operator",
        ) from None  # fmt: skip
    return signed[:PUBLIC_BYTES]
