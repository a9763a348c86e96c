"""Offline verification of ledger files, alone and against each other.

Alone: every line parses, the chain is unbroken, every hash and signature holds. Together: every receipt in a site's
ledger is the coordinator's own signed entry, and stands in its ledger at the same place, and so does what a site was
told of contributions; every release the coordinator acknowledged stands in the site's ledger at the same place with the
same hash; every roster the coordinator opened a study with names the sites' own keys. So a cut-off tail, a rewritten
history or an invented site shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atoll.contract.errors import AtollError, IntegrityError
from atoll.contract.wire import Json, parse_json
from atoll.ledger import merkle
from atoll.ledger.contributions import CONTRIBUTION, credited, share_of
from atoll.ledger.entry import EMPTY, MEMBERS, Entry, Verifier, entry_line, leaf, verify_entry, verify_hash


@dataclass(slots=True)
class Verified:
    """A ledger that holds together: its party, key, entries, and releases without a receipt."""

    path: Path
    party: str
    public: bytes
    entries: list[Entry]
    unacknowledged: list[int] = field(default_factory=list)


def _broken(path: Path, line: int, why: str) -> IntegrityError:
    return IntegrityError(
        "ledger.broken",
        f"{path.name}, line {line}: {why}",
        field="ledger",
        remedy="the file was altered or cut: compare with the other parties' copies",
    )


def verify_file(path: Path, verify: Verifier) -> Verified:
    """Check one ledger file; raises IntegrityError naming the first line that is wrong."""
    entries: list[Entry] = []
    signed = True
    previous, party, public = EMPTY, "", b""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise _broken(path, number, "the last line is cut off")
                entry = parse_json(line)
                if not isinstance(entry, dict) or entry.get("seq") != number - 1:
                    raise _broken(path, number, "the sequence number is not the line's")
                if entry_line(entry) + b"\n" != line or not set(entry) <= MEMBERS:
                    raise _broken(path, number, "it is not spelled as ledger entries are")
                if number == 1:
                    party, public = str(entry.get("party")), bytes.fromhex(str(entry["body"]["public_key"]))
                if entry.get("prev") != previous or entry.get("party") != party:
                    raise _broken(path, number, "it does not follow the line before")
                signed = entry.get("sig") != "" or entry.get("kind") != "receipt"
                previous = verify_entry(entry, public, verify) if signed else verify_hash(entry)
                _check_kind(entry, entries)
                entries.append(entry)
            except IntegrityError as error:
                raise error if error.code == "ledger.broken" else _broken(path, number, error.message) from None
            except (AtollError, KeyError, TypeError, ValueError):
                raise _broken(path, number, "it is not a ledger entry") from None
    if not entries:
        raise _broken(path, 1, "the file is empty")
    if not signed:
        raise _broken(path, len(entries), "the last entry is not signed")
    acknowledged = {entry["body"]["of"] for entry in entries if entry["kind"] == "receipt"}
    open_releases = [e["seq"] for e in entries if e["kind"] == "release" and e["seq"] not in acknowledged]
    return Verified(path, party, public, entries, open_releases)


def _check_kind(entry: Entry, before: Sequence[Entry]) -> None:
    """Begin with a genesis; leaves are those that were signed; receipts are for releases *before* them."""
    kind, body = entry["kind"], entry["body"]
    if not isinstance(body, dict) or (kind == "genesis") != (not before):
        raise IntegrityError("ledger.genesis", "a ledger begins with its one genesis entry", field="kind")
    if ("leaves" in entry) != (kind == "received"):
        raise IntegrityError("ledger.leaves", "leaves stand in received entries only", field="leaves")
    if kind == "received" and merkle.root([_leaf(item) for item in entry["leaves"]]).hex() != body["root"]:
        raise IntegrityError("ledger.root", "its leaves do not lead to the signed root", field="leaves")
    if kind == "receipt" and (type(body["of"]) is not int or _at(before, body["of"]).get("kind") != "release"):
        raise IntegrityError("ledger.receipt", "it acknowledges no release of this ledger", field="of")


def _leaf(item: Json) -> bytes:
    match item:
        case {"site": str(site), "seq": int(seq), "hash": str(digest)} if len(item) == 3:
            return leaf(site, seq, digest)
    raise IntegrityError("ledger.leaves", "its leaves are malformed", field="leaves")


def _at(entries: Sequence[Entry], seq: Json) -> Entry:
    """The entry with that sequence number, {} if there is none."""
    return entries[seq] if isinstance(seq, int) and 0 <= seq < len(entries) else {}


def verify_receipt(receipt: Json, released: bytes, coordinator_public: bytes, verify: Verifier) -> None:
    """Check a receipt {"entry", "path"} for the leaf *released* (see :func:`leaf`); raises IntegrityError."""
    try:
        entry, steps = receipt["entry"], [(str(side), str(sibling)) for side, sibling in receipt["path"]]
        root = bytes.fromhex(entry["body"]["root"])
        if entry["kind"] != "received" or not isinstance(entry["seq"], int):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise IntegrityError("receipt.malformed", "a receipt is malformed", field="receipt") from None
    verify_entry(entry, coordinator_public, verify)
    merkle.verify_path(released, steps, root)


def verify_together(ledgers: Sequence[Verified], verify: Verifier) -> None:
    """Check ledgers that are intact alone against each other; raises IntegrityError."""
    by_party = {ledger.party: ledger for ledger in ledgers}
    coordinator = by_party.get("coordinator")
    if len(by_party) != len(ledgers):
        raise IntegrityError("ledger.twice", "two files are ledgers of one party", field="ledger")
    if coordinator is None:
        return
    for ledger in ledgers:
        for entry in ledger.entries:
            if entry["kind"] == "receipt":
                _check_receipt(entry, ledger, coordinator, verify)
            elif entry["kind"] == CONTRIBUTION and ledger is not coordinator:
                _check_contribution(entry, ledger, coordinator, verify)
        try:
            credited(ledger.entries)
        except IntegrityError as error:
            raise _broken(ledger.path, len(ledger.entries), error.message) from None
    for entry in coordinator.entries:
        line = entry["seq"] + 1
        for item in entry["leaves"] if entry["kind"] == "received" else ():
            site = by_party.get(item["site"])
            if site is not None and _at(site.entries, item["seq"]).get("hash") != item["hash"]:
                why = f"the coordinator (line {line}) acknowledged another entry here"
                raise _broken(site.path, item["seq"] + 1, why)
        roster = entry["body"].get("roster") if entry["kind"] == "opened" else None
        for name, key in roster.items() if isinstance(roster, dict) else ():
            if name in by_party and by_party[name].public.hex() != key:
                raise _broken(coordinator.path, line, f"its roster holds another key for {name} than {name}'s ledger")


def _check_contribution(entry: Entry, ledger: Verified, coordinator: Verified, verify: Verifier) -> None:
    """What a site was told of contributions must be the coordinator's own signed entry, and stand in its file."""
    body, line = entry["body"], entry["seq"] + 1
    try:
        share = share_of(body["entry"], body["run"], ledger.party, coordinator.public, verify)
    except IntegrityError as error:
        raise _broken(ledger.path, line, error.message) from None
    if share != body["share"]:
        raise _broken(ledger.path, line, "it states another share than the coordinator's entry in it")
    if _at(coordinator.entries, body["entry"]["seq"]).get("hash") != body["entry"]["hash"]:
        why = f"{ledger.party} (line {line}) was told of other contributions than stand here"
        raise _broken(coordinator.path, body["entry"]["seq"] + 1, why)


def _check_receipt(entry: Entry, ledger: Verified, coordinator: Verified, verify: Verifier) -> None:
    """A site's receipt must be the coordinator's own signed entry, and stand in the coordinator's file."""
    receipt, released = entry["body"]["receipt"], ledger.entries[entry["body"]["of"]]
    try:
        verify_receipt(receipt, leaf(ledger.party, released["seq"], released["hash"]), coordinator.public, verify)
    except IntegrityError as error:
        raise _broken(ledger.path, entry["seq"] + 1, error.message) from None
    if _at(coordinator.entries, receipt["entry"]["seq"]).get("hash") != receipt["entry"]["hash"]:
        why = f"{ledger.party} (line {entry['seq'] + 1}) holds a receipt for another entry here"
        raise _broken(coordinator.path, receipt["entry"]["seq"] + 1, why)
