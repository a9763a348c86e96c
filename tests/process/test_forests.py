"""Forests, isolation forests and bagged trees over gRPC, a process per party: the bits of a run in one process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from atoll.contract.plan import Plan
from atoll.data.sources import SourceSpec
from atoll.models.stored import load
from atoll.runtime.sandbox import run_sandbox

pytestmark = pytest.mark.slow

FEATURES = {name: {"range": [-10, 10], "missing": "forbid"} for name in ("age", "dose", "score", "weight")}
LABEL = {"cured": {"dtype": "integer", "values": [0, 1], "role": "label", "missing": "forbid"}}
SCHEMA = {"name": "trial", "max_rows": 100_000, "columns": {**FEATURES, **LABEL}}
PLANS: list[tuple[str, str, dict[str, Any]]] = [
    ("trees.forest", "secagg", {"trees": 8, "batch": 4, "max_depth": 4, "max_bins": 16, "bootstrap": False}),
    ("trees.isolation", "secagg", {"trees": 20, "max_depth": 5, "contamination": 0.05}),
    ("trees.bagged", "plain", {"trees": 9, "max_depth": 3, "max_bins": 16, "binning": "even", "min_rows": 40}),
]


@pytest.fixture(scope="module")
def trusted(shared_federation: Any) -> Iterator[Any]:
    """The federation, whose sites answer rounds of trees."""
    allowed = {"programs": ["statistics.*", "trees.*"], "protections": ["plain", "secagg"]}
    shared_federation.revive()
    with contextlib.ExitStack() as held:
        for site in shared_federation.sites:
            held.enter_context(shared_federation.policy(site, **allowed))
        yield shared_federation


@pytest.mark.parametrize(("name", "protection", "params"), PLANS, ids=[name for name, *_ in PLANS])
def test_they_are_the_same_over_grpc(
    trusted: Any, tmp_path: Path, name: str, protection: str, params: dict[str, Any]
) -> None:
    content = {
        "atoll": 1, "name": name.partition(".")[2], "dataset": "trial", "schema": SCHEMA, "program": name,
        "protection": protection, "params": {"target": "cured", **params},
        "run": {"seed": 3, "holdout": 0.3, "deadline_s": 120},
    }  # fmt: skip
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    run = json.loads(trusted.as_coordinator("submit", file, "--json").stdout)["run"]
    trusted.await_status(run, "finished")
    over, model = trusted.store.result(run)
    sources = {site: SourceSpec(path=str(trusted.data(site))) for site in trusted.sites}
    within, _ = run_sandbox(Plan.from_json(content), sources, tmp_path, tmp_path / "local")
    beside = load(tmp_path / "local" / "model")[0]
    assert over["metrics"]["federated"]["auc"] > 0.4
    assert over["metrics"]["federated"] == json.loads(json.dumps(within["metrics"]["federated"]))
    assert model["weights"].tobytes() == beside.weights.tobytes()
