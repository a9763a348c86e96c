"""Ledger files: any alteration is found, alone where that is possible, else by comparing the parties' files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atoll.contract.errors import IntegrityError
from atoll.crypto.identity import Identity, verify
from atoll.ledger import merkle
from atoll.ledger.entry import Chain, Entry, entry_hash, entry_line, leaf, signed_part
from atoll.ledger.verify import Verified, verify_file, verify_receipt, verify_together


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


@pytest.fixture
def world() -> World:
    return World()


def broken(check: Callable[[], object]) -> str:
    with pytest.raises(IntegrityError) as error:
        check()
    assert error.value.code == "ledger.broken" and error.value.remedy
    return str(error.value)


# ---------------------------------------------------------------- intact ledgers


def test_intact_ledgers_verify(world: World, tmp_path: Path) -> None:
    coordinator, *sites = world.verify(tmp_path)
    assert [v.party for v in sites] == ["east", "north", "south"] and coordinator.party == "coordinator"
    assert sites[1].public == world.north.identity.public
    assert [e["hash"] for e in sites[1].entries] == [e["hash"] for e in world.north.entries]
    assert [v.unacknowledged for v in (coordinator, *sites)] == [[], [], [], []]
    world.verify(tmp_path, "coordinator")
    world.verify(tmp_path, "north", "south")


def test_releases_without_a_receipt_are_told(world: World, tmp_path: Path) -> None:
    last = world.north.record("release", {"run": "r2", "round": 0})
    world.north.record("release", {"run": "r2", "round": 1})
    _, _, north, _ = world.verify(tmp_path)
    assert north.unacknowledged == [last["seq"], last["seq"] + 1]


# ---------------------------------------------------------------- altered files


@pytest.mark.parametrize("party", [0, 1], ids=["coordinator", "site"])
def test_every_flipped_byte_is_found(tmp_path: Path, party: int) -> None:
    world = World(rounds=1)
    path = (world.coordinator, world.north)[party].write(tmp_path)
    whole = path.read_bytes()
    verify_file(path, verify)
    for place in range(len(whole)):
        for mask in (0x01, 0x20, 0x80) if place % 7 == 0 else (0x20,) if chr(whole[place]).isalpha() else (0x01,):
            altered = bytearray(whole)
            altered[place] ^= mask
            path.write_bytes(altered)
            broken(lambda: verify_file(path, verify))


def test_the_line_that_is_wrong_is_named(world: World, tmp_path: Path) -> None:
    path = world.north.write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        altered = line.replace(b'"time":"2', b'"time":"3')
        assert altered != line
        path.write_bytes(b"".join([*lines[:number], altered, *lines[number + 1 :]]))
        assert f"north.jsonl, line {number + 1}:" in broken(lambda: verify_file(path, verify))


@pytest.mark.parametrize("party", [0, 1], ids=["coordinator", "site"])
def test_removed_swapped_and_doubled_lines_are_found(world: World, tmp_path: Path, party: int) -> None:
    path = (world.coordinator, world.north)[party].write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for i in range(len(lines)):
        wrong = [lines[: i + 1] + lines[i:]]
        wrong += [lines[:i] + lines[i + 1 :]] if i + 1 < len(lines) else []
        wrong += [
            [*lines[:i], lines[j], *lines[i + 1 : j], lines[i], *lines[j + 1 :]] for j in range(i + 1, len(lines))
        ]
        for altered in wrong:
            path.write_bytes(b"".join(altered))
            broken(lambda: verify_file(path, verify))


def test_a_line_of_another_ledger_is_found(world: World, tmp_path: Path) -> None:
    path, other = world.north.write(tmp_path), world.sites[2].write(tmp_path)
    lines, foreign = (p.read_bytes().splitlines(keepends=True) for p in (path, other))
    for i in range(len(lines)):
        path.write_bytes(b"".join([*lines[:i], foreign[i], *lines[i + 1 :]]))
        broken(lambda: verify_file(path, verify))


def test_every_cut_inside_a_line_is_found_alone(tmp_path: Path) -> None:
    path = World(rounds=1).north.write(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if not whole[:size].endswith(b"\n"):
            broken(lambda: verify_file(path, verify))


def test_an_unsigned_last_entry_is_found_alone(world: World, tmp_path: Path) -> None:
    """A receipt stored together with the next release is covered by that one's signature, or by none."""
    kinds = [(entry["kind"], bool(entry["sig"])) for entry in world.north.entries]
    place = kinds.index(("receipt", False))
    world.north.entries = world.north.entries[: place + 1]
    assert "not signed" in broken(lambda: verify_file(world.north.write(tmp_path), verify))


