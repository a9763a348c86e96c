"""Envelopes between the sites of one run (see :class:`atoll.contract.mail.Mail`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from atoll.contract.errors import ProtocolError
from atoll.contract.mail import SEAL_BYTES, SIGNED_KEY_BYTES
from atoll.crypto.prg import label
from atoll.crypto.session import Session, check_claim, claim


class Mailbox:
    """One program's, at one site, in one run."""

    def __init__(
        self, name: str, run: str, program: str, session: Session, sign: Callable[[bytes], bytes],
        roster: Mapping[str, bytes], agreed: str,
    ) -> None:  # fmt: skip
        """roster: the cohort's public identity keys (raw) by site. sign: by the site's own identity."""
        self._name, self._run, self._program, self._session = name, run, program, session
        self._sign, self._roster, self._agreed = sign, roster, agreed
        self._checked: dict[tuple[str, bytes], bytes] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self._roster))

    @cached_property
    def key(self) -> bytes:
        public = self._session.public
        return public + self._sign(claim(self._run, self._agreed, self._name, public))

    def seal(self, receiver: str, key: bytes, step: str, number: int, data: bytes) -> bytes:
        public = self._public(receiver, key)
        return self._session.seal(public, self._about(step, number, self._name, receiver), data)

    def unseal(self, sender: str, key: bytes, step: str, number: int, sealed: bytes, size: int) -> bytes:
        if len(sealed) != size + SEAL_BYTES:
            raise ProtocolError("mail.size", "an envelope is not of the size that its round says", field=sender)
        public = self._public(sender, key)
        return self._session.unseal(public, self._about(step, number, sender, self._name), sealed)

    def _public(self, site: str, key: bytes) -> bytes:
        """The public key in *key*, after checking whose it is."""
        if site not in self._roster or site == self._name:
            raise ProtocolError(
                "mail.no-such-site", "mail goes to other sites of the run's roster only", field=site,
                remedy="the coordinator does not keep the protocol: do not go on with it",
            )  # fmt: skip
        if len(key) != SIGNED_KEY_BYTES:
            raise ProtocolError("session.malformed", "a session key is not of the right size", field=site)
        if (site, key) not in self._checked:  # every round writes to the same few
            public = check_claim(key, self._run, self._agreed, site, self._roster[site])
            self._checked = {**self._checked, (site, key): public}
        return self._checked[site, key]

    def _about(self, step: str, number: int, sender: str, receiver: str) -> bytes:
        return label("atoll mail 1", self._run, self._agreed, self._program, step, number, sender, receiver)
