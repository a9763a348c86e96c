"""Parties that lie with their own key: what is found in their ledger alone, and what beside the others'."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from atoll.contract.errors import IntegrityError
from atoll.crypto.identity import Identity, verify
from atoll.ledger.entry import leaf
from atoll.ledger.verify import verify_file, verify_receipt, verify_together

from .parties import Party, World, acknowledge, broken


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
