"""Ledger entries: hash-chained, signed records of what happened at one party.

An entry is a JSON object, one line of the ledger file:

    {"v": 1, "seq": n, "time": …, "party": …, "kind": …, "body": {…}, "prev": …, "hash": …, "sig": …}

``hash`` is SHA-256 over the canonical JSON of everything before it, ``prev`` the hash of
the entry before, ``sig`` the party's Ed25519 signature over the hash ("" if the next entry,
which covers it, was stored in the same transaction). An entry may carry
``leaves``: data bound by ``body.root``, the root of their Merkle tree, instead of by the
hash itself, so that they can be left out where the entry is shown to another party.

The first entry has kind "genesis" and names the party's public key. A site's "release"
entry is written *before* the release is sent and is also the release's signature; the
coordinator's "received" entry commits to all release entries of a round; each site
stores it, with its Merkle path, as its "receipt".
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Callable
from typing import Any

from atoll.contract.errors import IntegrityError
from atoll.contract.wire import Json, canonical_json

Entry = dict[str, Json]
Signer = Callable[[bytes], bytes]
Verifier = Callable[[bytes, bytes, bytes], None]

CONTEXT = b"atoll ledger 1\0"
EMPTY = "0" * 64
_HASHED = ("v", "seq", "time", "party", "kind", "body", "prev")
_PLAIN = {*_HASHED, "hash", "sig"}
_ORDER = (*_HASHED, "hash", "sig", "leaves")
MEMBERS = frozenset(_ORDER)


def hashed_text(entry: Entry) -> bytes:
    """Canonical JSON of the hashed members; raises IntegrityError if one is missing."""
    try:
        return canonical_json({name: entry[name] for name in _HASHED})
    except (KeyError, ValueError, TypeError):
        raise IntegrityError("ledger.malformed", "a ledger entry lacks a member", field="ledger") from None


def entry_hash(entry: Entry) -> str:
    """SHA-256 (hex) of the hashed members; raises IntegrityError if one is missing."""
    return hashlib.sha256(CONTEXT + hashed_text(entry)).hexdigest()


def _line(text: bytes, entry: Entry) -> bytes:
    if set(entry) == _PLAIN:  # by far the most: worth not encoding again
        return text[:-1] + f',"hash":"{entry["hash"]}","sig":"{entry["sig"]}"}}'.encode()
    rest = {name: value for name, value in entry.items() if name not in _HASHED}
    return text[:-1] + b"," + canonical_json(rest)[1:]


def entry_line(entry: Entry) -> bytes:
    """The one spelling of an entry as a line of a ledger file (without the line's end)."""
    return _line(hashed_text(entry), entry)


def read_line(line: str) -> Entry:
    """One's own entry, as it was before it was stored: its members in the order above."""
    entry = json.loads(line)
    return {name: entry[name] for name in _ORDER if name in entry}


def leaf(site: str, seq: int, digest: str) -> bytes:
    """What a round's Merkle tree holds for one release entry."""
    return f"{digest} {seq} {site}".encode()


def is_release(entry: Entry) -> bool:
    """Whether *entry* has the form of a release entry, so that a ledger can refer to it."""
    match entry:
        case {"v": 1, "kind": "release", "seq": int(seq), "time": str(), "prev": str(), "body": dict()}:
            return set(entry) == _PLAIN and type(seq) is int and type(entry["v"]) is int and seq >= 0
    return False


def signed_part(digest: str) -> bytes:
    """The bytes a signature covers."""
    return CONTEXT + bytes.fromhex(digest)


def verify_hash(entry: Entry) -> str:
    """The entry's hash, after checking it; raises IntegrityError."""
    digest = entry_hash(entry)
    if entry.get("hash") != digest:
        raise IntegrityError("ledger.hash", "a ledger entry's hash is not that of its content", field="hash")
    return digest


def verify_entry(entry: Entry, public: bytes, verify: Verifier) -> str:
    """The entry's hash, after checking it and *public*'s signature; raises IntegrityError."""
    digest = verify_hash(entry)
    try:
        signature = bytes.fromhex(entry["sig"])
        if signature.hex() != entry["sig"]:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise IntegrityError("ledger.signature", "a ledger entry is not signed", field="sig") from None
    verify(public, signature, signed_part(digest))
    return digest


class Chain:
    """Makes the next entry of one party's ledger. Holds only the head; storing is the caller's.

    ``head`` moves only in :meth:`commit`, after the caller has stored the entry durably.
    """

    def __init__(self, party: str, public: bytes, sign: Signer, seq: int = -1, head: str = EMPTY) -> None:
        self.party, self.public, self._sign = party, public, sign
        self.seq, self.head = seq, head
        self.line = ""
        """The entry that :meth:`next` made last, as one line of JSON (what was hashed is not said twice)."""

    def next(self, kind: str, body: Entry, leaves: Json = None, *, sign: bool = True) -> Entry:
        """An entry that would follow the head. sign=False is for one whose successor is stored with
        it: the successor's signature covers it through ``prev``."""
        entry: dict[str, Any] = {
            "v": 1,
            "seq": self.seq + 1,
            "time": dt.datetime.now(dt.UTC).isoformat(timespec="microseconds"),
            "party": self.party,
            "kind": kind,
            "body": body,
            "prev": self.head,
        }
        text = hashed_text(entry)
        entry["hash"] = hashlib.sha256(CONTEXT + text).hexdigest()
        entry["sig"] = self._sign(signed_part(entry["hash"])).hex() if sign else ""
        if leaves is not None:
            entry["leaves"] = leaves
        self.line = _line(text, entry).decode()
        return entry

    def genesis(self) -> Entry:
        """The first entry: who this party is."""
        return self.next("genesis", {"public_key": self.public.hex()})

    def commit(self, entry: Entry) -> None:
        """Move the head to a stored entry."""
        self.seq, self.head = entry["seq"], entry["hash"]
