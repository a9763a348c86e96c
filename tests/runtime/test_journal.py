"""A site's journal: all or nothing, through exceptions, full disks and kill -9, with real files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.contract.errors import AtollError, IntegrityError, PrivacyBudgetError
from atoll.crypto.identity import Identity, verify
from atoll.ledger.verify import Verified, verify_file
from atoll.runtime import journal as module
from atoll.runtime.journal import Journal

IDENTITY = Identity.generate("north")
RUN = "0" * 32


def opened(path: Path) -> Journal:
    return Journal(path, "north", IDENTITY.public, IDENTITY.sign)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = opened(tmp_path / "journal.db")
    yield made
    made.close()


def store(journal: Journal, task: str = "t", size: int = 3, **more: Any) -> Any:
    arrays = {"x": np.arange(float(size))}
    return journal.store_release(task, RUN, "p", {"run": RUN, "task": task}, arrays, **{"state": None, **more})


def exported(journal: Journal) -> Verified:
    path = journal._path.with_suffix(".jsonl")
    journal.export(path)
    return verify_file(path, verify)


def kinds(journal: Journal) -> list[str]:
    return [entry["kind"] for entry in exported(journal).entries]


def contents(journal: Journal) -> list[Any]:
    """Everything in the database."""
    db = sqlite3.connect(journal._path)
    tables = ("ledger", "release", "state", "run", "setting")
    rows = [db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables]
    db.close()
    return rows


def files(journal: Journal) -> set[str]:
    return {path.name for path in journal._path.parent.iterdir() if "release" in path.name}


def release(journal: Journal, task: str = "t") -> Any:
    return journal.begin(task, RUN, "p")[1]


def state(journal: Journal, program: str = "p", run: str = RUN) -> dict[str, Any]:
    return journal.begin("no such task", run, program)[2]


# ---------------------------------------------------------------- what is stored


def test_a_new_journal_begins_with_who_it_is(journal: Journal) -> None:
    assert kinds(journal) == ["genesis"] and exported(journal).public == IDENTITY.public
    assert journal.chain.seq == 0 and journal.entry(0)["hash"] == journal.chain.head


def test_a_release_is_stored_with_its_entry_and_its_state(journal: Journal) -> None:
    message = store(journal, state={"w": np.ones(2)})
    assert message.kind == "release" and message.meta["re"] == "t"
    entry = message.meta["entry"]
    assert entry == journal.entry(1) and entry["body"] == {"run": RUN, "task": "t"} and entry["kind"] == "release"
    kept = release(journal)
    assert (kept.kind, kept.meta) == (message.kind, message.meta) and kept.arrays["x"].tolist() == [0, 1, 2]
    assert journal.begin("t", RUN, "p")[0] == "unknown" and state(journal)["w"].tolist() == [1, 1]
    assert state(journal, "other") == {} and state(journal, run="1" * 32) == {}
    assert journal.released_hash(1) == entry["hash"] and journal.unacknowledged(RUN) == [1]


def test_state_is_replaced_or_kept(journal: Journal) -> None:
    store(journal, "a", state={"w": np.ones(2)})
    store(journal, "b")
    assert state(journal)["w"].tolist() == [1, 1]
    store(journal, "c", state={"v": np.zeros(1)})
    assert set(state(journal)) == {"v"}
    store(journal, "d", state={})
    assert state(journal) == {}


def test_what_a_protection_keeps_is_the_same_from_memory_and_from_disk(journal: Journal, tmp_path: Path) -> None:
    kept = {"seed": np.arange(4, dtype=np.uint8), "at": np.array([3, 0])}
    store(journal, protection=kept)
    for _ in range(2):
        told = journal.state(RUN, module.PROTECTION)
        assert {name: value.tolist() for name, value in told.items()} == {"seed": [0, 1, 2, 3], "at": [3, 0]}
        assert not any(value.flags.writeable for value in told.values())
        told.clear()  # a copy
    with pytest.raises(IntegrityError):
        store(journal, protection={"seed": np.zeros(1)})  # the same task again: nothing is stored
    assert journal.state(RUN, module.PROTECTION)["seed"].tolist() == [0, 1, 2, 3]
    journal.close()
    again = opened(tmp_path / "journal.db")
    assert again.state(RUN, module.PROTECTION)["at"].tolist() == [3, 0]
    again.open_run(RUN, "running", {})
    again.set_status(RUN, "failed")
    assert again.state(RUN, module.PROTECTION) == {}
    again.close()


def test_everything_survives_reopening(journal: Journal, tmp_path: Path) -> None:
    store(journal, state={"w": np.ones(2)})
    journal.open_run(RUN, "pending", {"plan": {"b": 1, "a": [1.5]}})
    journal.set_setting("roster", "{}")
    before = contents(journal)
    journal.close()
    again = opened(tmp_path / "journal.db")
    assert contents(again) == before and again.chain.seq == 1
    assert release(again).arrays["x"].tolist() == [0, 1, 2]
    again.record("joined", {})
    assert kinds(again) == ["genesis", "release", "joined"]
    again.close()


def test_the_same_task_is_not_released_twice(journal: Journal) -> None:
    store(journal)
    before = contents(journal)
    with pytest.raises(IntegrityError):
        store(journal, state={"w": np.ones(1)})
    assert contents(journal) == before
    assert store(journal, "other").meta["entry"]["seq"] == 2


def test_what_is_not_there(journal: Journal) -> None:
    assert journal.begin("t", RUN, "p") == ("unknown", None, {})
    assert journal.run(RUN) is None and journal.status(RUN) == "unknown" and journal.setting("x") == ""
    with pytest.raises(IntegrityError):
        journal.entry(5)
    for seq in (0, 1):
        with pytest.raises(IntegrityError):
            journal.released_hash(seq)


def test_runs_and_settings(journal: Journal) -> None:
    journal.open_run("b", "pending", {"plan": {"z": 1, "a": 2}})
    journal.open_run("a", "pending", {"plan": {}})
    journal.open_run("b", "approved", {"plan": "other"})  # known already
    assert journal.run("b") == ("pending", {"plan": {"z": 1, "a": 2}}, "")
    journal.set_status("b", "running", "note")
    assert [row[:2] for row in journal.runs()] == [("b", "running"), ("a", "pending")]
    assert journal.run("b")[2] == "note" and journal.status("b") == "running"  # type: ignore[index]
    assert list(journal.run("b")[1]["plan"]) == ["z", "a"]  # type: ignore[index] (a schema's columns have an order)
    assert journal.begin("t", "b", "p")[0] == "running"
    journal.set_setting("x", "1")
    journal.set_setting("x", "2")
    assert journal.setting("x") == "2"


# ---------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), IntegrityError("c", "mine")])
def test_an_exception_leaves_nothing(journal: Journal, error: BaseException) -> None:
    before, head = contents(journal), (journal.chain.seq, journal.chain.head)
    with pytest.raises(type(error)), journal.transaction():
        journal._append(journal.chain.next("a", {}))
        journal._append(journal.chain.next("b", {}))
        journal._db.execute("INSERT INTO setting VALUES ('a', 'b')")
        raise error
    assert contents(journal) == before and (journal.chain.seq, journal.chain.head) == head
    journal.record("c", {})
    assert kinds(journal) == ["genesis", "c"]


@pytest.mark.parametrize("table", ["ledger", "release", "state"])
@pytest.mark.parametrize("large", [False, True])
def test_a_write_that_fails_leaves_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, table: str, large: bool
) -> None:
    """Whichever of the three is not written, none is: entry, release, state."""
    monkeypatch.setattr(module, "LARGE_BYTES", 10 if large else 10**9)
    journal._db.execute(f"CREATE TRIGGER no BEFORE INSERT ON {table} BEGIN SELECT raise(ABORT, 'no'); END")
    before, head = contents(journal), (journal.chain.seq, journal.chain.head)
    with pytest.raises(IntegrityError) as error:
        store(journal, state={"w": np.ones(1)})
    assert error.value.code == "ledger.not-written" and error.value.remedy
    assert contents(journal) == before and (journal.chain.seq, journal.chain.head) == head and files(journal) == set()
    journal._db.execute("DROP TRIGGER no")
    assert store(journal, state={"w": np.ones(1)}).meta["entry"]["seq"] == 1
    assert len(files(journal)) == large and release(journal).arrays["x"].tolist() == [0, 1, 2]
    exported(journal)


def test_an_unsendable_release_leaves_nothing(journal: Journal) -> None:
    before = contents(journal)
    for body, arrays in (({"x": float("nan")}, {}), ({}, {"x": np.array(["text"])})):
        with pytest.raises(AtollError):
            journal.store_release("t", RUN, "p", body, arrays, {"w": np.ones(1)})
        assert contents(journal) == before
    store(journal)
    exported(journal)


def test_threads_do_not_mix_their_transactions(journal: Journal) -> None:
    failures: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for number in range(20):
                seq = store(journal, f"{name}/{number}", state={"n": np.array(number)}).meta["entry"]["seq"]
                journal.set_setting(str(name), str(number))
                if number % 2:
                    journal.acknowledge([(seq, {})])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert kinds(journal).count("release") == 80 and kinds(journal).count("receipt") == 40
    assert len(journal.unacknowledged(RUN)) == 40


def test_another_process_may_write_too(journal: Journal) -> None:
    """An operator's command has the journal open besides the running site: the chain stays one chain."""
    other = opened(journal._path)
    store(journal, "a")
    other.record("approved", {"by": "operator"})
    other.set_setting("approved", "yes")
    store(journal, "b")
    other.record("approved", {})
    journal.record("closed", {})
    assert kinds(other) == ["genesis", "release", "approved", "release", "approved", "closed"]
    assert journal.setting("approved") == "yes"
    other.close()


