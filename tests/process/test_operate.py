"""What operators do, and what goes wrong at a site: both ends know, nothing hangs, no value leaks."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from atoll.contract.errors import AtollError
from atoll.contract.wire import Message
from atoll.runtime.courier import expect
from atoll.runtime.home import CoordinatorHome
from atoll.transport.grpc import GrpcTransport

SITES = ("alpha", "beta", "gamma")
SHORT = {"rounds": 80}
ENDLESS = {"rounds": 3, "local_epochs": 10_000_000, "batch_size": 2}


def releases(ledgers: dict[str, list[dict[str, Any]]], site: str, run: str) -> list[str]:
    """Hashes of a site's release entries of one run."""
    return [e["hash"] for e in ledgers[site] if e["kind"] == "release" and e["body"]["run"] == run]


def received(ledgers: dict[str, list[dict[str, Any]]], site: str, run: str) -> list[str]:
    """Hashes of the releases that the coordinator acknowledged to a site."""
    entries = [e for e in ledgers["coordinator"] if e["kind"] == "received" and e["body"]["run"] == run]
    return [leaf["hash"] for entry in entries for leaf in entry["leaves"] if leaf["site"] == site]


def ended(federation: Any, site: str, run: str) -> tuple[str, ...]:
    """(status, note) of a run at a site, once it has ended there."""
    found = federation.site_row(site, run)
    return found if found[0] in ("finished", "failed", "cancelled") else ()


def busy_seconds(party: Any) -> float:
    """Processor time a party's process has used."""
    used = psutil.Process(party.pid).cpu_times()
    return float(used.user)


# ---------------------------------------------------------------- cancel, revoke, several runs


def play_coordinator(federation: Any, site: str, request: Message) -> str:
    """Be the coordinator for one request; returns the code of the failure that the site answers with."""
    home = CoordinatorHome(federation.coordinator.home)

    async def ask() -> str:
        store = home.store()

        def refuse(*_: Any) -> Any:
            raise AssertionError("no site enrols or renews here")

        transport = GrpcTransport(lambda pem: home.authorise(store, pem), enrol=refuse, renew=refuse)
        port, enrol_port = federation.ports
        await transport.start("127.0.0.1", port, enrol_port, home.ca.pem, home.server_pair)
        try:
            await transport.request(site, request, 60, expect("release"))
        except AtollError as error:
            return error.code
        finally:
            await transport.stop()
            store.close()
        return ""

    return asyncio.run(ask())


def test_cancel_stops_both_sides(federation: Any, wait_until: Any) -> None:
    run = federation.submit("endless", params=ENDLESS)
    before = {name: busy_seconds(federation.sites[name]) for name in SITES}
    for name in SITES:  # they are computing when they have been busy for so long
        wait_until(lambda name=name: busy_seconds(federation.sites[name]) > before[name] + 1, "a busy handler")
    assert federation.rounds(run) == 0
    federation.as_coordinator("cancel", run[:10])
    federation.await_status(run, "cancelled")
    shown = federation.status(run)
    assert shown["status"] == "cancelled" and "cancelled by the coordinator's operator" in shown["note"]
    for name in SITES:
        wait_until(lambda name=name: federation.site_row(name, run)[0] == "cancelled", "the end at the site")
        wait_until(lambda name=name: "the run is cancelled at this site" in federation.sites[name].text(), "the stop")
    ledgers = federation.ledgers()
    assert not any(releases(ledgers, name, run) for name in SITES)

    federation.coordinator.kill()
    task = {"id": f"{run}/0/0/again/alpha", "run": run, "round": 0, "attempt": 0, "step": "again", "site": "alpha"}
    asked = {"name": "train", "program": "horizontal.fedavg", "version": "1", "params": {}, "fields": {},
             "reduce": "sum", "view": {}, "receipts": []}  # fmt: skip
    assert play_coordinator(federation, "alpha", Message("task", {**task, **asked})) == "run.not-open"
    assert federation.site_status("alpha", run)["status"] == "cancelled"


@pytest.mark.slow
def test_cancel_while_a_site_is_silent(federation: Any, wait_until: Any) -> None:
    run = federation.submit("silent", params={"rounds": 10_000}, run={"deadline_s": 60}, cohort={"min_sites": 3})
    federation.await_rounds(run, 3)
    federation.sites["gamma"].signal(signal.SIGSTOP)
    try:
        federation.as_coordinator("cancel", run)
        federation.await_status(run, "cancelled")
        for site in ("alpha", "beta"):
            wait_until(lambda site=site: federation.site_row(site, run)[0] == "cancelled", f"{site} hears of it")
    finally:
        federation.sites["gamma"].signal(signal.SIGCONT)
    wait_until(lambda: federation.site_row("gamma", run)[0] == "cancelled", "gamma hears of it")


