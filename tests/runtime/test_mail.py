"""Mail between sites: it opens for its receiver, once it is about the same, and for nobody else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import IntegrityError, ProtocolError
from atoll.contract.mail import SEAL_BYTES, SIGNED_KEY_BYTES
from atoll.crypto import session
from atoll.crypto.identity import Identity
from atoll.crypto.session import Session
from atoll.runtime.mail import Mailbox

NAMES = ("east", "north", "west")
IDENTITIES = {name: Identity.generate(name) for name in NAMES}
ROSTER = {name: IDENTITIES[name].public for name in NAMES}
SESSIONS = {name: Session(Session.fresh()) for name in NAMES}


def box(name: str, **other: Any) -> Mailbox:
    about = {"run": "r", "program": "p", "session": SESSIONS[name], "agreed": "h", **other}
    return Mailbox(name, sign=IDENTITIES[name].sign, roster=ROSTER, **about)


def test_the_sizes_that_programs_declare_are_those_of_the_envelopes() -> None:
    assert (SEAL_BYTES, SIGNED_KEY_BYTES) == (session.SEAL_BYTES, session.SIGNED_BYTES)


@settings(max_examples=25)
@given(data=st.binary(max_size=200), number=st.integers(0, 2**40))
def test_it_opens_for_its_receiver(data: bytes, number: int) -> None:
    east, west = box("east"), box("west")
    sealed = east.seal("west", west.key, "model", number, data)
    assert len(sealed) == len(data) + SEAL_BYTES
    assert west.unseal("east", east.key, "model", number, sealed, len(data)) == data
    assert len(data) < 8 or data not in sealed


def test_it_opens_for_nobody_else_and_not_again() -> None:
    east, west, north = box("east"), box("west"), box("north")
    sealed = east.seal("west", west.key, "model", 3, b"x" * 40)
    tries = [
        (north, "east", east.key, "model", 3),  # sent elsewhere
        (west, "north", north.key, "model", 3),  # put down to another
        (west, "east", east.key, "model", 4),  # an earlier round's
        (west, "east", east.key, "other", 3),
        (box("west", run="s"), "east", box("east", run="s").key, "model", 3),  # another run's
        (box("west", program="q"), "east", east.key, "model", 3),
        (box("west", agreed="i"), "east", box("east", agreed="i").key, "model", 3),
        (east, "west", west.key, "model", 3),  # back to its sender
    ]
    for reader, sender, key, step, number in tries:
        with pytest.raises(IntegrityError) as caught:
            reader.unseal(sender, key, step, number, sealed, 40)
        assert caught.value.code == "envelope.altered"
    altered = bytes([*sealed[:-1], sealed[-1] ^ 1])
    with pytest.raises(IntegrityError):
        west.unseal("east", east.key, "model", 3, altered, 40)


def test_keys_must_be_signed_for_this_run_by_whom_they_are_said_to_be_of() -> None:
    east, west, north = box("east"), box("west"), box("north")
    made_up = Session(Session.fresh()).public + b"\0" * 64
    for key in (north.key, made_up, box("west", run="s").key, box("west", agreed="i").key):
        with pytest.raises(IntegrityError) as caught:
            east.seal("west", key, "model", 1, b"secret")
        assert caught.value.code == "session.not-signed"
    for name in ("east", "south"):
        with pytest.raises(ProtocolError) as refused:
            east.seal(name, west.key, "model", 1, b"secret")
        assert refused.value.code == "mail.no-such-site"
    with pytest.raises(ProtocolError):
        east.seal("west", west.key[:-1], "model", 1, b"secret")


@pytest.mark.parametrize("size", [39, 41, 0, 10**12])
def test_envelopes_of_another_size_are_refused_unopened(size: int) -> None:
    east, west = box("east"), box("west")
    with pytest.raises(ProtocolError) as caught:
        west.unseal("east", east.key, "model", 1, east.seal("west", west.key, "model", 1, b"x" * 40), size)
    assert caught.value.code == "mail.size"