@pytest.mark.parametrize("kind", ["genesis", "joined", "release", "closed"])
def test_only_receipts_may_be_unsigned(world: World, tmp_path: Path, kind: str) -> None:
    for entry in world.north.entries:
        entry["sig"] = "" if entry["kind"] == kind else entry["sig"]
    broken(lambda: verify_file(world.north.write(tmp_path), verify))


@pytest.mark.parametrize("party", [0, 1], ids=["coordinator", "site"])
def test_a_tail_cut_at_a_line_is_found_together(world: World, tmp_path: Path, party: int) -> None:
    """Alone the file is intact. What nobody else knows of cannot be missed: closing entries, the last receipt."""
    whole = world.verify(tmp_path)
    cut = (world.coordinator, world.north)[party]
    entries = cut.entries
    found = 0
    for size in range(1, len(entries)):
        cut.entries = entries[:size]
        if not cut.entries[-1]["sig"]:
            broken(lambda: verify_file(cut.write(tmp_path), verify))
            continue
        verified = verify_file(cut.write(tmp_path), verify)
        others = [other for other in whole if other.party != verified.party]
        if {entry["kind"] for entry in entries[size:]} <= {"closed", "receipt"}:
            verify_together([verified, *others], verify)
        else:
            broken(lambda verified=verified, others=others: verify_together([verified, *others], verify))  # type: ignore[misc]
            found += 1
    assert found >= 3


