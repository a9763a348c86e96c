"""Boosted trees over gRPC, a process per party, masked: whoever is killed in mid-tree, the model is the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

SITES = ("alpha", "beta", "gamma")
PATIENCE_S = 25
"""After which a site that was killed has dropped out."""
PARAMS: dict[str, Any] = {
    "target": "cured", "max_depth": 4, "max_bins": 32, "min_rows": 5, "checkpoint_every": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def trusted(shared_federation: Any) -> Iterator[Any]:
    """The federation, whose sites answer masked sums of trees."""
    allowed = {"programs": ["statistics.*", "trees.*"], "protections": ["plain", "secagg"]}
    with contextlib.ExitStack() as held:
        for site in SITES:
            held.enter_context(shared_federation.policy(site, **allowed))
        yield shared_federation


def submit(federation: Any, name: str, deadline_s: int = 120, trees: int = 25, **cohort: Any) -> str:
    run = {"deadline_s": deadline_s}
    path = federation.plan(name, program="trees.boosted", protection="secagg", cohort=cohort, run=run)
    plan = {**yaml.safe_load(path.read_text()), "params": {**PARAMS, "trees": trees}}
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return str(json.loads(federation.as_coordinator("submit", path, "--json").stdout)["run"])


@pytest.fixture(scope="module")
def undisturbed(trusted: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, model's arrays) of the plan when nothing happens."""
    run = submit(trusted, "undisturbed")
    trusted.await_status(run, "finished")
    found: tuple[dict[str, Any], dict[str, Any]] = trusted.store.result(run)
    assert found[0]["metrics"]["federated"]["auc"] > 0.7
    return found


def check_same(federation: Any, run: str, expected: tuple[dict[str, Any], dict[str, Any]]) -> None:
    federation.await_status(run, "finished")
    result, model = federation.store.result(run)
    assert model["weights"].tobytes() == expected[1]["weights"].tobytes()
    for key in ("rounds", "metrics", "output", "sites"):
        assert result[key] == expected[0][key], key
    federation.ledgers()  # intact, alone and together


def test_a_site_killed_in_mid_tree_goes_on_where_it_was(trusted: Any, undisturbed: Any) -> None:
    run = submit(trusted, "site-killed")
    for number in (12, 33, 58):  # three different places in a tree
        trusted.await_rounds(run, number)
        trusted.sites["beta"].kill()
        trusted.sites["beta"].start()
        trusted.await_connected("beta")
    check_same(trusted, run, undisturbed)


def test_a_killed_coordinator_goes_on_from_its_checkpoint(trusted: Any, undisturbed: Any) -> None:
    run = submit(trusted, "coordinator-killed")
    for number in (9, 45, 71):
        trusted.await_rounds(run, number)
        trusted.coordinator.kill()
        assert trusted.row(run)["status"] == "running"
        trusted.start_coordinator()
        trusted.await_connected(*SITES)
    check_same(trusted, run, undisturbed)


def test_a_site_that_is_away_for_a_while_takes_part_again(trusted: Any, wait_until: Any) -> None:
    """The others go on, and it is sent the trees that it missed."""
    run = submit(trusted, "away", PATIENCE_S, 400, min_sites=2, on_dropout="continue")
    trusted.await_rounds(run, 20)
    trusted.sites["gamma"].kill()
    before = trusted.rounds(run)
    trusted.await_rounds(run, before + 3)
    trusted.sites["gamma"].start()

    def took_part() -> bool:
        assert trusted.row(run)["status"] == "running"
        return any("gamma" in row["receipts"] for row in trusted.store.rounds(run) if row["number"] > before + 2)

    wait_until(took_part, "gamma's answer")
    trusted.await_rounds(run, trusted.rounds(run) + 5)
    trusted.as_coordinator("cancel", run)
