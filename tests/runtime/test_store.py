"""The run store: the same on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import math
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from atoll.contract.errors import IntegrityError, PlanError
from atoll.contract.plan import Plan
from atoll.contract.wire import Message
from atoll.crypto.identity import Identity, verify
from atoll.ledger.verify import verify_file
from atoll.runtime import store as module
from atoll.runtime.store import RunStore

COORDINATOR = Identity.generate("coordinator")
PLAN = Plan.from_json(
    {
        "name": "heart", "program": "p", "params": {"b": 1, "a": "Ünïcode \0 '\"; DROP TABLE runs"},
        "schema": {"name": "t", "columns": {"z": {"range": [0, 1]}, "a": {"range": [0, 1]}, "m": {"range": [0, 1]}}},
    }
)  # fmt: skip
HASH = "a" * 64
FAR = 2**31 + 5  # seconds: the year 2038, and more than 32 bits hold


def reduced(value: float = 1.0) -> Message:
    return Message("reduced", {"sites": ["north"]}, {"x": np.full(3, value), "n": np.array(7)})


def finish_round(store: RunStore, run: str, number: int, **more: Any) -> None:
    values: dict[str, Any] = {"stage": "program", "name": "p/x", "seconds": 0.5, "reduced": reduced(number)}
    store.finish_round(run, number, **{**values, "entries": [], "receipts": {}, **more})


def all_rows(store: RunStore) -> dict[str, list[Any]]:
    with store._begin() as db:
        tables = module.RUNS.metadata.sorted_tables
        return {t.name: sorted(map(repr, db.execute(t.select()))) for t in tables}


# ---------------------------------------------------------------- runs


def test_a_run_is_stored_as_it_was_submitted(store: RunStore, open_store: Callable[[], RunStore]) -> None:
    run = store.create_run(PLAN, ["south", "north"])
    assert len(run) == 32 and int(run, 16) >= 0
    for one in (store, open_store()):
        row = one.run(run)
        assert row["plan"] == PLAN and row["plan"].hash == PLAN.hash == row["plan_hash"]
        assert list(row["plan"].table.columns) == ["z", "a", "m"]
        assert (row["sites"], row["status"], row["note"], row["cancel"]) == (("south", "north"), "submitted", "", False)
        assert row["name"] == "heart"


def test_runs_are_listed_oldest_first(store: RunStore) -> None:
    made = [store.create_run(PLAN, []) for _ in range(20)]
    assert [row["run"] for row in store.runs()] == made
    for run in made[:3]:
        store.set_status(run, "running")
    store.set_status(made[5], "failed", "why")
    assert [row["run"] for row in store.runs("running")] == made[:3]
    assert [row["run"] for row in store.runs("running", "failed")] == [*made[:3], made[5]]
    assert store.runs("finished") == [] and "plan" not in store.runs()[0] and "result" not in store.runs()[0]
    assert store.run(made[5])["note"] == "why"


@pytest.mark.parametrize("run", ["0" * 32, "", "x" * 500, "'; DROP TABLE runs; --"])
def test_there_is_no_such_run(store: RunStore, run: str) -> None:
    for ask in (store.run, store.request_cancel):
        with pytest.raises(PlanError) as error:
            ask(run)
        assert error.value.code == "run.unknown" and error.value.remedy
    with pytest.raises(PlanError) as error:
        store.result(run)
    assert error.value.code == "run.no-result"
    assert (store.rounds(run), store.metrics(run), store.checkpoint(run), store.reduced(run, 0)) == ([], [], None, None)


def test_a_cancel_is_seen_by_the_running_coordinator(store: RunStore, open_store: Callable[[], RunStore]) -> None:
    run, other = store.create_run(PLAN, []), store.create_run(PLAN, [])
    open_store().request_cancel(run)
    assert store.run(run)["cancel"] is True and store.run(other)["cancel"] is False
    assert [row["cancel"] for row in store.runs()] == [True, False]


def test_what_another_party_wrote_is_a_note(store: RunStore) -> None:
    """Failures tell what sites reported: any text at all."""
    run = store.create_run(PLAN, [])
    for note in ("ümlaut ☃ 𝄞", "nul \0 byte", "'; DROP TABLE runs; --", "%s %(x)s :x", "x" * 100_000, "\x1b[31m\r\n"):
        store.set_status(run, "failed", note)
        assert store.run(run)["note"] == note.replace("\0", "")
        store.end_run(run, "failed", note, ["north"], {"code": note})
        assert store.run(run)["note"] == note.replace("\0", "")
        assert store.owed_closes("north") == [(run, "failed", {"code": note})]


def test_a_result_is_what_was_saved(store: RunStore, open_store: Callable[[], RunStore]) -> None:
    run = store.create_run(PLAN, [])
    with pytest.raises(PlanError):
        store.result(run)
    result = {"mean": 1 / 3, "auc": float("nan"), "text": "ü\0", "nested": [{"a": None}]}
    store.end_run(run, "finished", "", (), None, ({"other": 1}, {"gone": np.zeros(1)}))
    store.end_run(run, "finished", "", (), None, (result, {"w": np.arange(5.0), "b": np.array(2, "<i2")}))
    got, arrays = open_store().result(run)
    assert math.isnan(got.pop("auc")) and got == {k: v for k, v in result.items() if k != "auc"}
    assert list(arrays) == ["w", "b"] and arrays["w"].tolist() == [0, 1, 2, 3, 4] and arrays["b"].dtype.str == "<i2"


def test_sites_that_do_not_know_how_a_run_ended(store: RunStore) -> None:
    one, two = store.create_run(PLAN, []), store.create_run(PLAN, [])
    store.end_run(one, "finished", "", ["north", "south"], None)
    store.end_run(two, "failed", "why", ["north"], {"code": "x"})
    assert store.run(two)["status"] == "failed" and store.run(two)["note"] == "why"
    assert sorted(store.owed_closes("north")) == sorted([(one, "finished", None), (two, "failed", {"code": "x"})])
    store.close_told(one, "north")
    store.close_told(one, "north")
    assert store.owed_closes("north") == [(two, "failed", {"code": "x"})]
    assert store.owed_closes("south") == [(one, "finished", None)] and store.owed_closes("west") == []
    store.end_run(one, "cancelled", "", ["west"], None)  # the last end counts
    assert store.owed_closes("south") == [] and store.owed_closes("west") == [(one, "cancelled", None)]


# ---------------------------------------------------------------- rounds


def test_a_finished_round_comes_back_for_replaying(store: RunStore, open_store: Callable[[], RunStore]) -> None:
    run = store.create_run(PLAN, [])
    assert store.reduced(run, 0) is None
    ledger = store.ledger(COORDINATOR.public, COORDINATOR.sign)
    entry = ledger.chain.next("received", {"root": "x"}, [{"site": "north", "seq": 1, "hash": "y"}])
    finish_round(store, run, 0, entries=[entry], receipts={"north": [{"of": 1}]})
    ledger.chain.commit(entry)
    finish_round(store, run, 1)
    finish_round(store, run, 10)
    again = open_store()
    assert (again.next_round(run), again.next_round("none")) == (11, 0)
    assert [(r["number"], r["name"], r["seconds"], r["receipts"]) for r in again.rounds(run)] == [
        (0, "p/x", 0.5, {"north": [{"of": 1}]}), (1, "p/x", 0.5, {}), (10, "p/x", 0.5, {}),
    ]  # fmt: skip
    stored = again.reduced(run, 1)
    assert stored is not None and (stored.kind, stored.meta) == ("reduced", {"sites": ["north"]})
    assert stored.arrays["x"].tolist() == [1, 1, 1] and stored.arrays["n"] == 7 and again.reduced(run, 2) is None
    assert again.ledger(COORDINATOR.public, COORDINATOR.sign).chain.seq == 1


def test_a_round_and_its_ledger_entries_are_stored_together_or_not_at_all(store: RunStore) -> None:
    run = store.create_run(PLAN, [])
    ledger = store.ledger(COORDINATOR.public, COORDINATOR.sign)
    good = ledger.chain.next("received", {"root": "x"}, [])
    before = all_rows(store)
    for wrong in (
        {"entries": [good, good]},  # the same place in the ledger twice
        {"entries": [{**good, "seq": 0}]},
        {"entries": [good], "receipts": {"x": {1}}},
        {"entries": [good], "name": None},
        {"entries": [good], "reduced": Message("reduced", {}, {"x": np.array(["text"])})},
    ):
        with pytest.raises(Exception):  # noqa: B017 (whatever it is, nothing was stored)
            finish_round(store, run, 0, **wrong)
        assert all_rows(store) == before and store.reduced(run, 0) is None
    finish_round(store, run, 0, entries=[good])
    after = all_rows(store)
    with pytest.raises(sa.exc.IntegrityError):
        finish_round(store, run, 0, reduced=reduced(9.0))
    assert all_rows(store) == after


def test_arrays_larger_than_a_part(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    run = store.create_run(PLAN, [])
    big = {"x": np.random.default_rng(0).standard_normal(5000), "y": np.arange(3), "e": np.zeros((0, 2))}
    store.end_run(run, "finished", "", (), None, ({}, big))
    arrays = store.result(run)[1]
    assert all(np.array_equal(arrays[name], big[name]) for name in big)
    store.end_run(run, "finished", "", (), None, ({}, {"x": np.zeros(1)}))  # fewer parts than before
    assert list(store.result(run)[1]) == ["x"]


@pytest.mark.slow
def test_a_hundred_mebibytes(store: RunStore) -> None:
    run = store.create_run(PLAN, [])
    big = np.random.default_rng(0).integers(0, 255, 100 << 20, "|u1")
    store.end_run(run, "finished", "", (), None, ({}, {"x": big}))
    assert np.array_equal(store.result(run)[1]["x"], big)


def test_a_checkpoint_lets_earlier_rounds_be_forgotten(store: RunStore) -> None:
    run, other = store.create_run(PLAN, []), store.create_run(PLAN, [])
    for number in range(12):
        finish_round(store, run, number, stage="prepare" if number < 2 else "program")
    finish_round(store, other, 3)
    assert store.checkpoint(run) is None
    store.save_checkpoint(run, 11, "program", {"w": np.ones(2)})
    number, state = store.checkpoint(run) or (0, {})
    assert number == 11 and state["w"].tolist() == [1, 1]
    kept = [n for n in range(12) if store.reduced(run, n) is not None]
    assert kept == [0, 1, 11] and store.reduced(other, 3) is not None
    assert len(store.rounds(run)) == 12  # that they took place stays known
    store.save_checkpoint(run, 12, "program", {"v": np.zeros(1)})
    number, state = store.checkpoint(run) or (0, {})
    assert (number, list(state)) == (12, ["v"]) and store.reduced(run, 11) is None


@pytest.mark.slow
def test_a_checkpoint_after_very_many_rounds(store: RunStore) -> None:
    run = store.create_run(PLAN, [])
    row = {"run": run, "stage": "program", "name": "p/x", "seconds": 0.1, "receipts": "{}"}
    with store._begin() as db:
        for start in range(0, 70_000, 10_000):
            db.execute(module.ROUNDS.insert(), [{**row, "number": start + n} for n in range(10_000)])
    finish_round(store, run, 70_000)
    store.save_checkpoint(run, 70_001, "program", {})
    assert store.reduced(run, 70_000) is None


def test_metrics_are_listed_by_step_and_replaced(store: RunStore) -> None:
    run, other = store.create_run(PLAN, []), store.create_run(PLAN, [])
    store.add_metrics(run, 10, {"loss": 0.25})
    store.add_metrics(run, 2, {"loss": 0.5, "auc": 0.75})
    store.add_metrics(other, 0, {"loss": 9.0})
    store.add_metrics(run, 10, {"loss": 0.125})  # after a restart
    rows = store.metrics(run)
    assert [row["step"] for row in rows] == [2, 2, 10] and rows[-1]["value"] == 0.125
    assert {row["name"]: row["value"] for row in rows[:2]} == {"loss": 0.5, "auc": 0.75}
    store.add_metrics(run, 2, {})
    assert [row["step"] for row in store.metrics(run)] == [10]


def test_metrics_may_be_any_number(store: RunStore) -> None:
    run = store.create_run(PLAN, [])
    values = {
        "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "tiny": 5e-324, "f4": np.float32(0.5),
        "int": 3, "i8": np.int64(4), "0d": np.array(0.1), "third": 1 / 3,
    }  # fmt: skip
    store.add_metrics(run, 0, values)
    got = {row["name"]: row["value"] for row in store.metrics(run)}
    assert math.isnan(got.pop("nan")) and got == {n: float(v) for n, v in values.items() if n != "nan"}
    assert all(type(value) is float for value in got.values())


# ---------------------------------------------------------------- enrolment


def test_a_token_is_used_once(store: RunStore) -> None:
    store.invite("north", HASH, FAR)
    assert store.sites()["north"]["public_key"] == "" and store.roster() == {}
    store.enrol("north", HASH, "key", "cert")
    assert store.roster() == {"north": "key"} and store.sites()["north"]["certificates"] == "cert"
    for token in (HASH, "", "b" * 64):
        with pytest.raises(IntegrityError) as error:
            store.enrol("north", token, "evil", "cert")
        assert error.value.code == "token.refused"
    assert store.roster() == {"north": "key"}


def test_a_token_is_for_one_site_and_for_a_time(store: RunStore) -> None:
    store.invite("north", HASH, FAR)
    store.invite("south", "b" * 64, int(time.time()) - 5)
    for site, token, code in (
        ("south", HASH, "token.refused"), ("west", HASH, "token.refused"), ("north", "b" * 64, "token.refused"),
        ("south", "b" * 64, "token.expired"), ("north", "", "token.refused"),
    ):  # fmt: skip
        with pytest.raises(IntegrityError) as error:
            store.enrol(site, token, "evil", "cert")
        assert error.value.code == code and error.value.remedy
    assert store.roster() == {}
    store.enrol("north", HASH, "key", "cert")


def test_a_later_invitation_replaces_the_earlier(store: RunStore) -> None:
    store.invite("north", HASH, FAR)
    store.invite("north", "b" * 64, FAR)
    with pytest.raises(IntegrityError):
        store.enrol("north", HASH, "old", "cert")
    store.enrol("north", "b" * 64, "key", "cert")
    store.invite("north", "c" * 64, FAR)
    assert store.roster() == {"north": "key"}  # good until the new token is used
    store.enrol("north", "c" * 64, "new", "cert2")
    assert store.roster() == {"north": "new"} and store.sites()["north"]["certificates"] == "cert2"


def test_a_revoked_site_is_out_until_it_is_enrolled_anew(store: RunStore) -> None:
    for site in ("north", "south"):
        store.invite(site, HASH, FAR)
        store.enrol(site, HASH, f"key of {site}", "cert")
    store.invite("north", "b" * 64, FAR)
    store.revoke("north")
    assert store.roster() == {"south": "key of south"} and store.sites()["north"]["revoked"] is True
    with pytest.raises(IntegrityError):  # its open invitation is void too
        store.enrol("north", "b" * 64, "key", "cert")
    store.invite("north", "c" * 64, FAR)
    assert "north" not in store.roster()
    store.enrol("north", "c" * 64, "new", "cert")
    assert store.roster() == {"north": "new", "south": "key of south"}
    with pytest.raises(PlanError) as error:
        store.revoke("west")
    assert error.value.code == "site.unknown"


def test_one_token_used_by_many_at_once(store: RunStore) -> None:
    store.invite("north", HASH, FAR)
    barrier, outcomes = threading.Barrier(8), []

    def attempt(number: int) -> None:
        barrier.wait()
        try:
            store.enrol("north", HASH, f"key {number}", "cert")
        except BaseException as error:
            outcomes.append(error)
        else:
            outcomes.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(winners) == 1 and store.roster() == {"north": f"key {winners[0]}"}
    assert all(isinstance(o, IntegrityError) for o in outcomes if not isinstance(o, int)), outcomes


def test_a_renewed_certificate_and_the_one_in_use_are_good(store: RunStore) -> None:
    """Answers may be lost: until the new one was seen, the old one is good, however often it is renewed."""

    def good() -> set[str]:
        return set(store.sites()["north"]["certificates"].split())

    store.invite("north", HASH, FAR)
    store.enrol("north", HASH, "key", "1" * 64)
    for number in "234":
        store.add_certificate("north", number * 64)
        assert good() == {number * 64, "1" * 64}
    store.confirm_certificate("north", "4" * 64)
    assert good() == {"4" * 64}
    store.add_certificate("north", "5" * 64)
    assert good() == {"5" * 64, "4" * 64}


def test_when_a_site_was_seen(store: RunStore) -> None:
    store.invite("north", HASH, FAR)
    assert store.sites()["north"]["seen"] == ""
    store.seen("north")
    store.seen("nobody")
    assert store.sites()["north"]["seen"].startswith("20") and list(store.sites()) == ["north"]


# ---------------------------------------------------------------- ledger


def test_the_ledger_goes_on_where_it_was(store: RunStore, open_store: Callable[[], RunStore], tmp_path: Path) -> None:
    ledger = store.ledger(COORDINATOR.public, COORDINATOR.sign)
    for number in range(12):
        ledger.record("opened", {"run": "r", "number": number, "text": "ü"})
    again = open_store()
    more = again.ledger(COORDINATOR.public, COORDINATOR.sign)
    assert (more.chain.seq, more.chain.head) == (12, ledger.chain.head)
    more.record("closed", {})
    again.export_ledger(tmp_path / "c.jsonl")
    verified = verify_file(tmp_path / "c.jsonl", verify)
    assert [e["kind"] for e in verified.entries] == ["genesis", *["opened"] * 12, "closed"]
    assert verified.public == COORDINATOR.public


def test_a_ledger_entry_that_is_not_stored_does_not_move_the_head(store: RunStore) -> None:
    ledger = store.ledger(COORDINATOR.public, COORDINATOR.sign)
    store.ledger(COORDINATOR.public, COORDINATOR.sign).record("opened", {})  # someone else writes the same ledger
    head = (ledger.chain.seq, ledger.chain.head)
    with pytest.raises(sa.exc.IntegrityError):
        ledger.record("opened", {})
    assert (ledger.chain.seq, ledger.chain.head) == head


# ---------------------------------------------------------------- each database's own


def test_sqlite_files_are_their_owners_alone(tmp_path: Path) -> None:
    store = RunStore(f"sqlite:///{tmp_path / 'store.db'}")
    store.create_run(PLAN, [])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert set(modes) >= {"store.db", "store.db-wal"} and set(modes.values()) == {0o600}
    store.close()
    (tmp_path / "store.db").chmod(0o644)
    RunStore(f"sqlite:///{tmp_path / 'store.db'}").close()
    assert stat.S_IMODE((tmp_path / "store.db").stat().st_mode) == 0o600


def test_postgresql_over_a_unix_socket(postgres: Any) -> None:
    store = RunStore(postgres.url(postgres.new_database(), socket=True))
    assert store.run(store.create_run(PLAN, ["north"]))["sites"] == ("north",)
    store.close()


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")

    monkeypatch.setattr(sa, "create_engine", missing)
    with pytest.raises(PlanError) as error:
        RunStore("postgresql+psycopg://localhost/x")
    assert error.value.code == "store.driver" and "atoll[postgres]" in error.value.remedy


def test_many_threads_on_one_store(store: RunStore) -> None:
    run = store.create_run(PLAN, [])
    failures: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for number in range(10):
                store.add_metrics(run, name * 100 + number, {"x": number})
                finish_round(store, run, name * 100 + number)
                assert store.reduced(run, name * 100 + number) is not None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(store.rounds(run)) == 40 == len(store.metrics(run))
