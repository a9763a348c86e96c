"""Whoever dies, and however: the run goes on, to the same bits, and nothing is done twice."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest

SITES = ("alpha", "beta", "gamma")
EXPECTED_ROUNDS = 300 + 2
"""fedavg's rounds, and the evaluation's two."""


@pytest.fixture(scope="module")
def uninterrupted(shared_federation: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the same plan gives when nothing happens."""
    shared_federation.revive()  # it is made before a test's own federation is
    run = shared_federation.submit()
    shared_federation.await_status(run, "finished")
    return shared_federation.store.result(run)


def check_same(federation: Any, run: str, uninterrupted: Any) -> None:
    """The run's model and metrics are bit-identical to the uninterrupted ones, and nothing was done twice."""
    federation.await_status(run, "finished")
    (result, model), (expected, expected_model) = federation.store.result(run), uninterrupted
    assert model.keys() == expected_model.keys()
    for name, array in expected_model.items():
        assert model[name].tobytes() == array.tobytes(), name
    for key in ("plan_hash", "rounds", "sites", "metrics", "model", "fitted", "output"):
        assert result[key] == expected[key], key
    assert result["rounds"] == EXPECTED_ROUNDS
    federation.check_once(run, EXPECTED_ROUNDS)


def kill_all(federation: Any) -> None:
    """Kill every party at once, then start all of them again."""
    alive = [party for party in federation.parties.values() if party.running()]
    for party in alive:
        party.signal(signal.SIGKILL)
    for party in alive:
        party.wait()
    for party in alive[1:]:
        party.start()
    federation.start_coordinator()


def restart_coordinator(federation: Any, run: str, number: signal.Signals) -> None:
    """End the coordinator by a signal and start it again; the run stays open meanwhile."""
    federation.coordinator.signal(number)
    assert federation.coordinator.wait() == (0 if number == signal.SIGTERM else -number)
    assert federation.row(run)["status"] == "running"
    federation.start_coordinator()


def test_one_after_another(federation: Any, uninterrupted: Any) -> None:
    run = federation.submit()
    federation.await_rounds(run, 25)
    restart_coordinator(federation, run, signal.SIGKILL)
    federation.await_rounds(run, 85)
    federation.sites["beta"].kill()
    federation.sites["beta"].start()
    federation.await_rounds(run, 145)
    restart_coordinator(federation, run, signal.SIGTERM)
    federation.await_rounds(run, 205)
    kill_all(federation)
    check_same(federation, run, uninterrupted)


@pytest.mark.slow
def test_killed_coordinator(federation: Any, uninterrupted: Any) -> None:
    run = federation.submit()
    federation.await_rounds(run, 60)
    restart_coordinator(federation, run, signal.SIGKILL)
    shown = federation.status(run)
    assert shown["status"] == "running" and shown["rounds"] >= 60
    check_same(federation, run, uninterrupted)


@pytest.mark.slow
def test_killed_coordinator_of_gossip(federation: Any) -> None:
    """It has no model: what it kept is who is there, which round is next, and sealed mail that waits."""
    params = {"rounds": 40, "topology": "ring", "report_every": 10, "checkpoint_every": 6}
    told = []
    for name, kills in (("calm", ()), ("gossip", (9, 20, 30))):
        run = federation.submit(name, program="horizontal.gossip", params=params)
        for number in kills:
            federation.await_rounds(run, number)
            restart_coordinator(federation, run, signal.SIGKILL)
        federation.await_status(run, "finished")
        told.append(federation.store.result(run)[0])
        assert federation.store.checkpoint(run)[0] > 36 and told[-1]["rounds"] == 1 + 41 + 4 + 2
        federation.check_once(run, told[-1]["rounds"])
    calm, killed = told
    assert killed["output"] == calm["output"] and killed["metrics"] == calm["metrics"]


