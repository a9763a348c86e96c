"""The privacy budget in real processes: a site killed between charge and send, and runs that begin at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

ROUNDS = 8
DYING = """
import os, signal
from atoll.cli.main import main
from atoll.runtime.journal import Journal

store, charged = Journal.store_release, []

def dying(self, task, *args):
    message = store(self, task, *args)  # charged, stored, durable; and not sent
    charged.append(task)
    if len(charged) == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    return message

Journal.store_release = dying
main()
"""

pytestmark = pytest.mark.slow


def start_dying(federation: Any, site: str, nth: int) -> None:
    """Start *site* so that it is killed with its *nth* release, between commit and sending."""
    party = federation.sites[site]
    party.stop()
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "400", "PYTHONUNBUFFERED": "1"}
    with party.log.open("ab") as log:
        party._began = log.tell()
        party.process = subprocess.Popen(
            [sys.executable, "-c", DYING.format(nth=nth), "site", "up", "--verbose", "--home", str(party.home)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
        )  # fmt: skip
    federation.await_connected(site)


def budget(federation: Any, site: str) -> Mapping[str, Any]:
    """``atoll site budget --json`` at *site*."""
    [line] = json.loads(federation.as_site(site, "budget", "--json").stdout)
    return dict(line)


def submit(federation: Any, name: str) -> str:
    """Submit a training of ε = 1; returns the run's id."""
    path = federation.plan(name, program="horizontal.dpsgd", run={"holdout": 0})
    plan = yaml.safe_load(path.read_text())
    for key in ("batch_size", "rounds"):
        del plan["params"][key]
    plan["params"] |= {"rounds": ROUNDS, "expected_rows": 6000, "sampling_rate": 0.1}
    plan["privacy"] = {"unit": "record", "epsilon": 1.0, "delta": 1e-6}
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return str(json.loads(federation.as_coordinator("submit", path, "--json").stdout)["run"])


def test_killed_between_charge_and_send(federation: Any, wait_until: Any) -> None:
    """On its return the site sends the very release it had charged, and charges it once."""
    before = budget(federation, "beta")["epsilon"]
    start_dying(federation, "beta", 5)
    run = submit(federation, "private")
    assert federation.sites["beta"].wait() == -signal.SIGKILL
    told = budget(federation, "beta")["epsilon"]
    assert told == pytest.approx(before + 1.0), "what it reserved counts while the run is open"
    federation.sites["beta"].start()
    federation.await_status(run, "finished")
    for site in ("alpha", "beta", "gamma"):  # they get their last receipts with the close
        wait_until(lambda site=site: federation.site_row(site, run)[0] == "finished", f"the end at {site}")
    ledgers = federation.ledgers()
    federation.check_once(run, ROUNDS, ledgers)
    for site in ("alpha", "beta", "gamma"):
        costs = [e["body"]["epsilon"] for e in ledgers[site] if e["kind"] == "release" and e["body"]["run"] == run]
        assert costs == sorted(costs) and 0.9 < costs[-1] <= 1.0
        if site == "beta":
            assert budget(federation, site)["epsilon"] == pytest.approx(before + costs[-1])


def test_runs_at_once_cannot_overspend(federation: Any, wait_until: Any) -> None:
    """Three runs of ε = 1 begin together, and one site has budget for one and a half."""
    limit = budget(federation, "beta")["epsilon"] + 1.5
    with federation.policy("beta", budgets={"trial": {"epsilon": limit, "delta": 1e-3}}):
        runs = [submit(federation, f"at-once-{i}") for i in range(3)]
        wait_until(lambda: all(federation.row(run)["status"] in ("finished", "failed") for run in runs), "the end")
        rows = [federation.row(run) for run in runs]
        told = budget(federation, "beta")
        shown = federation.as_site("beta", "budget").stdout
    ended = Counter(row["status"] for row in rows)
    assert ended == {"finished": 1, "failed": 2}, rows
    assert all(
        "site beta" in row["note"] and "budget.spent" in row["note"] for row in rows if row["status"] == "failed"
    )
    assert limit - 0.6 < told["epsilon"] <= limit == told["epsilon_limit"] and told["unit"] == "record"
    assert f"{told['epsilon']:.3g} of {limit:g}" in shown and "trial" in shown