@pytest.mark.slow
def test_revoked_site_is_cut_off(federation: Any, wait_until: Any) -> None:
    party = federation.join("revoked")
    federation.await_connected("revoked")
    cohort = {"sites": [*SITES, "revoked"], "min_sites": 3, "on_dropout": "continue"}
    run = federation.submit("revoking", cohort=cohort, params={"rounds": 600}, run={"deadline_s": 8})
    federation.await_rounds(run, 20)
    federation.as_coordinator("revoke", "revoked")
    assert party.wait() == 1
    assert "certificate.revoked" in party.text() and "ask the coordinator's operator" in party.text()
    assert "Traceback" not in party.text()
    row = federation.await_status(run, "finished")
    assert "revoked dropped out" in row["note"]
    ledgers = federation.ledgers()
    assert len(received(ledgers, "alpha", run)) == 600 + 2 > len(received(ledgers, "revoked", run)) > 0
    shown = json.loads(federation.as_coordinator("status", "--json").stdout)["sites"]
    assert shown["revoked"]["revoked"] is True and not any(shown[name]["revoked"] for name in SITES)

    party.start()
    assert party.wait() == 1 and "certificate.revoked" in party.text()
    federation.as_coordinator("revoke", "nobody", code=1)


@pytest.mark.slow
def test_two_runs_at_once(federation: Any) -> None:
    federation.coordinator.kill()
    first, second = federation.submit("first", params=SHORT), federation.submit("second", params=SHORT)
    federation.start_coordinator()
    federation.await_status(first, "finished")
    federation.await_status(second, "finished")
    for run in (first, second):
        federation.await_told(run)
    (_, one), (_, other) = federation.store.result(first), federation.store.result(second)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    ledgers = federation.ledgers()
    entries = [e["body"]["run"] for e in ledgers["coordinator"] if e["kind"] == "received"]
    turns = [run for run in entries if run in (first, second)]
    assert sum(turns[i] != turns[i - 1] for i in range(1, len(turns))) > 5, "they ran one after the other"
    federation.check_once(first, 82, ledgers)
    federation.check_once(second, 82, ledgers)


# ---------------------------------------------------------------- approval and policy


@pytest.mark.slow
def test_manual_approval(federation: Any, wait_until: Any) -> None:
    prints = {
        n: s["fingerprint"]
        for n, s in json.loads(federation.as_coordinator("status", "--json").stdout)["sites"].items()
    }
    with federation.policy("alpha", approval="manual", roster="manual"):
        run = federation.submit("asked", params=SHORT)
        wait_until(lambda: "awaiting approval: alpha" in federation.row(run)["note"], "the run waits")
        shown = federation.status(run)
        assert (shown["status"], shown["rounds"]) == ("running", 0) and shown["note"] == "awaiting approval: alpha"
        (waiting,) = json.loads(federation.as_site("alpha", "pending", "--json").stdout)
        assert waiting["run"] == run and waiting["plan"]["name"] == "asked" and waiting["hash"] == shown["plan_hash"]
        assert set(waiting["roster"]) == set(SITES)
        told = federation.as_site("alpha", "pending").stdout
        assert all(
            part in told for part in ("asked", run, "horizontal.fedavg", "research", "plain", "alpha, beta, gamma")
        )

        federation.as_site("alpha", "approve", run[:12])
        identities = {row["site"]: row for row in json.loads(federation.as_site("alpha", "roster", "--json").stdout)}
        assert {name: identities[name]["fingerprint"] for name in SITES} == {name: prints[name] for name in SITES}
        assert {identities[name]["state"] for name in SITES} == {"new"}
        wrong = federation.as_site("alpha", "roster", "--approve", f"beta={prints['gamma']}", code=1)
        assert "roster.mismatch" in wrong.stderr and "do not approve" in wrong.stderr
        assert federation.row(run)["status"] == "running" and federation.rounds(run) == 0, "the roster comes first"
        assert federation.site_row("alpha", run)[0] == "pending"

        known = [item for name in SITES for item in ("--approve", f"{name}={prints[name]}")]
        federation.as_site("alpha", "roster", *known)
        federation.await_status(run, "finished")

        denied = federation.submit("denied", params=SHORT)
        wait_until(lambda: "awaiting approval: alpha" in federation.row(denied)["note"], "the run waits")
        federation.as_site("alpha", "deny", denied)
        note = federation.await_status(denied, "failed")["note"]
        assert "site alpha" in note and "policy.denied" in note and "site's operator" in note, note
        assert f"[trace {denied}]" in note, note
        assert federation.site_row("alpha", denied)[0] == "denied"
        for name in ("beta", "gamma"):
            status, note = wait_until(lambda name=name: ended(federation, name, denied), "the end at the site")
            assert status == "failed" and "site alpha" in note and "policy.denied" in note, note

        dropped = federation.submit("dropped", params=SHORT)
        wait_until(lambda: "awaiting approval: alpha" in federation.row(dropped)["note"], "the run waits")
        federation.as_coordinator("cancel", dropped)
        federation.await_status(dropped, "cancelled")
        assert wait_until(lambda: ended(federation, "alpha", dropped), "alpha hears of it") == ("cancelled", "")
        federation.as_site("alpha", "approve", dropped, code=1)
    ledgers = federation.ledgers()
    kinds = [e["kind"] for e in ledgers["alpha"] if e["body"].get("run") == run or e["kind"] == "roster"]
    assert kinds[:3] == ["approved", "roster", "joined"] and kinds[3] == "release"
    assert not [
        releases(ledgers, name, gone) for name in SITES for gone in (denied, dropped) if releases(ledgers, name, gone)
    ]


