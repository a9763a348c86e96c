"""Incentive records: signed by the coordinator, kept by every site, and neither can say otherwise later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import IntegrityError
from atoll.contract.wire import Json, Message
from atoll.crypto.identity import Identity, verify
from atoll.ledger.contributions import RULE, Credit, credited, share_of, sums
from atoll.ledger.entry import Chain, Entry
from atoll.ledger.verify import Verified, verify_together
from atoll.transport.base import Endpoint, Progress

COORDINATOR = Identity.generate("coordinator")
BODY: Entry = {"run": "r", "study": "s", "plan": "p", "method": "gtg", "rule": RULE, "shares": {"a": 0.75, "b": 0.25}}


def study_of(federation: Any, hospitals: Any, **more: Any) -> tuple[Any, Any]:
    study = hospitals("linear")
    params = study.params(rounds=2, method="exact", worth="loss", **more)
    return federation.plan("horizontal.shapley", params, study.tables, run={"seed": 3}), study.tables


def told(federation: Any) -> dict[str, list[Entry]]:
    """Every party's entries of contributions, from ledgers that hold alone and together."""
    return {
        name: [entry for entry in ledger.entries if entry["kind"] == "contribution"]
        for name, ledger in federation.ledgers().items()
    }


def test_every_party_has_the_same_signed_record(federation: Any, hospitals: Any) -> None:
    plan, tables = study_of(federation, hospitals)
    found = federation.run(plan, tables)["result"]["contribution"]
    entries = told(federation)
    [mine] = entries.pop("coordinator")
    assert mine["body"]["shares"] == {site: one["share"] for site, one in found["sites"].items()}
    assert sum(mine["body"]["shares"].values()) == pytest.approx(1, abs=1e-9)
    assert (mine["body"]["run"], mine["body"]["method"], mine["body"]["plan"]) == (
        federation.run_id, "exact", plan.hash,
    )  # fmt: skip
    for site, [entry] in entries.items():
        assert entry["body"] == {"run": federation.run_id, "share": mine["body"]["shares"][site], "entry": mine}
    assert federation.store.result(federation.run_id)[0]["output"]["contribution"]["sites"] == found["sites"]


def test_a_run_without_contributions_records_none(federation: Any, hospitals: Any) -> None:
    study = hospitals("linear")
    federation.run(federation.plan("horizontal.fedavg", study.params(rounds=1), study.tables), study.tables)
    assert not any(told(federation).values())


def test_a_site_that_was_away_at_the_end_is_told_when_it_comes_back(federation: Any, hospitals: Any) -> None:
    import asyncio

    from atoll.contract.errors import TransportError
    from atoll.runtime.coordinator import Coordinator

    plan, tables = study_of(federation, hospitals)
    away = ["s1"]

    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def ask(message: Message, progress: Progress) -> Message:
            if message.kind == "close" and name in away:
                return Message("failure", {"re": message.meta["id"], **TransportError("link.down", "gone").public()})
            return endpoint(message, progress)

        return ask

    federation.run(plan, tables, wrap=wrap)
    assert [len(entries) for entries in told(federation).values()] == [1, 1, 0, 1]
    away.clear()
    again = Coordinator(federation.transport, federation.store, federation.ledger)
    for _ in range(2):
        asyncio.run(again.tell_ended("s1"))
    assert [len(entries) for entries in told(federation).values()] == [1, 1, 1, 1]


def forged(change: Callable[[Entry], Json]) -> Callable[[str, Endpoint], Endpoint]:
    def wrap(name: str, endpoint: Endpoint) -> Endpoint:
        def ask(message: Message, progress: Progress) -> Message:
            if message.kind == "close":
                entry = change(json.loads(json.dumps(message.meta["contribution"])))
                message = Message("close", {**message.meta, "contribution": entry})
            return endpoint(message, progress)

        return ask

    return wrap


def more_for_oneself(entry: Entry) -> Json:
    entry["body"]["shares"]["s0"] = 1.0
    return entry


def not_signed(entry: Entry) -> Json:
    return {**entry, "sig": "00" * 64}


def of_another_run(entry: Entry) -> Json:
    return Chain("coordinator", COORDINATOR.public, COORDINATOR.sign).next(
        "contribution", {**entry["body"], "run": "x"}
    )


