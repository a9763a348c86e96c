"""Two programs under every protection, with and without differential privacy: seconds, bytes and exactness.

Four hospitals' heart data in one process (``local``), ledgers and journals included; the difference is the largest of
any number in the result, relative to its size (or to 1), from the same under ``plain`` without noise.
Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.contract.plan import Plan
from atoll.runtime.sandbox import read_sites, run_sandbox
from benchmarks.table import Row, main

SEED = 7
DATA = Path(os.environ.get("ATOLL_DATA", Path(__file__).parents[2] / "shared" / "data"))
HEART = Path(__file__).parents[1] / "examples" / "heart"
PRIVACY = {"unit": "record", "epsilon": 4.0, "delta": 1e-5}


def difference(one: Any, other: Any) -> float:
    """The largest between numbers at the same place, relative to their size or 1."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return max((difference(one[key], other[key]) for key in one.keys() & other.keys()), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) / max(abs(one), 1.0)
    return 0.0


def found(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a run's result."""
    if "model" in result:
        return {"coefficients": result["model"]["coefficients"]}
    columns = result["statistics"]["columns"]
    return {name: {key: told[key] for key in ("count", "mean", "std") if key in told} for name, told in columns.items()}


def measure(quick: bool) -> list[Row]:
    """A row for each program, protection and privacy; the peer is plain."""
    base = Plan.load(HEART / "plan.yaml")
    features = base.params["features"]
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "describe": ("statistics.describe", {"columns": features}),
        "glm": ("horizontal.glm", {**base.params, "l2": 1.0}),
    }
    sources, rows = read_sites(HEART / "sites.yaml"), []
    for title, (program, params) in asked.items():
        plain_s, exact = 0.0, dict[str, Any]()
        for protection in ("plain", "secagg", "paillier", "ckks"):
            for privacy in (None, PRIVACY):
                changed = {
                    **base.to_json(), "program": program, "params": params, "protection": protection,
                    "privacy": privacy, "run": {**base.run.model_dump(mode="json"), "holdout": 0.0, "evaluate": False},
                }  # fmt: skip
                with tempfile.TemporaryDirectory() as out:
                    plan = Plan.from_json(changed)
                    result, _ = run_sandbox(plan, sources, DATA / "heart-disease-uci", Path(out))
                seconds, numbers = float(result["seconds"]), found(result)
                if not exact:
                    plain_s, exact = seconds, numbers
                wire = result["wire"]
                sent = (wire["to_sites_bytes"] + wire["from_sites_bytes"]) / len(sources) / 1e6
                note = f"{result['rounds']} rounds, {sent:.2f} MB a site, difference {difference(exact, numbers):.1e}"
                told = "" if privacy is None else f" + ε = {PRIVACY['epsilon']:g}"
                rows.append(Row(f"{title}, {protection}{told}", seconds, "s", plain_s, note=note))
    return rows


if __name__ == "__main__":
    main("protected_programs", ("numpy", "gmpy2", "tenseal", "dp-accounting"), measure, SEED)
