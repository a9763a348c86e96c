"""Every protection over gRPC, a process per party: the numbers of a run in one process, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from atoll.contract.plan import Plan
from atoll.data.sources import SourceSpec
from atoll.runtime.sandbox import run_sandbox

pytestmark = pytest.mark.slow

SCHEMA = {
    "name": "clinic",
    "max_rows": 1000,
    "columns": {
        "age": {"range": [0, 100]},
        "dose": {"range": [0, 10], "missing": "allow"},
        "ward": {"dtype": "text", "values": ["north", "south"]},
        "sick": {"dtype": "integer", "values": [0, 1], "role": "label"},
    },
}
ASK = [
    {"program": "statistics.describe"},
    {"program": "statistics.frequency"},
    {"program": "statistics.correlation", "params": {"columns": ["age", "dose"]}},
    {"program": "statistics.quantiles", "params": {"columns": ["age"]}},
    {"program": "statistics.woe", "params": {"target": "sick"}},
]
PROGRAMS = {
    "statistics.several": {"ask": ASK},
    "horizontal.glm": {"family": "logistic", "target": "sick", "features": ["age"], "l2": 1.0},
    "horizontal.fedavg": {"family": "logistic", "target": "sick", "features": ["age"], "rounds": 3},
}


def clinics(folder: Path) -> dict[str, SourceSpec]:
    random, sources = np.random.default_rng(4), {}
    for name in ("east", "mid", "west"):
        age = random.uniform(20, 90, 120).round(1)
        rows = ["age,dose,ward,sick"]
        for i, years in enumerate(age):
            dose = "" if i % 17 == 0 else f"{random.uniform(0, 9):.2f}"
            rows.append(f"{years},{dose},{('north', 'south')[i % 2]},{int(random.random() < years / 100)}")
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
        sources[name] = SourceSpec(path=f"{name}.csv")
    return sources


def numbers(result: dict[str, Any]) -> Any:
    return [result.get("statistics"), result.get("output"), result.get("model", {}).get("coefficients")]


@pytest.mark.parametrize("privacy", [None, {"unit": "record", "epsilon": 20.0, "delta": 1e-5}], ids=["exact", "noised"])
@pytest.mark.parametrize("protection", ["plain", "secagg", "paillier", "ckks"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_it_runs_over_grpc(tmp_path: Path, program: str, protection: str, privacy: dict[str, Any] | None) -> None:
    sources = clinics(tmp_path)
    if privacy and program == "horizontal.fedavg":
        privacy = {**privacy, "unit": "site"}
    plan = Plan.from_json(
        {
            "atoll": 1, "name": "grpc", "schema": SCHEMA, "program": program, "params": PROGRAMS[program],
            "protection": {"sum": protection, "key_bits": 2048}, "privacy": privacy,
            "run": {"evaluate": False, "deadline_s": 120},
        }
    )  # fmt: skip
    over, _ = run_sandbox(plan, sources, tmp_path, tmp_path / "grpc", "grpc")
    assert over["transport"] == "grpc" and over["privacy"]["noised"] == (privacy is not None)
    assert over["protection"] == protection
    if privacy is None:
        within, _ = run_sandbox(plan, sources, tmp_path, tmp_path / "local")
        assert yaml.safe_dump(numbers(over)) == yaml.safe_dump(numbers(within))
