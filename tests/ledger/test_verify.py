"""Ledger files: any alteration is found, alone where that is possible, else by comparing the parties' files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from atoll.contract.errors import IntegrityError
from atoll.crypto.identity import verify
from atoll.ledger import merkle
from atoll.ledger.entry import leaf
from atoll.ledger.verify import verify_file, verify_receipt, verify_together

from .parties import Party, World, broken

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