@pytest.mark.slow
def test_withdrawing_from_a_running_study(federation: Any, wait_until: Any) -> None:
    run = federation.submit("withdrawn", params={"rounds": 10_000})
    federation.await_rounds(run, 5)
    federation.as_site("beta", "deny", run)
    note = federation.await_status(run, "failed")["note"]
    assert "site beta" in note and "round " in note and f"[trace {run}]" in note, note
    assert federation.site_row("beta", run)[0] == "denied"
    assert wait_until(lambda: ended(federation, "alpha", run), "the end at alpha")[0] == "failed"


@pytest.mark.slow
def test_policy_refusals_are_all_listed(federation: Any, wait_until: Any) -> None:
    strict = {"programs": ["statistics.*"], "purposes": ["teaching"], "protections": ["secagg"], "min_sites": 5}
    with federation.policy("beta", **strict):
        run = federation.submit("refused", params=SHORT)
        note = federation.await_status(run, "failed")["note"]
        assert "site beta" in note and f"[trace {run}]" in note, note
        for code in ("policy.program", "policy.purpose", "policy.protection", "policy.min-sites"):
            assert code in note, f"{code} is not in: {note}"
        assert all(f"'{key}'" in note for key in ("programs", "purposes", "protections", "min_sites")), note
        own = federation.site_status("beta", run)
        assert "horizontal.fedavg@1" in own["note"] and f"[trace {run}]" in own["note"], own
        offline = federation.as_site("beta", "check", federation.plan("refused", params=SHORT), code=1).stderr
        assert all(word in offline for word in ("horizontal.fedavg@1", "'research'", "'plain'")), offline
    for name in ("alpha", "gamma"):
        assert wait_until(lambda name=name: ended(federation, name, run), "the end at the site")[0] == "failed"
    ledgers = federation.ledgers()
    assert not any(releases(ledgers, name, run) for name in SITES)


# ---------------------------------------------------------------- joining


@pytest.mark.slow
def test_tokens_are_good_once_and_not_for_ever(federation: Any, tmp_path: Path) -> None:
    def init(folder: str, token: str) -> str:
        done = federation.atoll("site", "init", "--home", tmp_path / folder, "--token", "-", stdin=token, code=1)
        assert not (tmp_path / folder / "identity.key").exists()
        return str(done.stderr)

    told = init("again", federation.tokens["alpha"])
    assert "token.refused" in told and "ask the coordinator's operator for a new invitation" in told, told
    late = federation.as_coordinator("invite", "late", "--hours", "0").stdout
    assert "token.expired" in (told := init("late", late)) and "new invitation" in told, told


# ---------------------------------------------------------------- trouble with data and disk


@pytest.mark.slow
def test_broken_table_is_refused_and_its_value_stays(federation: Any, wait_until: Any) -> None:
    canary, place = "918273.645546372819", federation.data("beta")
    before = place.read_text()
    lines = before.splitlines()
    cells = lines[7].split(",")
    lines[7], lines[9] = ",".join([cells[0], canary, *cells[2:]]), ",".join([f"x{canary}", *lines[9].split(",")[1:]])
    try:
        place.write_text("\n".join([*lines, ""]))
        run = federation.submit("broken", params=SHORT)
        note = federation.await_status(run, "failed")["note"]
    finally:
        place.write_text(before)
    assert "site beta" in note and "dose" in note and "age" in note and f"[trace {run}]" in note, note
    assert "schema.range" in note and "check the unit" in note, note
    wait_until(lambda: ended(federation, "beta", run), "the end at beta")
    own = federation.site_status("beta", run)
    assert "column 'dose': 1 of 2000 cells are outside [-10, 10]" in own["note"] and own["status"] == "failed", own
    for name in ("alpha", "gamma"):
        status, note = wait_until(lambda name=name: ended(federation, name, run), "the end at the site")
        assert status == "failed" and "site beta" in note and "dose" in note, note
    ledgers = federation.ledgers()
    assert not any(releases(ledgers, name, run) for name in SITES)
    shown = federation.as_coordinator("status").stdout + federation.as_site("beta", "status").stdout
    federation.store.close()  # closing a file that SQLite has open here would release its locks (it reopens)
    written = [path for path in federation.folder.rglob("*") if path.is_file()]
    assert {"store.db", "journal.db", "coordinator.log", "beta.log"} <= {path.name for path in written}
    for text in (shown.encode(), *(path.read_bytes() for path in written)):
        assert b"918273.645" not in text and b"645546372819" not in text  # a digest may hold six digits


