"""Every algorithm that learns one model of tables learns the four hospitals' records, about as well as pooled data do.

The table that sets them beside each other, with its settings chosen on validation folds, is ``benchmarks.heart``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.plan import Plan
from atoll.runtime.sandbox import read_sites

EXAMPLE = Path(__file__).parents[2] / "examples" / "heart"
LEARNER = {"rounds": 15, "local_epochs": 2, "batch_size": 16, "learning_rate": 0.3}
ADAPTIVE = {"server_learning_rate": 0.1}
PUBLIC = {"generated": 300, "distil_steps": 20}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {}, "fedprox": {}, "scaffold": {}, "fednova": {}, "feddyn": {}, "fedavgm": {"server_momentum": 0.5},
    "fedadagrad": ADAPTIVE, "fedadam": ADAPTIVE, "fedyogi": ADAPTIVE, "cyclic": {}, "feddf": PUBLIC, "fedmd": PUBLIC,
    "finetune": {}, "fedper": {}, "fedrep": {"head_epochs": 2}, "ditto": {}, "apfl": {}, "perfedavg": {}, "ifca": {},
}  # fmt: skip
PERSONAL = {"fedmd", "finetune", "fedper", "fedrep", "ditto", "apfl", "perfedavg", "ifca"}
POOLED = 0.78
"""About what the maximum likelihood fit of all training rows gets on the held-out ones."""


def evaluated(federation: Any, atoll_data: Path, algorithm: str, own: dict[str, Any], **more: Any) -> dict[str, Any]:
    base = Plan.load(EXAMPLE / "plan.yaml").to_json()
    params = {**base["params"], **LEARNER, **own}
    plan = Plan.from_json({**base, "program": f"horizontal.{algorithm}", "params": params, **more})
    sources = read_sites(EXAMPLE / "sites.yaml")
    outcome: dict[str, Any] = federation.run(plan, sources, base=atoll_data / "heart-disease-uci")
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_it(federation: Any, atoll_data: Path, algorithm: str) -> None:
    found = evaluated(federation, atoll_data, algorithm, ALGORITHMS[algorithm], protection="plain")["evaluation"]
    scores = found["personal"]["pooled"] if algorithm in PERSONAL else found["pooled"]
    assert scores["accuracy"] > POOLED - 0.04
    assert algorithm in PERSONAL or scores["auc"] > 0.82
    assert ("personal" in found) == (algorithm in PERSONAL)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["scaffold", "fedper"])
def test_masked_sums_learn_the_same(federation: Any, atoll_data: Path, algorithm: str) -> None:
    weights = [
        evaluated(federation, atoll_data, algorithm, {"rounds": 3}, protection=how)["result"]["model"].weights
        for how in ("plain", "secagg")
    ]
    assert np.allclose(*weights, rtol=0, atol=1e-8)
