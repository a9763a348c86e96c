"""Session keys and sealed envelopes: published vectors through the session, and everything that must not open."""

from __future__ import annotations

import hmac
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import IntegrityError
from atoll.crypto import session as module
from atoll.crypto.identity import Identity
from atoll.crypto.prg import label
from atoll.crypto.session import NONCE_BYTES, SEAL_BYTES, SIGNED_BYTES, Session, check_claim, claim

# RFC 7748 §6.1
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB_PUBLIC = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
SHARED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
# RFC 8439 §2.8.2
AEAD_KEY, NONCE = bytes(range(0x80, 0xA0)), bytes.fromhex("070000004041424344454647")
ABOUT = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
PLAIN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
SEALED = bytes.fromhex(
    "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b1a71de0a9e060b29"
    "05d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc3ff4def08e4b7a9de576d26586cec64b"
    "61161ae10b594f09e26a7e902ecbd0600691"
)
LOW_ORDER = [  # points of small order on the curve and its twist, and other spellings of them (RFC 7748 §7)
    "00" * 32, "01" + "00" * 31, "ecffffff" + "ff" * 27 + "7f", "edffffff" + "ff" * 27 + "7f",
    "eeffffff" + "ff" * 27 + "7f", "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
]  # fmt: skip


def hkdf(secret: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 without salt, on hmac alone."""
    return hmac.digest(hmac.digest(bytes(32), secret, "sha256"), info + b"\1", "sha256")


def test_x25519_as_published() -> None:
    alice, bob = Session(ALICE), Session(BOB)
    assert (alice.public, bob.public) == (ALICE_PUBLIC, BOB_PUBLIC)
    both = sorted((ALICE_PUBLIC, BOB_PUBLIC))
    assert alice.pair(BOB_PUBLIC, "mask", 7) == bob.pair(ALICE_PUBLIC, "mask", 7)
    assert alice.pair(BOB_PUBLIC, "mask", 7) == hkdf(SHARED, label("atoll", "pair", *both, "mask", 7))


def test_envelopes_are_the_published_aead(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the RFC's key and nonce in place of the derived ones, the session's envelope is the RFC's."""
    monkeypatch.setattr(Session, "pair", lambda *_: AEAD_KEY)
    monkeypatch.setattr(module.os, "urandom", lambda size: NONCE[:size])
    session = Session(ALICE)
    assert session.seal(BOB_PUBLIC, ABOUT, PLAIN) == NONCE + SEALED
    assert session.unseal(BOB_PUBLIC, ABOUT, NONCE + SEALED) == PLAIN


@given(st.binary(max_size=300), st.binary(max_size=40))
def test_what_is_sealed_is_opened_by_its_receiver(data: bytes, about: bytes) -> None:
    alice, bob = Session(ALICE), Session(BOB)
    sealed = alice.seal(bob.public, about, data)
    assert len(sealed) == len(data) + SEAL_BYTES
    assert bob.unseal(alice.public, about, sealed) == data
    key = hkdf(SHARED, label("atoll", "pair", *sorted((alice.public, bob.public)), "envelope", about))
    assert ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about) == data


def test_two_envelopes_of_the_same_are_different() -> None:
    alice = Session(ALICE)
    sealed = {alice.seal(BOB_PUBLIC, b"about", b"data") for _ in range(50)}
    assert len({one[:NONCE_BYTES] for one in sealed}) == len(sealed) == 50


@given(st.data())
def test_any_altered_bit_is_refused(data: st.DataObject) -> None:
    alice, bob = Session(ALICE), Session(BOB)
    sealed = bytearray(alice.seal(bob.public, b"about", b"a share of a secret"))
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[bit // 8] ^= 1 << (bit % 8)
    _refused(lambda: bob.unseal(alice.public, b"about", bytes(sealed)))


def test_what_must_not_open() -> None:
    alice, bob, carol = Session(ALICE), Session(BOB), Session(Session.fresh())
    sealed = alice.seal(bob.public, b"share 1", b"a share of a secret")
    _refused(lambda: bob.unseal(alice.public, b"share 2", sealed))  # another round's
    _refused(lambda: carol.unseal(alice.public, b"share 1", sealed))  # another receiver's
    _refused(lambda: bob.unseal(carol.public, b"share 1", sealed))  # another sender's
    _refused(lambda: bob.unseal(alice.public, b"share 1", sealed[:-1]))
    _refused(lambda: bob.unseal(alice.public, b"share 1", b""))
    _refused(lambda: bob.unseal(alice.public, b"share 1", sealed[:NONCE_BYTES]))


def _refused(opening: Any) -> None:
    with pytest.raises(IntegrityError) as caught:
        opening()
    assert caught.value.code == "envelope.altered"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point: str) -> None:
    """A party that sent one would know the key that the other thinks is shared."""
    for use in (
        lambda s, p: s.pair(p, "mask"),
        lambda s, p: s.seal(p, b"", b""),
        lambda s, p: s.unseal(p, b"", b"x" * 40),
    ):
        with pytest.raises(IntegrityError) as caught:
            use(Session(ALICE), bytes.fromhex(point))
        assert caught.value.code == "session.key"


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_of_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(IntegrityError) as caught:
        Session(ALICE).pair(bytes(size), "mask")
    assert caught.value.code == "session.key"


@given(st.lists(st.one_of(st.text(max_size=5), st.integers()), max_size=3), st.lists(st.text(max_size=5), max_size=3))
def test_each_purpose_has_its_own_key(one: list[Any], other: list[Any]) -> None:
    alice = Session(ALICE)
    same = [str(part) for part in one] == [str(part) for part in other]
    assert (alice.pair(BOB_PUBLIC, *one) == alice.pair(BOB_PUBLIC, *other)) == same


def test_a_claim_is_for_one_run_roster_site_and_key() -> None:
    north, south = Identity.generate("north"), Identity.generate("south")
    public = Session(ALICE).public
    signed = public + north.sign(claim("run", "roster", "north", public))
    assert len(signed) == SIGNED_BYTES
    assert check_claim(signed, "run", "roster", "north", north.public) == public
    old = BOB_PUBLIC + signed[32:]
    for wrong in (
        (signed, "another run", "roster", "north", north.public),
        (signed, "run", "another roster", "north", north.public),
        (signed, "run", "roster", "south", north.public), (signed, "run", "roster", "north", south.public),
        (old, "run", "roster", "north", north.public), (signed[:-1], "run", "roster", "north", north.public),
        (bytes(SIGNED_BYTES), "run", "roster", "north", north.public),
    ):  # fmt: skip
        with pytest.raises(IntegrityError) as caught:
            check_claim(*wrong)
        assert caught.value.code == "session.not-signed" and caught.value.field == wrong[3]


def test_the_private_part_is_not_shown() -> None:
    session = Session(ALICE)
    assert repr(session) == "Session()" and ALICE.hex() not in str(vars(session))
    assert len({Session.fresh() for _ in range(20)}) == 20
