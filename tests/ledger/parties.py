"""A federation's parties and their ledgers, written without a federation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atoll.contract.errors import IntegrityError
from atoll.crypto.identity import Identity, verify
from atoll.ledger import merkle
from atoll.ledger.entry import Chain, Entry, entry_hash, entry_line, leaf, signed_part
from atoll.ledger.verify import Verified, verify_file, verify_together


class Party:
    """A party that keeps a ledger."""

    def __init__(self, name: str, identity: Identity | None = None) -> None:
        self.identity = identity or Identity.generate(name)
        self.chain = Chain(name, self.identity.public, self.identity.sign)
        self.entries: list[Entry] = []
        self.add(self.chain.genesis())

    def add(self, entry: Entry) -> Entry:
        self.chain.commit(entry)
        self.entries.append(entry)
        return entry

    def record(self, kind: str, body: Entry, leaves: Any = None, *, sign: bool = True) -> Entry:
        return self.add(self.chain.next(kind, body, leaves, sign=sign))

    def resign(self, number: int) -> None:
        """Sign entry *number* and all after it anew, as only the party itself can."""
        for place in range(number, len(self.entries)):
            entry = self.entries[place]
            entry["prev"] = self.entries[place - 1]["hash"] if place else entry["prev"]
            entry["hash"] = entry_hash(entry)
            entry["sig"] = self.identity.sign(signed_part(entry["hash"])).hex()

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.chain.party}.jsonl"
        path.write_bytes(b"".join(entry_line(entry) + b"\n" for entry in self.entries))
        return path


def acknowledge(coordinator: Party, released: dict[Party, Entry], number: int) -> dict[Party, Any]:
    """The coordinator's "received" entry for a round; returns the receipts."""
    leaves = [{"site": s.chain.party, "seq": e["seq"], "hash": e["hash"]} for s, e in released.items()]
    tree = merkle.levels([leaf(item["site"], item["seq"], item["hash"]) for item in leaves])
    body = {"run": "r", "round": number, "root": tree[-1][0].hex(), "count": len(leaves)}
    entry = coordinator.record("received", body, leaves)
    shown = {name: value for name, value in entry.items() if name != "leaves"}
    return {site: {"entry": shown, "path": merkle.path(tree, i)} for i, site in enumerate(released)}


class World:
    """A coordinator and three sites after a study of some rounds."""

    def __init__(self, rounds: int = 2) -> None:
        self.coordinator = Party("coordinator")
        self.sites = [Party(name) for name in ("east", "north", "south")]
        roster = {site.chain.party: site.identity.public.hex() for site in self.sites}
        self.coordinator.record("opened", {"run": "r", "plan": "0" * 64, "study": "s", "roster": roster})
        for site in self.sites:
            site.record("joined", {"run": "r", "step": 1e-06, "text": "Ünïcode"})
        owed: dict[Party, Any] = {}
        for number in range(rounds):
            released = {}
            for site in self.sites:
                if site in owed:  # stored together with the next release, whose signature covers it
                    site.record("receipt", {"of": owed[site][0], "receipt": owed[site][1]}, sign=False)
                released[site] = site.record("release", {"run": "r", "round": number, "bytes": 8, "digest": "d"})
            receipts = acknowledge(self.coordinator, released, number)
            owed = {site: (released[site]["seq"], receipts[site]) for site in self.sites}
        for site in self.sites:
            site.record("receipt", {"of": owed[site][0], "receipt": owed[site][1]})
            site.record("closed", {"run": "r", "status": "finished"})
        self.coordinator.record("closed", {"run": "r", "status": "finished"})

    @property
    def north(self) -> Party:
        return self.sites[1]

    def verify(self, folder: Path, *without: str) -> list[Verified]:
        parties = [p for p in (self.coordinator, *self.sites) if p.chain.party not in without]
        verified = [verify_file(party.write(folder), verify) for party in parties]
        verify_together(verified, verify)
        return verified


def broken(check: Callable[[], object]) -> str:
    with pytest.raises(IntegrityError) as error:
        check()
    assert error.value.code == "ledger.broken" and error.value.remedy
    return str(error.value)
