"""Offline verification of ledger files, alone and against each other.

Alone: every line parses, the chain is unbroken, every hash and signature holds.
Together: every receipt in a site's ledger is the coordinator's own signed entry; every
release the coordinator acknowledged stands in the site's ledger at the same place with
the same hash, so that a cut-off tail or a rewritten history shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atoll.contract.errors import AtollError, IntegrityError
from atoll.contract.wire import Json, parse_json
from atoll.ledger import merkle
from atoll.ledger.entry import EMPTY, Entry, Verifier, verify_entry


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
    previous, party, public = EMPTY, "", b""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise _broken(path, number, "the last line is cut off")
                entry = parse_json(line)
                if not isinstance(entry, dict) or entry.get("seq") != number - 1:
                    raise _broken(path, number, "the sequence number is not the line's")
                if number == 1:
                    party, public = str(entry.get("party")), bytes.fromhex(str(entry["body"]["public_key"]))
                if entry.get("prev") != previous or entry.get("party") != party:
                    raise _broken(path, number, "it does not follow the line before")
                previous = verify_entry(entry, public, verify)
                _check_leaves(entry)
                entries.append(entry)
            except IntegrityError as error:
                raise error if error.code == "ledger.broken" else _broken(path, number, error.message) from None
            except (AtollError, KeyError, TypeError, ValueError):
                raise _broken(path, number, "it is not a ledger entry") from None
    if not entries:
        raise _broken(path, 1, "the file is empty")
    acknowledged = {entry["body"]["of"] for entry in entries if entry["kind"] == "receipt"}
    open_releases = [e["seq"] for e in entries if e["kind"] == "release" and e["seq"] not in acknowledged]
    return Verified(path, party, public, entries, open_releases)


def _check_leaves(entry: Entry) -> None:
    """A "received" entry's leaves must lead to the root that its signature covers."""
    if entry["kind"] != "received":
        return
    leaves = [str(leaf["hash"]).encode() for leaf in entry["leaves"]]
    if merkle.root(leaves).hex() != entry["body"]["root"]:
        raise IntegrityError("ledger.root", "its leaves do not lead to the signed root", field="leaves")


def verify_receipt(receipt: Json, release_hash: str, coordinator_public: bytes, verify: Verifier) -> None:
    """Check a receipt {"entry", "path"} for the release entry *release_hash*; raises IntegrityError."""
    try:
        entry, steps = receipt["entry"], [(str(side), str(sibling)) for side, sibling in receipt["path"]]
        root = bytes.fromhex(entry["body"]["root"])
    except (KeyError, TypeError, ValueError):
        raise IntegrityError("receipt.malformed", "a receipt is malformed", field="receipt") from None
    verify_entry(entry, coordinator_public, verify)
    merkle.verify_path(release_hash.encode(), steps, root)


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
                released = ledger.entries[entry["body"]["of"]]
                try:
                    verify_receipt(entry["body"]["receipt"], released["hash"], coordinator.public, verify)
                except IntegrityError as error:
                    raise _broken(ledger.path, entry["seq"] + 1, error.message) from None
    for entry in coordinator.entries:
        for leaf in entry.get("leaves") or []:
            site = by_party.get(leaf["site"])
            if site is None:
                continue
            if leaf["seq"] >= len(site.entries) or site.entries[leaf["seq"]]["hash"] != leaf["hash"]:
                raise _broken(
                    site.path,
                    leaf["seq"] + 1,
                    f"the coordinator (line {entry['seq'] + 1}) acknowledged another entry here",
                )
