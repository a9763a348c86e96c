"""Every learning algorithm over gRPC, a process per party: the scores of a run in one process, to the last bit.

Algorithms are found by their registration; OPTIONS has what one cannot do without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY
from atoll.data.sources import SourceSpec
from atoll.runtime.sandbox import run_sandbox
from atoll.runtime.study import check_plan

pytestmark = pytest.mark.slow

FEATURES = ["age", "dose", "score", "weight"]
COLUMNS = {name: {"range": [-10, 10], "missing": "forbid"} for name in FEATURES}
SCHEMA = {
    "name": "trial",
    "max_rows": 100_000,
    "columns": {**COLUMNS, "cured": {"dtype": "integer", "values": [0, 1], "role": "label", "missing": "forbid"}},
}
MODELS: list[dict[str, Any]] = [
    {"family": "logistic", "features": FEATURES},
    {"model": {"kind": "mlp", "features": FEATURES, "hidden": [4]}},
    {"model": {"kind": "series_transformer", "series": {"all": FEATURES}}},
]
OPTIONS: dict[str, dict[str, Any]] = {
    "horizontal.fedbuff": {"buffer": 3},
    "horizontal.feddf": {"generated": 40},
    "horizontal.fedmd": {"generated": 40},
    "horizontal.online": {"time": "score", "start": -3, "every": 2},
    "horizontal.dpsgd": {"expected_rows": 4500, "sampling_rate": 1.0},
    "horizontal.dpftrl": {"expected_rows": 4500, "time": "score"},
    "horizontal.glm": {"l2": 1.0},
}
LEARNERS = sorted(  # but for those in which the first to answer decides
    name for name, cls in REGISTRY.items()
    if cls.__module__.startswith("atoll.horizontal.") and "stream" not in cls.declared.needs
)  # fmt: skip


def planned(name: str) -> dict[str, Any]:
    """A plan of the program with the first model that suits it."""
    rounds = {} if name == "horizontal.glm" else {"rounds": 3}
    refused: list[PlanError] = []
    for model in MODELS:
        content = {
            "atoll": 1, "name": name.partition(".")[2], "dataset": "trial", "schema": SCHEMA, "program": name,
            "protection": "plain", "params": {"target": "cured", **rounds, **model, **OPTIONS.get(name, {})},
            "run": {"seed": 3, "holdout": 0.3, "deadline_s": 120},
        }  # fmt: skip
        try:
            check_plan(Plan.from_json(content))
        except PlanError as error:
            refused.append(error)
            continue
        return content
    raise refused[0]


def learned(result: dict[str, Any]) -> Any:
    """Scores, the sites' own too, and what else a run tells of its model; of sites alone only gRPC knows nothing."""
    metrics = {part: found for part, found in result["metrics"].items() if part in ("federated", "personal")}
    return json.loads(json.dumps([metrics, result.get("model"), result["output"]]))


@pytest.mark.parametrize("name", LEARNERS)
def test_it_learns_the_same_over_grpc(federation: Any, tmp_path: Path, name: str) -> None:
    content = planned(name)
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    run = json.loads(federation.as_coordinator("submit", file, "--json").stdout)["run"]
    federation.await_status(run, "finished")
    over, _ = federation.store.result(run)
    sources = {site: SourceSpec(path=str(federation.data(site))) for site in federation.sites}
    within, _ = run_sandbox(Plan.from_json(content), sources, tmp_path, tmp_path / "local")
    assert learned(over)[0]["federated"] or learned(over)[0]["personal"]
    assert learned(over) == learned(within)
