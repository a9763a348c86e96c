"""Ledger entries: what the hash and the signature cover, and how a chain grows."""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import json
from typing import Any

import pytest

from atoll.contract.errors import IntegrityError
from atoll.contract.wire import canonical_json
from atoll.crypto.identity import Identity, verify
from atoll.ledger.entry import (
    EMPTY,
    Chain,
    entry_hash,
    entry_line,
    leaf,
    signed_part,
    verify_entry,
    verify_hash,
)

IDENTITY = Identity.generate("north")


def chain() -> Chain:
    return Chain("north", IDENTITY.public, IDENTITY.sign)


def test_an_entry_is_what_the_documentation_says() -> None:
    entry = chain().next("release", {"run": "r", "bytes": 8})
    assert list(entry) == ["v", "seq", "time", "party", "kind", "body", "prev", "hash", "sig"]
    assert (entry["v"], entry["seq"], entry["party"], entry["kind"], entry["prev"]) == (1, 0, "north", "release", EMPTY)
    covered = {name: entry[name] for name in ("v", "seq", "time", "party", "kind", "body", "prev")}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    assert entry["hash"] == hashlib.sha256(b"atoll ledger 1\0" + text.encode()).hexdigest()
    verify(IDENTITY.public, bytes.fromhex(entry["sig"]), b"atoll ledger 1\0" + bytes.fromhex(entry["hash"]))
    assert abs(dt.datetime.fromisoformat(entry["time"]) - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)
    assert verify_entry(entry, IDENTITY.public, verify) == entry["hash"] == verify_hash(entry)


def test_a_chain_grows_only_by_committing() -> None:
    made = chain()
    first = made.genesis()
    assert (first["kind"], first["body"]) == ("genesis", {"public_key": IDENTITY.public.hex()})
    assert made.seq == -1 and made.head == EMPTY  # nothing was stored yet
    assert made.next("a", {})["seq"] == 0
    made.commit(first)
    assert (made.seq, made.head) == (0, first["hash"])
    second = made.next("b", {})
    assert (second["seq"], second["prev"]) == (1, first["hash"])
    again = Chain("north", IDENTITY.public, IDENTITY.sign, made.seq, made.head).next("b", {})
    assert (again["seq"], again["prev"]) == (1, first["hash"])


MEMBERS = ["v", "seq", "time", "party", "kind", "body", "prev", "hash", "sig"]


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_is_covered(member: str) -> None:
    entry = chain().next("release", {"run": "r"})
    for value in (None, "x", 7, [], {}, "a" * 64, "a" * 128):
        with pytest.raises(IntegrityError):
            verify_entry({**entry, member: value}, IDENTITY.public, verify)
    with pytest.raises(IntegrityError):
        verify_entry({name: v for name, v in entry.items() if name != member}, IDENTITY.public, verify)


def test_members_of_the_body_are_covered() -> None:
    entry = chain().next("release", {"run": "r", "deep": {"list": [1, 2]}})
    altered: list[Any] = [copy.deepcopy(entry) for _ in range(3)]
    altered[0]["body"]["run"] = "s"
    altered[1]["body"]["deep"]["list"].reverse()
    altered[2]["body"]["more"] = None
    for other in altered:
        with pytest.raises(IntegrityError):
            verify_entry(other, IDENTITY.public, verify)


def test_a_signature_has_one_spelling() -> None:
    """Else bytes of the file could be changed without it being noticed."""
    entry = chain().next("release", {})
    sig = entry["sig"]
    for other in (sig.upper(), sig + " ", " " + sig, sig[:2] + " " + sig[2:]):
        assert bytes.fromhex(other) == bytes.fromhex(sig)
        with pytest.raises(IntegrityError):
            verify_entry({**entry, "sig": other}, IDENTITY.public, verify)


def test_anothers_signature_is_refused() -> None:
    entry = chain().next("release", {})
    other = Identity.generate("south")
    with pytest.raises(IntegrityError):
        verify_entry(entry, other.public, verify)
    entry["sig"] = other.sign(signed_part(entry["hash"])).hex()
    with pytest.raises(IntegrityError):
        verify_entry(entry, IDENTITY.public, verify)
    entry["sig"] = IDENTITY.sign(bytes.fromhex(entry["hash"])).hex()  # signed without the ledger's context
    with pytest.raises(IntegrityError):
        verify_entry(entry, IDENTITY.public, verify)


def test_an_unsigned_entry_is_hashed_all_the_same() -> None:
    entry = chain().next("receipt", {}, sign=False)
    assert entry["sig"] == "" and verify_hash(entry) == entry["hash"]
    with pytest.raises(IntegrityError):
        verify_entry(entry, IDENTITY.public, verify)
    with pytest.raises(IntegrityError):
        verify_hash({**entry, "kind": "release"})


def test_leaves_stand_outside_the_hash() -> None:
    leaves = [{"site": "a", "seq": 1, "hash": "0" * 64}, {"site": "b", "seq": 2, "hash": "1" * 64}]
    entry = chain().next("received", {"root": "x"}, leaves)
    assert entry["leaves"] == leaves and entry["body"] == {"root": "x"}
    shown = {name: value for name, value in entry.items() if name != "leaves"}
    assert verify_entry(shown, IDENTITY.public, verify) == entry["hash"]
    assert "leaves" not in chain().next("opened", {})


def test_a_leaf_says_which_release_of_which_site() -> None:
    leaves = [leaf("a", 1, "x"), leaf("b", 1, "x"), leaf("a", 2, "x"), leaf("a", 1, "y"), leaf("1 a", 1, "x")]
    assert len(set(leaves)) == 5 and leaves[0] == b"x 1 a"


def test_a_line_is_the_entrys_one_spelling() -> None:
    made = chain()
    entries = [("release", {"b": 1, "a": "ü"}, None, True), ("received", {}, [1], True), ("receipt", {}, None, False)]
    for kind, body, leaves, sign in entries:
        entry = made.next(kind, body, leaves, sign=sign)
        line = entry_line(entry)
        assert json.loads(line) == entry and line == entry_line(dict(reversed(entry.items()))) and b"\n" not in line
        assert made.line == line.decode()
    assert len({entry_line({**entry, "hash": value}) for value in ("x", None, 5)}) == 3
    for member in ("v", "body"):
        with pytest.raises(IntegrityError):
            entry_line({name: value for name, value in entry.items() if name != member})


@pytest.mark.parametrize("body", [{"x": float("nan")}, {"x": {1, 2}}, {"x": "\ud800"}])
def test_what_json_cannot_say_is_not_recorded(body: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        chain().next("release", body)


def test_hashing_does_not_depend_on_the_order_of_members() -> None:
    entry = chain().next("release", {"a": 1, "b": 2})
    turned = dict(reversed(entry.items())) | {"body": {"b": 2, "a": 1}}
    assert entry_hash(turned) == entry["hash"] and canonical_json(turned) == canonical_json(entry)