@pytest.mark.slow
def test_tables_are_compared_before_a_study(federation: Any, wait_until: Any) -> None:
    """One site exported a constant: nobody sees its table, and everybody sees that it is off."""
    before = federation.data("gamma").read_text()
    header, *lines = before.splitlines()
    at = header.split(",").index("weight")
    try:
        cells = [line.split(",") for line in lines]
        changed = [[*row[:at], "1.5", *row[at + 1 :]] for row in cells]
        federation.data("gamma").write_text("\n".join([header, *(",".join(row) for row in changed)]) + "\n")
        told = federation.as_coordinator("submit", federation.plan("compared", params=SHORT), "--check", "--wait")
    finally:
        federation.data("gamma").write_text(before)
    assert "weight" in told.stdout
    assert "has one value only" in " ".join(told.stdout.split())
    assert "gamma" in told.stdout


@pytest.mark.slow
def test_several_sites_refuse(federation: Any, wait_until: Any) -> None:
    before = {name: federation.data(name).read_text() for name in ("beta", "gamma")}
    try:
        for name, column in (("beta", "age"), ("gamma", "weight")):
            federation.data(name).write_text(before[name].replace(column, f"{column}s", 1))
        run = federation.submit("several", params=SHORT)
        note = federation.await_status(run, "failed")["note"]
    finally:
        for name, text in before.items():
            federation.data(name).write_text(text)
    heard = wait_until(lambda: ended(federation, "alpha", run), "the end at alpha")[1]
    for told in (note, heard):
        assert "2 problems" in told and f"[trace {run}]" in told, told
        for place in ("site beta", "site gamma", "(age)", "(weight)"):
            assert place in told, f"{place} is not in {told}"
    assert "did the table rename it to 'ages'?" in ended(federation, "beta", run)[1]


@pytest.mark.slow
def test_table_deleted_while_running(federation: Any, wait_until: Any) -> None:
    place = federation.data("gamma")
    kept = place.read_bytes()
    run = federation.submit("deleted", params={"rounds": 2000})
    federation.await_rounds(run, 20)
    try:
        place.unlink()
        federation.await_rounds(run, federation.rounds(run) + 20)  # it was read when the study was opened
        federation.sites["gamma"].kill()
        federation.sites["gamma"].start()
        note = federation.await_status(run, "failed")["note"]
        assert all(part in note for part in ("site gamma", "round ", "source.missing-file", "check the site's source"))
        status, note = wait_until(lambda: ended(federation, "gamma", run), "the end at gamma")
        assert status == "failed" and "there is no readable file" in note, note
        run = federation.submit("gone", params=SHORT)
        note = federation.await_status(run, "failed")["note"]
        assert "site gamma, step open" in note and "source.missing-file" in note, note
    finally:
        place.write_bytes(kept)


@pytest.mark.slow
def test_full_disk_at_a_site(federation: Any, wait_until: Any) -> None:
    limit = 400 << 10

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    party = federation.join("full", small_disk)
    federation.await_connected("full")
    cohort = {"sites": ["alpha", "beta", "full"]}
    run = federation.submit("full-disk", cohort=cohort, params={"rounds": 2000})
    note = federation.await_status(run, "failed")["note"]
    assert all(part in note for part in ("site full", "round ", "train: ledger.not-written"))
    assert "free disk space at the site" in note and f"[trace {run}]" in note, note
    assert "the journal cannot be written, so nothing leaves the site" in party.text()
    assert party.running(), "it must stay, to be mended"
    for name in ("alpha", "beta"):
        status, note = wait_until(lambda name=name: ended(federation, name, run), "the end at the site")
        assert status == "failed" and "site full" in note and "ledger.not-written" in note, note
    party.kill()
    ledgers = federation.ledgers()
    assert len(released := releases(ledgers, "full", run)) > 3
    assert received(ledgers, "full", run) == released, "what left, and nothing else, is in its ledger"
    assert len(releases(ledgers, "alpha", run)) >= len(released)
