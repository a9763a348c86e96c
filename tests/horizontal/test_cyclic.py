"""Cyclic weight transfer: SGD from site to site, written a second time; absent sites are skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import Table

COLUMNS: dict[str, Any] = {
    "u": {"range": [-4, 4]},
    "v": {"range": [0, 10]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
PARAMS: dict[str, Any] = {"family": "logistic", "target": "y", "features": ["u", "v"], "batch_size": 8}


def sites(federation: Any, sizes: tuple[int, ...] = (40, 25, 31)) -> dict[str, Table]:
    random = np.random.default_rng(2)
    tables = {}
    for i, n in enumerate(sizes):
        u, v = np.clip(random.normal(i - 1, 1.5, n), -4, 4), random.uniform(0, 10, n)
        y = (random.random(n) < 1 / (1 + np.exp(-u + 0.2 * v))).astype(float)
        tables[f"s{i}"] = federation.table({"u": u, "v": v, "y": y}, COLUMNS)
    return tables


def run(drive: Any, tables: dict[str, Table], start: Any = None, seed: int = 3, **more: Any) -> Any:
    options = {name: more.pop(name) for name in ("absent", "first_round") if name in more}
    cohort = Cohort(tuple(tables), tables["s0"].schema, seed=seed)
    return drive(build("horizontal.cyclic", {**PARAMS, **more}).coordinate(cohort, start), tables, **options)


def one_after_another(tables: dict[str, Table], visits: list[str], epochs: int = 1) -> np.ndarray:
    """Plain SGD over the sites' rows in the order of *visits*, with the tasks' own shuffles."""
    w = np.zeros(3)
    for number, site in enumerate(visits):
        table = tables[site]
        x = np.column_stack([np.ones(len(table)), table["u"] / 4, (table["v"] - 5) / 5])
        shuffler = Task(TaskId("0" * 32, number, 0, "reply", site), {}, (number, *site.encode())).shuffler()
        for _ in range(epochs):
            order = shuffler.permutation(len(table))
            for start in range(0, len(table), 8):
                rows = order[start : start + 8]
                w = w - 0.1 * x[rows].T @ (1 / (1 + np.exp(-x[rows] @ w)) - table["y"][rows]) / len(rows)
    return w


def test_it_is_sgd_from_site_to_site(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    driven = run(drive, tables, rounds=4, local_epochs=2)
    visits = [site for asked in driven.rounds for site in asked.sites]
    assert all(sorted(visits[i : i + 3]) == ["s0", "s1", "s2"] for i in range(0, 12, 3))
    assert np.allclose(driven.result["model"].weights, one_after_another(tables, visits, 2), rtol=0, atol=1e-12)
    assert len(driven.result["history"]) == 4


def test_the_order_is_drawn_for_each_cycle_by_the_plans_seed(federation: Any, drive: Any) -> None:
    tables = sites(federation)

    def visits(**more: Any) -> list[str]:
        return [site for asked in run(drive, tables, rounds=6, **more).rounds for site in asked.sites]

    assert visits(seed=3) == visits(seed=3) != visits(seed=4)
    assert len({tuple(visits()[i : i + 3]) for i in range(0, 18, 3)}) > 1
    assert visits(order="fixed") == ["s0", "s1", "s2"] * 6


def test_a_site_that_drops_out_is_skipped(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    driven = run(drive, tables, rounds=2, order="fixed", absent=lambda number: ["s1"] if number == 1 else [])
    visits = ["s0", "s1", "s2", "s0", "s1", "s2"]
    lost = {**tables, "s1": tables["s1"].rows(np.zeros(25, bool))}
    first = one_after_another({**tables, "s1": lost["s1"]}, visits[:3])
    assert np.allclose(driven.rounds[3].send["weights"], first, rtol=0, atol=1e-12)
    assert set(driven.replies[4]) == {"s1"}


def test_a_site_without_rows_leaves_the_model_as_it_is(federation: Any, drive: Any) -> None:
    tables = sites(federation, (20, 0, 30))
    driven = run(drive, tables, rounds=1, order="fixed")
    assert np.array_equal(driven.rounds[1].send["weights"], driven.rounds[2].send["weights"])


def test_resuming_gives_the_same_bits(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    whole = run(drive, tables, rounds=5, checkpoint_every=2)
    for done, checkpoint in whole.checkpoints:
        resumed = run(drive, tables, dict(checkpoint.state), rounds=5, checkpoint_every=2, first_round=done)
        assert resumed.result["model"].weights.tobytes() == whole.result["model"].weights.tobytes()
        assert resumed.result["history"] == whole.result["history"]


def test_it_shows_single_replies_and_so_runs_under_plain_only(federation: Any) -> None:
    tables = sites(federation)
    outcome = federation.run(
        federation.plan("horizontal.cyclic", {**PARAMS, "rounds": 15}, tables, run={"holdout": 0.3}), tables
    )
    assert outcome["evaluation"]["pooled"]["auc"] > 0.75
    with pytest.raises(AtollError) as caught:
        federation.run(federation.plan("horizontal.cyclic", PARAMS, tables, protection=""), tables)
    assert caught.value.code == "plan.no-protection"
