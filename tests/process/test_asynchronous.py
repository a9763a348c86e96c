"""Asynchronous learning over gRPC, a process per party: killed coordinators and sites, and runs that share sites."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.slow


def submit(federation: Any, name: str, program: str, params: dict[str, Any]) -> str:
    """Submit a plan of its own; a straggling site is waited for, not failed."""
    cohort = {"on_dropout": "continue", "min_sites": 2}
    return str(federation.submit(name, program=program, params=params, cohort=cohort))


@pytest.mark.parametrize(
    ("program", "params", "each"),
    [("horizontal.fedbuff", {"buffer": 2, "rounds": 60}, 3), ("horizontal.fedasync", {"rounds": 150}, 1)],
)
def test_a_killed_coordinator_and_a_killed_site_go_on_where_they_were(
    federation: Any, program: str, params: dict[str, Any], each: int
) -> None:
    run = submit(federation, program.rpartition(".")[2], program, {**params, "checkpoint_every": 7})
    for number in (20, 60):
        federation.await_rounds(run, number)
        federation.coordinator.kill()
        assert federation.row(run)["status"] == "running"
        federation.start_coordinator()
    federation.await_rounds(run, 90)
    federation.sites["beta"].kill()
    federation.sites["beta"].start()
    federation.await_status(run, "finished")
    result, model = federation.store.result(run)
    assert result["rounds"] == params["rounds"] * each + 2
    assert result["metrics"]["federated"]["auc"] > 0.7
    assert all(np.isfinite(array).all() for array in model.values())
    ledgers = federation.ledgers()
    for site in ("alpha", "beta", "gamma"):
        tasks = [
            (e["body"]["round"], e["body"]["attempt"], e["body"]["step"]) for e in ledgers[site]
            if e["kind"] == "release" and e["body"]["run"] == run
        ]  # fmt: skip
        assert len(tasks) == len(set(tasks)) > 10, "nothing is done twice, and everybody took part"


def test_a_short_run_ends_while_a_long_one_goes_on(federation: Any) -> None:
    """Each site computes one run at a time."""
    for site in ("alpha", "beta", "gamma"):
        party = federation.sites[site]
        party.stop()
        config = yaml.safe_load((party.home / "site.yaml").read_text())
        (party.home / "site.yaml").write_text(yaml.safe_dump({**config, "at_once": 1}, sort_keys=False))
        party.start()
    federation.await_connected()
    try:
        heavy = {"rounds": 100_000, "local_epochs": 20, "batch_size": 16}
        long = [federation.submit(f"long-{i}", params=heavy, run={"seed": i}) for i in range(2)]
        for run in long:
            federation.await_rounds(run, 3)
        short = federation.submit("short", params={"rounds": 5})
        federation.await_status(short, "finished")
        for run in long:
            assert federation.row(run)["status"] == "running"
            federation.as_coordinator("cancel", run)
    finally:
        for site in ("alpha", "beta", "gamma"):
            party = federation.sites[site]
            party.stop()
            config = yaml.safe_load((party.home / "site.yaml").read_text())
            (party.home / "site.yaml").write_text(yaml.safe_dump({**config, "at_once": None}, sort_keys=False))
            party.start()
        federation.await_connected()


def test_a_stopped_site_holds_an_asynchronous_run_up_no_longer_than_its_deadline(federation: Any) -> None:
    """SIGSTOP: the others go on without it, and it takes part again when it goes on."""
    run = federation.submit(
        "stopped", program="horizontal.fedbuff", params={"buffer": 2, "rounds": 200},
        cohort={"on_dropout": "continue", "min_sites": 2}, run={"deadline_s": 25},
    )  # fmt: skip
    federation.await_rounds(run, 30)
    federation.sites["gamma"].signal(signal.SIGSTOP)
    try:
        before = federation.rounds(run)
        federation.await_rounds(run, before + 60)
    finally:
        federation.sites["gamma"].signal(signal.SIGCONT)
    federation.await_status(run, "finished")
