"""Mail from site to site, by way of the coordinator, which carries envelopes that it cannot open."""

from __future__ import annotations

from typing import Protocol

SIGNED_KEY_BYTES = 96
"""A site's public key for the run, and its identity's signature of it."""
SEAL_BYTES = 28
"""How much longer an envelope is than what it holds."""


class Mail(Protocol):
    """What a handler may write to other sites of the roster, and read of theirs.

    A site's key is signed by its approved identity for this run and roster. An envelope is sealed for one receiver
    (X25519, then ChaCha20-Poly1305) and bound to run, roster, program, sender, receiver, *step* and *number*: another
    site's, an earlier one's and another run's do not open. Keys and envelopes come by the coordinator: untrusted.
    """

    @property
    def sites(self) -> tuple[str, ...]:
        """The run's roster, ordered by name."""

    @property
    def key(self) -> bytes:
        """The site's own signed key, SIGNED_KEY_BYTES: what others need to write to it."""

    def seal(self, receiver: str, key: bytes, step: str, number: int, data: bytes) -> bytes:
        """*data* for *receiver*, whose signed key is *key*; SEAL_BYTES longer. Raises IntegrityError for a key that is
        not its own, ProtocolError for a site that is not in the roster."""

    def unseal(self, sender: str, key: bytes, step: str, number: int, sealed: bytes, size: int) -> bytes:
        """The *size* bytes that *sender* sealed for this site. Raises IntegrityError for a key that is not its own, and
        for an envelope that was altered or is another's; ProtocolError for another size."""