@pytest.mark.parametrize("change", [more_for_oneself, not_signed, of_another_run, lambda _: 7])
def test_a_site_keeps_nothing_that_the_coordinator_did_not_sign(
    federation: Any, hospitals: Any, change: Callable[[Entry], Json]
) -> None:
    plan, tables = study_of(federation, hospitals)
    federation.run(plan, tables, wrap=forged(change))
    entries = told(federation)
    assert len(entries.pop("coordinator")) == 1
    assert not any(entries.values())
    assert {event["not_told"] for event in federation.events if "not_told" in event} == set(tables)


def signed(body: Entry, key: Identity = COORDINATOR) -> Entry:
    return Chain("coordinator", key.public, key.sign).next("contribution", body)


@pytest.mark.parametrize(
    ("body", "run", "site"),
    [
        (BODY, "other", "a"),
        (BODY, "r", "c"),
        ({**BODY, "shares": {"a": 0.8, "b": 0.3}}, "r", "a"),
        ({**BODY, "shares": {"a": 2.0, "b": -1.0}}, "r", "a"),
        ({**BODY, "shares": {"a": "1"}}, "r", "a"),
        ({**BODY, "shares": [1]}, "r", "a"),
    ],
)
def test_records_must_make_sense(body: Entry, run: str, site: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        share_of(signed(body), run, site, COORDINATOR.public, verify)
    assert caught.value.code == "contribution.malformed"


def test_a_coordinator_that_tells_sites_another_record_than_it_keeps_is_found_out(tmp_path: Path) -> None:
    """Both are signed by it: only the two ledgers together show it."""
    own = Identity.generate("a")
    chain, site = Chain("coordinator", COORDINATOR.public, COORDINATOR.sign), Chain("a", own.public, own.sign)
    kept, shown = [chain.genesis()], [site.genesis()]
    chain.commit(kept[0])
    site.commit(shown[0])
    kept.append(chain.next("contribution", BODY))
    other = chain.next("contribution", {**BODY, "shares": {"a": 0.9, "b": 0.1}})
    for entry, share, broken in (
        (kept[1], 0.75, ""),
        (other, 0.9, "was told of other"),
        (kept[1], 0.9, "another share"),
    ):
        told_of = site.next("contribution", {"run": "r", "share": share, "entry": entry})
        ledgers = [
            Verified(tmp_path / "coordinator.jsonl", "coordinator", COORDINATOR.public, kept),
            Verified(tmp_path / "a.jsonl", "a", own.public, [*shown, told_of]),
        ]
        if not broken:
            verify_together(ledgers, verify)
            continue
        with pytest.raises(IntegrityError, match=broken):
            verify_together(ledgers, verify)


def test_sums_over_runs_count_each_run_once() -> None:
    one = {"kind": "contribution", "body": BODY}
    other = {"kind": "contribution", "body": {**BODY, "run": "t", "shares": {"a": 0.1, "c": 0.9}}}
    found = credited([one, one, {"kind": "closed", "body": {}}, {"kind": "contribution", "body": {"entry": other}}])
    assert [credit.run for credit in found] == ["r", "t"]
    assert sums(found) == {"c": (1, 0.9), "a": (2, 0.85), "b": (1, 0.25)}
    assert sums([Credit("r", "s", "m", {"a": 0.0})]) == {"a": (1, 0.0)}


def test_the_command_prints_sums_of_either_side_s_ledger(federation: Any, hospitals: Any, tmp_path: Path) -> None:
    plan, tables = study_of(federation, hospitals)
    federation.run(plan, tables)
    federation.submit(plan)
    federation.drive()
    federation.ledgers()
    shown = {}
    for party in ("coordinator", "s2"):
        file = federation.home / f"{party}.jsonl"
        done = CliRunner().invoke(app, ["ledger", "contributions", str(file), "--json"])
        assert done.exit_code == 0
        shown[party] = json.loads(done.stdout)
        assert "mean share" in CliRunner().invoke(app, ["ledger", "contributions", str(file)]).stdout
    assert shown["coordinator"] == shown["s2"]
    assert {site: one["runs"] for site, one in shown["s2"]["sites"].items()} == dict.fromkeys(tables, 2)
    assert sum(one["shares"] for one in shown["s2"]["sites"].values()) == pytest.approx(2, abs=1e-9)
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes((federation.home / "s2.jsonl").read_bytes().replace(b'"share":0.', b'"share":1.'))
    assert CliRunner().invoke(app, ["ledger", "contributions", str(broken)]).exit_code == 1
    assert CliRunner().invoke(app, ["ledger", "contributions", str(tmp_path / "none.jsonl")]).exit_code == 1