def test_a_cut_tail_names_the_first_missing_release(world: World, tmp_path: Path) -> None:
    releases = [e["seq"] for e in world.north.entries if e["kind"] == "release"]
    world.north.entries = world.north.entries[: releases[0]]
    assert f"north.jsonl, line {releases[0] + 1}" in broken(lambda: world.verify(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]\n", b"{}\n", b"null\n", b"\xff\xfe\n", b'{"seq":0}\n', b"[" * 10**5 + b"\n", b"NaN\n"]
)
def test_files_that_are_no_ledger(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    assert "line 1" in broken(lambda: verify_file(path, verify))


def test_another_spelling_of_the_same_entry_is_found(world: World, tmp_path: Path) -> None:
    path = world.north.write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[1])
    for text in (
        json.dumps(entry, ensure_ascii=False), json.dumps(entry, separators=(",", ":")),  # spaces; escapes
        json.dumps(dict(reversed(entry.items())), separators=(",", ":"), ensure_ascii=False),
        lines[1].decode().strip() + " ", lines[1].decode().replace('"v":1', '"v":1,"v":1').strip(),
        lines[1].decode().replace("1e-06", "1E-06").strip(), lines[1].decode().replace("1e-06", "0.000001").strip(),
    ):  # fmt: skip
        assert json.loads(text) == entry and text.encode() + b"\n" != lines[1]
        path.write_bytes(b"".join([lines[0], text.encode() + b"\n", *lines[2:]]))
        broken(lambda: verify_file(path, verify))


def test_members_that_no_signature_covers_are_refused(world: World, tmp_path: Path) -> None:
    for more in (
        {"note": "x"},
        {"leaves": []},
        {"leaves": None},
        {"leaves": [{"site": "north", "seq": 1, "hash": "x"}]},
    ):
        altered = copy.deepcopy(world)
        altered.north.entries[2].update(more)
        broken(lambda altered=altered: verify_file(altered.north.write(tmp_path), verify))  # type: ignore[misc]


# ---------------------------------------------------------------- parties that lie with their own key


def test_altered_leaves_are_found_alone(world: World, tmp_path: Path) -> None:
    place = next(i for i, entry in enumerate(world.coordinator.entries) if entry["kind"] == "received")
    for change in ({"site": "west"}, {"seq": 7}, {"hash": "0" * 64}, {"more": 1}):
        altered = copy.deepcopy(world)
        altered.coordinator.entries[place]["leaves"][1].update(change)
        broken(lambda altered=altered: verify_file(altered.coordinator.write(tmp_path), verify))  # type: ignore[misc]
    for leaves in ([], None, [1], {}, "x"):
        altered = copy.deepcopy(world)
        altered.coordinator.entries[place]["leaves"] = leaves
        broken(lambda altered=altered: verify_file(altered.coordinator.write(tmp_path), verify))  # type: ignore[misc]


def test_a_root_of_other_leaves_is_found_alone(world: World, tmp_path: Path) -> None:
    place = next(i for i, entry in enumerate(world.coordinator.entries) if entry["kind"] == "received")
    world.coordinator.entries[place]["body"]["root"] = "0" * 64
    world.coordinator.resign(place)
    assert "do not lead to the signed root" in broken(lambda: world.verify(tmp_path))


@pytest.mark.parametrize("of", [-1, 0, 1, 10**9, None, "2", 2.0, True, [], {}])
def test_a_receipt_for_no_release_is_found_alone(world: World, tmp_path: Path, of: Any) -> None:
    place = next(i for i, entry in enumerate(world.north.entries) if entry["kind"] == "receipt")
    world.north.entries[place]["body"]["of"] = of
    world.north.resign(place)
    broken(lambda: verify_file(world.north.write(tmp_path), verify))


@pytest.mark.parametrize("body", [None, [], "x", {}, {"public_key": 5}, {"public_key": "zz"}, {"public_key": ""}])
def test_a_genesis_without_a_key_is_found(world: World, tmp_path: Path, body: Any) -> None:
    world.north.entries[0]["body"] = body
    world.north.resign(0)
    broken(lambda: verify_file(world.north.write(tmp_path), verify))


def test_a_ledger_has_one_beginning(world: World, tmp_path: Path) -> None:
    world.north.record("genesis", {"public_key": Identity.generate("x").public.hex()})
    broken(lambda: verify_file(world.north.write(tmp_path), verify))
    other = Party("west")
    other.entries[0]["kind"] = "joined"
    other.resign(0)
    broken(lambda: verify_file(other.write(tmp_path), verify))


def test_a_rewritten_site_history_is_found_together(world: World, tmp_path: Path) -> None:
    """The site has its own key, so its file is intact alone; the coordinator's file says otherwise."""
    place = next(i for i, entry in enumerate(world.north.entries) if entry["kind"] == "release")
    world.north.entries[place]["body"]["bytes"] = 4
    world.north.resign(place)
    verify_file(world.north.write(tmp_path), verify)
    assert "north.jsonl" in broken(lambda: world.verify(tmp_path))


def test_a_rewritten_coordinator_history_is_found_together(world: World, tmp_path: Path) -> None:
    """The coordinator denies having received something: the sites hold its signed receipts."""
    last = max(i for i, entry in enumerate(world.coordinator.entries) if entry["kind"] == "received")
    world.coordinator.entries[last] = {
        **world.coordinator.entries[last], "kind": "closed", "body": {"run": "r", "status": "failed"},
    }  # fmt: skip
    del world.coordinator.entries[last]["leaves"]
    world.coordinator.resign(last)
    verify_file(world.coordinator.write(tmp_path), verify)
    text = broken(lambda: world.verify(tmp_path))
    assert f"coordinator.jsonl, line {last + 1}" in text and "holds a receipt for another entry" in text


def test_a_receipt_from_a_fork_of_the_coordinators_ledger_is_found(world: World, tmp_path: Path) -> None:
    """Genuinely signed, over the very release, but shown to this site only."""
    fork = copy.deepcopy(world)
    fork.coordinator.entries = fork.coordinator.entries[:2]
    fork.coordinator.chain.commit(fork.coordinator.entries[-1])
    released = world.north.record("release", {"run": "r", "round": 9})
    receipt = acknowledge(fork.coordinator, {world.north: released}, 9)[world.north]
    shown = leaf("north", released["seq"], released["hash"])
    verify_receipt(receipt, shown, world.coordinator.identity.public, verify)
    world.north.record("receipt", {"of": released["seq"], "receipt": receipt})
    text = broken(lambda: world.verify(tmp_path))
    assert "coordinator.jsonl, line 3" in text and "north" in text
    world.verify(tmp_path, "coordinator")


def test_a_forged_receipt_is_found_together(world: World, tmp_path: Path) -> None:
    other = Party("coordinator")  # anyone who calls himself so
    released = world.north.record("release", {"run": "r", "round": 9})
    receipt = acknowledge(other, {world.north: released}, 9)[world.north]
    world.north.record("receipt", {"of": released["seq"], "receipt": receipt})
    assert f"north.jsonl, line {len(world.north.entries)}" in broken(lambda: world.verify(tmp_path))


def test_a_receipt_for_another_release_is_found_together(world: World, tmp_path: Path) -> None:
    receipts = [entry for entry in world.north.entries if entry["kind"] == "receipt"]
    released = world.north.record("release", {"run": "r", "round": 9})
    world.north.record("receipt", {"of": released["seq"], "receipt": receipts[0]["body"]["receipt"]})
    assert "does not lead to its signed root" in broken(lambda: world.verify(tmp_path))


def test_an_invented_identity_in_the_roster_is_found_together(world: World, tmp_path: Path) -> None:
    opened = world.coordinator.entries[1]
    opened["body"]["roster"]["north"] = Identity.generate("north").public.hex()
    world.coordinator.resign(1)
    verify_file(world.coordinator.write(tmp_path), verify)
    # the receipts are of the ledger before it was rewritten: look at the roster alone
    for site in world.sites:
        site.entries = site.entries[:2]
    world.coordinator.entries = world.coordinator.entries[:2]
    text = broken(lambda: world.verify(tmp_path))
    assert "coordinator.jsonl, line 2" in text and "another key for north" in text
    world.verify(tmp_path, "north")


def test_a_later_study_with_another_key_is_found_too(world: World, tmp_path: Path) -> None:
    key = {site.chain.party: site.identity.public.hex() for site in world.sites}
    world.coordinator.record("opened", {"run": "r2", "roster": key})
    world.verify(tmp_path)
    world.coordinator.record("opened", {"run": "r3", "roster": {**key, "unknown": "00", "south": key["north"]}})
    assert "another key for south" in broken(lambda: world.verify(tmp_path))


@pytest.mark.parametrize("roster", [None, [], "x", 5])
def test_a_study_opened_without_a_roster_does_no_harm(world: World, tmp_path: Path, roster: Any) -> None:
    world.coordinator.record("opened", {"run": "r2", "roster": roster})
    world.coordinator.record("opened", {"run": "r3"})
    world.verify(tmp_path)


def test_two_ledgers_of_one_party_are_refused(world: World, tmp_path: Path) -> None:
    verified = verify_file(world.north.write(tmp_path), verify)
    with pytest.raises(IntegrityError) as error:
        verify_together([verified, verified], verify)
    assert error.value.code == "ledger.twice"


# ---------------------------------------------------------------- receipts alone


def test_a_receipt_is_for_one_release_of_one_coordinator(world: World) -> None:
    entry = next(entry for entry in world.north.entries if entry["kind"] == "receipt")
    receipt, seq = entry["body"]["receipt"], entry["body"]["of"]
    released = leaf("north", seq, world.north.entries[seq]["hash"])
    key = world.coordinator.identity.public
    verify_receipt(receipt, released, key, verify)
    wrong: list[tuple[Any, bytes, bytes]] = [
        (receipt, leaf("north", seq, "0" * 64), key),
        (receipt, leaf("north", seq + 1, world.north.entries[seq]["hash"]), key),
        (receipt, leaf("south", seq, world.north.entries[seq]["hash"]), key),
        (receipt, released, world.north.identity.public),
        ({**receipt, "path": []}, released, key),
        ({**receipt, "path": receipt["path"][:1]}, released, key),
        ({**receipt, "path": [("up", "x")]}, released, key),
        ({**receipt, "path": [5]}, released, key),
        ({**receipt, "path": None}, released, key),
        ({**receipt, "entry": {**receipt["entry"], "seq": 9}}, released, key),
        ({**receipt, "entry": {**receipt["entry"], "sig": ""}}, released, key),
        ({**receipt, "entry": {**receipt["entry"], "body": {**receipt["entry"]["body"], "count": 9}}}, released, key),
        ({**receipt, "entry": {**receipt["entry"], "body": {}}}, released, key),
        *[({**receipt, "entry": value}, released, key) for value in (None, [], {}, "x", 5)],
        *[(value, released, key) for value in (None, [], {}, "x", 5)],
    ]
    for made, digest, public in wrong:
        with pytest.raises(IntegrityError):
            verify_receipt(made, digest, public, verify)


def test_only_a_received_entry_is_a_receipt() -> None:
    coordinator = Party("coordinator")
    root = merkle.root([b"leaf"]).hex()
    for kind in ("opened", "closed", "receipt"):
        entry = coordinator.record(kind, {"root": root})
        with pytest.raises(IntegrityError):
            verify_receipt({"entry": entry, "path": []}, b"leaf", coordinator.identity.public, verify)
    entry = coordinator.record("received", {"root": root})
    verify_receipt({"entry": entry, "path": []}, b"leaf", coordinator.identity.public, verify)