@pytest.mark.slow
def test_terminated_coordinator(federation: Any, uninterrupted: Any) -> None:
    run = federation.submit()
    federation.await_rounds(run, 60)
    restart_coordinator(federation, run, signal.SIGTERM)
    check_same(federation, run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_site(federation: Any, uninterrupted: Any, number: signal.Signals) -> None:
    run = federation.submit()
    federation.await_rounds(run, 60)
    federation.sites["beta"].signal(number)
    assert federation.sites["beta"].wait() == (0 if number == signal.SIGTERM else -number)
    assert federation.status(run)["status"] == "running"
    federation.sites["beta"].start()
    check_same(federation, run, uninterrupted)


@pytest.mark.slow
def test_all_killed_at_once(federation: Any, uninterrupted: Any) -> None:
    run = federation.submit()
    federation.await_rounds(run, 60)
    kill_all(federation)
    check_same(federation, run, uninterrupted)


@pytest.mark.slow
def test_somebody_dies_every_few_rounds(federation: Any, uninterrupted: Any) -> None:
    run = federation.submit()
    generator = np.random.default_rng(3)
    for number in range(15, 250, 16):
        federation.await_rounds(run, number + int(generator.integers(0, 10)))
        name = str(generator.choice(["coordinator", "alpha", "beta", "gamma"]))
        federation.parties[name].kill()
        federation.start_coordinator() if name == "coordinator" else federation.sites[name].start()
    check_same(federation, run, uninterrupted)


@pytest.mark.slow
def test_survivors_go_on(federation: Any, wait_until: Any) -> None:
    run = federation.submit(cohort={"min_sites": 2, "on_dropout": "continue"}, run={"deadline_s": 8})
    federation.await_rounds(run, 30)
    federation.sites["gamma"].kill()
    wait_until(lambda: "gamma" in federation.row(run)["note"], "the dropout in the run's note")
    shown = federation.status(run)
    assert shown["status"] == "running" and "gamma dropped out" in shown["note"], shown
    federation.await_rounds(run, federation.rounds(run) + 20)
    gamma_left = federation.rounds(run)
    federation.sites["gamma"].start()
    row = federation.await_status(run, "finished")
    assert "gamma dropped out" in row["note"]
    ledgers = federation.ledgers()
    took_part: dict[str, list[int]] = {site: [] for site in SITES}
    for entry in ledgers["coordinator"]:
        if entry["kind"] == "received" and entry["body"]["run"] == run:
            for leaf in entry["leaves"]:
                took_part[leaf["site"]].append(entry["body"]["round"])
    everything = list(range(EXPECTED_ROUNDS))
    assert took_part["alpha"] == took_part["beta"] == everything
    missed = sorted(set(everything) - set(took_part["gamma"]))
    assert missed and missed == list(range(missed[0], missed[-1] + 1)) and 30 <= missed[0] <= gamma_left
    for site in SITES:
        released = [
            entry["body"]["round"]
            for entry in ledgers[site]
            if entry["kind"] == "release" and entry["body"]["run"] == run
        ]
        assert len(released) == len(set(released)) and set(took_part[site]) <= set(released)


@pytest.mark.slow
def test_too_few_are_left(federation: Any, wait_until: Any) -> None:
    run = federation.submit(cohort={"min_sites": 3, "on_dropout": "continue"}, run={"deadline_s": 8})
    federation.await_rounds(run, 30)
    federation.sites["gamma"].kill()
    federation.await_status(run, "failed")
    for name in ("alpha", "beta"):
        wait_until(lambda name=name: federation.site_row(name, run)[0] == "failed", f"the end at {name}")
    shown = [federation.status(run), federation.site_status("alpha", run), federation.site_status("beta", run)]
    for row in shown:
        note = row["note"]
        assert row["status"] == "failed", row
        assert "site gamma" in note and "round " in note and "step horizontal.fedavg/train" in note, note
        assert "cohort.min_sites" in note and " → " in note and f"[trace {run}]" in note, note
    assert "2 sites are left, and the plan demands 3" in shown[0]["note"]
    assert all("cohort.too-few-left" in row["note"] for row in shown[1:])


@pytest.mark.slow
def test_site_that_was_away_hears_the_end(federation: Any, wait_until: Any) -> None:
    run = federation.submit(cohort={"min_sites": 2, "on_dropout": "continue"}, run={"deadline_s": 8})
    federation.await_rounds(run, 30)
    federation.sites["gamma"].kill()
    federation.await_status(run, "finished")
    assert federation.site_row("gamma", run)[0] == "running"
    federation.sites["gamma"].start()
    wait_until(lambda: federation.site_row("gamma", run)[0] == "finished", "gamma hears how the run ended")
    ledgers = federation.ledgers()
    leaves = [leaf for e in ledgers["coordinator"] if e["kind"] == "received" for leaf in e["leaves"]]
    acknowledged = {leaf["seq"] for leaf in leaves if leaf["site"] == "gamma"}
    receipts = {entry["body"]["of"] for entry in ledgers["gamma"] if entry["kind"] == "receipt"}
    assert receipts == acknowledged, "it was given every receipt it is due"


@pytest.mark.slow
def test_coordinator_killed_while_it_tells_the_end(federation: Any, wait_until: Any) -> None:
    run = federation.submit(cohort={"min_sites": 2, "on_dropout": "continue"}, run={"deadline_s": 8})
    federation.await_rounds(run, 30)
    federation.sites["gamma"].signal(signal.SIGSTOP)  # connected, and silent: the end takes long to tell
    try:
        wait_until(lambda: federation.site_row("alpha", run)[0] == "finished", "alpha hears the end")
        federation.coordinator.kill()
    finally:
        federation.sites["gamma"].signal(signal.SIGCONT)
    federation.start_coordinator()
    federation.await_status(run, "finished")
    assert federation.store.result(run)[0]["metrics"]["federated"]["auc"] > 0.5