def test_what_another_process_did_with_a_run_is_seen(journal: Journal) -> None:
    """Else a second set of survivors could be signed, and keys would be used after their run was ended elsewhere."""
    journal.open_run(RUN, "running", {})
    sent = store(journal, "a", protection={"at": np.array([4, 0])}).meta["entry"]
    other = opened(journal._path)
    assert other.state(RUN, module.PROTECTION)["at"].tolist() == [4, 0]
    store(other, "b", protection={"at": np.array([5, 0]), "signed": np.zeros(32)})
    assert journal.state(RUN, module.PROTECTION).keys() == {"at", "signed"}
    store(journal, "c", protection={"at": np.array([6, 0])})
    other.end_run(RUN, "cancelled", None, "")
    assert journal.state(RUN, module.PROTECTION) == {} == journal._kept
    assert journal.released_hash(1) == sent["hash"] and journal._sent == {}
    other.close()


def test_two_processes_do_not_both_go_on_with_a_run(journal: Journal) -> None:
    """Each read the same state, and would sign survivors of its own choice."""
    store(journal, "a", protection={"at": np.array([4, 0])})
    other = opened(journal._path)
    before = [each.state(RUN, module.PROTECTION) for each in (journal, other)]
    other.set_setting("operator", "looked")  # which concerns no run
    store(journal, "b", protection=before[0] | {"signed": np.zeros(32)})
    with pytest.raises(IntegrityError) as error:
        store(other, "c", protection=before[1] | {"signed": np.ones(32)})
    assert error.value.code == "journal.two-processes" and error.value.remedy
    kept = other.state(RUN, module.PROTECTION)
    assert kept["signed"].sum() == 0 and kinds(journal) == ["genesis", "release", "release"]
    store(other, "d", protection=kept)
    other.close()


def test_what_a_round_asked_is_durable_before_it_is_computed(journal: Journal) -> None:
    journal.begin_round(RUN, 3, "q")
    other = opened(journal._path)  # as after kill -9
    other.begin_round(RUN, 3, "q")
    with pytest.raises(PrivacyBudgetError) as error:
        other.begin_round(RUN, 3, "another")
    assert error.value.code == "budget.question"
    other.close()


def test_a_locked_journal_says_so(journal: Journal) -> None:
    journal._db.execute("PRAGMA busy_timeout=50")
    blocker = sqlite3.connect(journal._path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    head = journal.chain.head
    with pytest.raises(IntegrityError) as error:
        store(journal)
    assert error.value.code == "ledger.not-written" and journal.chain.head == head
    blocker.execute("ROLLBACK")
    blocker.close()
    store(journal)


def test_a_log_that_cannot_be_emptied_leaves_the_patience_for_others_as_it_was(journal: Journal) -> None:
    journal.open_run(RUN, "running", {})
    journal.record("note", {})
    reading = journal._db.execute("SELECT * FROM ledger")  # in the same connection, which forbids it
    reading.fetchone()
    journal.end_run(RUN, "finished", None, "")
    reading.close()
    assert journal._db.execute("PRAGMA busy_timeout").fetchone() == (30_000,)


# ---------------------------------------------------------------- receipts


def test_acknowledging_forgets_the_content_once(journal: Journal) -> None:
    for task in "abc":
        store(journal, task)
    journal.acknowledge([(1, {"entry": "one"}), (3, {"entry": "three"})])
    assert kinds(journal) == ["genesis", "release", "release", "release", "receipt", "receipt"]
    assert journal.entry(5)["body"] == {"of": 3, "receipt": {"entry": "three"}}
    before = contents(journal)
    journal.acknowledge([(1, {"entry": "again"}), (3, {})])
    journal.acknowledge([(1, {}), (1, {}), (99, {}), (0, {})])
    journal.acknowledge([])
    assert contents(journal) == before
    for task in "ac":
        with pytest.raises(IntegrityError) as error:
            release(journal, task)
        assert error.value.code == "release.acknowledged"
    assert release(journal, "b").arrays["x"].tolist() == [0, 1, 2]
    assert journal.unacknowledged(RUN) == [2] == exported(journal).unacknowledged
    assert journal.released_hash(1) == journal.entry(1)["hash"]


def test_receipts_are_stored_with_the_next_release(journal: Journal) -> None:
    """One transaction and one signature: the release's own covers the receipts before it."""
    store(journal, "a")
    store(journal, "b")
    store(journal, "c", receipts=[(1, {"r": 1}), (2, {"r": 2}), (1, {})])
    verified = exported(journal)
    assert [e["kind"] for e in verified.entries] == ["genesis", "release", "release", "receipt", "receipt", "release"]
    assert [bool(e["sig"]) for e in verified.entries] == [True, True, True, False, False, True]
    assert verified.unacknowledged == [5]


def test_receipts_of_a_failed_release_are_not_stored(journal: Journal) -> None:
    store(journal, "a")
    before = contents(journal)
    with pytest.raises(IntegrityError):
        store(journal, "a", receipts=[(1, {})])
    assert contents(journal) == before and release(journal, "a") is not None


# ---------------------------------------------------------------- large releases


LARGE = (module.LARGE_BYTES >> 3) + 1


def test_a_large_release_is_a_file_until_it_is_acknowledged(journal: Journal) -> None:
    previous = os.umask(0)
    try:
        message = store(journal, "big", LARGE, state={"w": np.ones(1)})
    finally:
        os.umask(previous)
    (name,) = files(journal)
    path = journal._path.with_name(name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size > module.LARGE_BYTES
    assert journal._path.stat().st_size < 1 << 20
    kept = release(journal, "big")
    assert kept.meta == message.meta and np.array_equal(kept.arrays["x"], message.arrays["x"])
    store(journal, "small", receipts=[(1, {})])
    assert files(journal) == set()
    with pytest.raises(IntegrityError):
        release(journal, "big")


def test_a_release_of_four_mebibytes_is_no_file(journal: Journal) -> None:
    store(journal, "small", LARGE - 1000)
    assert files(journal) == set() and release(journal, "small").arrays["x"].size == LARGE - 1000


def test_large_releases_of_several_sites_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a sandbox: the same sequence number, another journal."""
    monkeypatch.setattr(module, "LARGE_BYTES", 10)
    journals = [opened(tmp_path / f"{name}.db") for name in ("north", "south")]
    for number, one in enumerate(journals):
        store(one, "t", 100 + number)
    assert [release(one).arrays["x"].size for one in journals] == [100, 101]
    journals[0].acknowledge([(1, {})])
    assert release(journals[1]).arrays["x"].size == 101
    for one in journals:
        one.close()


def test_a_receipt_that_cannot_be_stored_keeps_the_large_release(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE_BYTES", 10)
    store(journal, "big", 100)
    journal._db.execute("CREATE TRIGGER no BEFORE INSERT ON ledger BEGIN SELECT raise(ABORT, 'no'); END")
    with pytest.raises(IntegrityError):
        journal.acknowledge([(1, {})])
    assert release(journal, "big").arrays["x"].size == 100
    journal._db.execute("DROP TRIGGER no")
    journal.acknowledge([(1, {})])
    assert files(journal) == set()


def test_a_temporary_journal_is_no_file(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal.db", "north", IDENTITY.public, IDENTITY.sign, temporary=True)
    store(made, "a", state={"w": np.ones(2)})
    assert list(tmp_path.iterdir()) == []
    store(made, "big", LARGE)
    assert len(files(made)) == 1 and release(made, "big").arrays["x"].size == LARGE
    store(made, "c", receipts=[(1, {}), (2, {})])
    assert list(tmp_path.iterdir()) == [] and state(made)["w"].tolist() == [1, 1]
    assert kinds(made) == ["genesis", "release", "release", "receipt", "receipt", "release"]
    made.close()


def test_what_a_crash_left_behind_is_removed(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without its row, and one whose row was acknowledged just before the crash."""
    monkeypatch.setattr(module, "LARGE_BYTES", 10)
    store(journal, "a", 100)
    store(journal, "b", 100)
    kept = files(journal)
    journal._large(2).rename(journal._path.with_name("saved"))
    journal.acknowledge([(2, {})])
    journal._path.with_name("saved").rename(journal._large(2))
    journal._large(9).write_bytes(b"partial")
    other = journal._path.with_name("other.db-release-1.bin")
    other.write_bytes(b"of another journal")
    journal.close()
    again = opened(journal._path)
    assert files(again) == {*kept, other.name} - {journal._large(2).name}
    assert release(again, "a").arrays["x"].size == 100
    again.close()


# ---------------------------------------------------------------- kill -9


LOOP = """
import sys
from pathlib import Path
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from atoll.crypto.identity import Identity
from atoll.runtime import journal as module

module.LARGE_BYTES = 50_000
identity = Identity("north", Ed25519PrivateKey.from_private_bytes(bytes(32)))
journal = module.Journal(Path(sys.argv[1]), "north", identity.public, identity.sign)
RUN = "0" * 32
begun = made = int(journal.begin("none", RUN, "p")[2].get("made", 0))
while True:
    if made == begun + 8:
        print("ready", flush=True)
    owed = [(seq, {"r": 1}) for seq in journal.unacknowledged(RUN)[:2]] if made % 3 == 0 else []
    made += 1
    x = np.full(10 if made % 2 else 20_000, made)
    journal.store_release(f"t{made}", RUN, "p", {"made": made}, {"x": x}, {"made": np.array(made)}, owed)
    if made % 5 == 0:
        journal.acknowledge([(journal.unacknowledged(RUN)[0], {"r": 2})])
"""


def check_after_crash(path: Path) -> tuple[int, int]:
    """Open a journal after a crash and check it against itself; returns (releases, large files)."""
    identity = Identity("north", Ed25519PrivateKey.from_private_bytes(bytes(32)))
    journal = Journal(path, "north", identity.public, identity.sign)
    verified = exported(journal)
    entries = {e["seq"]: e for e in verified.entries if e["kind"] == "release"}
    rows = journal._db.execute("SELECT seq, task, hash, message IS NULL FROM release ORDER BY seq").fetchall()
    assert [row[0] for row in rows] == list(entries)
    assert [entry["body"]["made"] for entry in entries.values()] == list(range(1, len(entries) + 1))
    for seq, task, digest, forgotten in rows:
        made = entries[seq]["body"]["made"]
        assert (task, digest) == (f"t{made}", entries[seq]["hash"])
        if not forgotten:
            assert (journal.begin(task, RUN, "p")[1].arrays["x"] == made).all()  # type: ignore[union-attr]
    assert journal.unacknowledged(RUN) == verified.unacknowledged
    assert int(state(journal).get("made", 0)) == len(entries)
    large = {
        f"{path.name}-release-{seq}.bin" for seq in verified.unacknowledged if entries[seq]["body"]["made"] % 2 == 0
    }
    assert files(journal) == large
    journal.close()
    return len(entries), len(large)


def killed_at_random_instants(path: Path, times: int, seed: int) -> tuple[int, int]:
    chance, totals = random.Random(seed), []
    for _ in range(times):
        child = subprocess.Popen([sys.executable, "-c", LOOP, path], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.08))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        totals.append(check_after_crash(path))
    assert totals == sorted(totals, key=lambda total: total[0])
    return totals[-1]


def test_killed_at_any_instant_it_comes_back(tmp_path: Path) -> None:
    releases, large = killed_at_random_instants(tmp_path / "journal.db", 5, seed=1)
    assert releases >= 40 and large > 0


@pytest.mark.slow
def test_killed_at_many_instants_it_comes_back(tmp_path: Path) -> None:
    releases, large = killed_at_random_instants(tmp_path / "journal.db", 60, seed=2)
    assert releases >= 480 and large > 0


# ---------------------------------------------------------------- a full disk


def refused_until_there_is_room(journal: Journal, size: int, make_room: Any) -> None:
    """Release until the disk is full; then nothing is stored, and it works again when there is room."""
    for number in range(10_000):
        before, names, head = contents(journal), files(journal), (journal.chain.seq, journal.chain.head)
        try:
            store(journal, f"t{number}", size, state={"n": np.array(number)})
        except IntegrityError as error:
            assert error.code == "ledger.not-written" and "free disk space" in error.remedy
            break
    else:
        raise AssertionError("the disk was never full")
    assert number > 0
    for _ in range(3):  # and again, without anything being eaten up by the attempts
        with pytest.raises(IntegrityError):
            store(journal, f"t{number}", size, state={"n": np.array(number)})
        assert contents(journal) == before and files(journal) == names
        assert (journal.chain.seq, journal.chain.head) == head
    assert release(journal, f"t{number}") is None and int(state(journal)["n"]) == number - 1
    assert release(journal, "t0").arrays["x"].size == size
    make_room()
    store(journal, f"t{number}", size, state={"n": np.array(number)})
    assert int(state(journal)["n"]) == number
    assert release(journal, f"t{number}").arrays["x"].size == size


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB that is really full when it is full."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("size", [1000, 100_000], ids=["in-the-database", "in-files"])
def test_a_full_disk_lets_nothing_out(small_disk: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "LARGE_BYTES", 500_000)
    journal = opened(small_disk / "journal.db")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    refused_until_there_is_room(journal, size, ballast.unlink)
    verified = exported_elsewhere(journal, small_disk.parent)
    assert verified.entries[-1]["kind"] == "release"
    journal.close()


def exported_elsewhere(journal: Journal, folder: Path) -> Verified:
    journal.export(folder / "ledger.jsonl")
    return verify_file(folder / "ledger.jsonl", verify)


LIMITED = """
import importlib.util, resource, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("tests_of_journal", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
sys.modules["tests_of_journal"] = tests
spec.loader.exec_module(tests)
tests.module.LARGE_BYTES = 500_000
journal = tests.opened(Path(sys.argv[2]) / "journal.db")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), hard))
unlimited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
tests.refused_until_there_is_room(journal, int(sys.argv[3]), unlimited)
tests.exported(journal)
"""


def test_a_limit_on_files_lets_nothing_out(tmp_path: Path) -> None:
    """As on a full disk, where no file system can be mounted: no file may grow beyond a limit."""
    command = [sys.executable, "-W", "error", "-c", LIMITED, __file__, tmp_path, "1000", "300000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CUT_SHORT = """
import resource, sys
from pathlib import Path
import numpy as np
from atoll.contract.errors import IntegrityError
from atoll.crypto.identity import Identity
from atoll.runtime import journal as module

module.LARGE_BYTES = 1000
own = Identity.generate("north")
journal = module.Journal(Path(sys.argv[1]) / "journal.db", "north", own.public, own.sign)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
try:
    journal.store_release("t", "r", "p", {}, {"x": np.zeros(200_000)}, {})
except IntegrityError as error:
    assert error.code == "ledger.not-written"
else:
    sys.exit("a release that is not whole was stored")
"""


def test_a_large_release_cut_short_by_the_disk_is_not_a_release(tmp_path: Path) -> None:
    """The first write that does not fit takes a part and reports no error: the file must not pass for whole."""
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.bin"))
