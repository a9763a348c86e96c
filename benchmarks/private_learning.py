"""What protection costs in accuracy, seconds and bytes: one local step of a batch a hospital and round, as attacked.

``none`` and ``secagg`` are FedAvg with one local step of *batch* rows; ``dp`` and ``both`` are DP-SGD with a
Poisson sample of as many rows on average, (ε, δ) for the whole run and one record. The same rounds, model and data in
each; what the coordinator reconstructs of such batches is ``benchmarks.leakage``. Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atoll.contract.plan import Plan
from atoll.data.sources import SourceSpec
from atoll.data.table import Table
from atoll.models import stored
from atoll.runtime.sandbox import read_sites, run_sandbox
from atoll.statistics.scores import binary_metrics
from benchmarks.table import Row, main

SEED = 7
EPSILON, DELTA = 8.0, 1e-5
DATA = Path(os.environ.get("ATOLL_DATA", Path(__file__).parents[2] / "shared" / "data"))
EXAMPLES = Path(__file__).parents[1] / "examples"
ROUNDS = {1: 600, 8: 400, 64: 300}
RATES = {1: 0.01, 8: 0.03, 64: 0.1}
"""FedAvg's learning rate, by batch size."""
PROTECTIONS = ("none", "dp", "secagg", "both")


def planned(
    base: Plan, model: Mapping[str, Any], protection: str, batch: int, rows: Mapping[str, int], rounds: int, rate: float
) -> Plan:
    """*base* with a learner of *model*, one local step of *batch* rows, under *protection*."""
    total, noised = sum(rows.values()), protection in ("dp", "both")
    learner: dict[str, Any] = {**model, "rounds": rounds, "learning_rate": rate, "checkpoint_every": 10_000}
    if noised:
        size = min(1.0, batch * len(rows) / total)
        learner |= {"expected_rows": total, "sampling_rate": size, "clip_norm_l2": 1.0}
    else:
        learner |= {"local_steps": 1, "batch_size": batch}
    changed = {
        **base.to_json(), "name": f"{base.name}-{protection}", "params": learner,
        "program": "horizontal.dpsgd" if noised else "horizontal.fedavg",
        "protection": "secagg" if protection in ("secagg", "both") else "plain",
        "privacy": {"unit": "record", "epsilon": EPSILON, "delta": DELTA} if noised else None,
        "cohort": {"min_sites": len(rows), "on_dropout": "fail"},
    }  # fmt: skip
    return Plan.from_json(changed)


def measured(
    study: str, base: Plan, model: Mapping[str, Any], sources: Mapping[str, SourceSpec], folder: Path,
    rows: Mapping[str, int], score: Callable[[dict[str, Any], Path], float], quick: bool, batches: tuple[int, ...],
) -> list[Row]:  # fmt: skip
    """One row for each protection and batch size: accuracy in per cent; the peer is that without protection."""
    found = []
    for batch in batches:
        plain: float | None = None
        for protection in PROTECTIONS:
            rounds = 20 if quick else ROUNDS[batch]
            plan = planned(base, model, protection, batch, rows, rounds, RATES[batch])
            with tempfile.TemporaryDirectory() as out:
                result, _ = run_sandbox(plan, sources, folder, Path(out))
                accuracy = 100 * score(result, Path(out))
            plain = accuracy if plain is None else plain
            sent = result["wire"]["from_sites_bytes"] / len(rows) / 1e6
            note = f"{rounds} rounds in {result['seconds']:.1f} s, {sent:.2f} MB from a hospital"
            if protection in ("dp", "both"):
                note += f", ε = {EPSILON:g}, δ = {DELTA:g} of a record"
            name = f"{study}, batch {batch}, {protection}"
            found.append(Row(name, accuracy, "% right", None if protection == "none" else plain, note=note))
            print(found[-1], file=sys.stderr, flush=True)
    return found


def heart(quick: bool) -> list[Row]:
    """Logistic regression at four hospitals; accuracy on held-out rows of all of them."""
    base = Plan.load(EXAMPLES / "heart" / "plan.yaml")
    model = {name: base.params[name] for name in ("family", "target", "features")}
    sources = read_sites(EXAMPLES / "heart" / "sites.yaml")
    rows = {"cleveland": 202, "hungary": 196, "switzerland": 82, "va": 133}

    def score(result: dict[str, Any], _: Path) -> float:
        return float(result["metrics"]["federated"]["accuracy"])

    folder = DATA / "heart-disease-uci"
    return measured("heart, 4 hospitals", base, model, sources, folder, rows, score, quick, (1, 8, 64))


def pneumonia(hospitals: int, quick: bool) -> list[Row]:
    """A CNN at *hospitals* hospitals; accuracy on the official test images."""
    base = Plan.load(EXAMPLES / "pneumonia" / "plan.yaml")
    base = base.model_copy(update={"run": base.run.model_copy(update={"holdout": 0.0, "evaluate": False})})
    model = {"target": "pneumonia", "model": base.params["model"]}
    with tempfile.TemporaryDirectory() as folder:
        made = [sys.executable, str(EXAMPLES / "pneumonia" / "prepare.py"), folder, "--data", str(DATA)]
        subprocess.run([*made, "--hospitals", str(hospitals)], check=True)
        sources = read_sites(Path(folder) / "sites.yaml")
        rows = {}
        for name, source in sources.items():
            with np.load(Path(folder) / source.path) as held:
                rows[name] = len(held["pneumonia"])
        with np.load(Path(folder) / "test.npz") as held:
            test = Table(base.table, {"image": held["image"], "pneumonia": held["pneumonia"].astype(np.float64)})

        def score(result: dict[str, Any], out: Path) -> float:
            learned, _, _ = stored.load(out / "model")
            return binary_metrics(test["pneumonia"], learned.predict(test))["accuracy"]

        name = f"pneumonia, {hospitals} hospitals"
        return measured(name, base, model, sources, Path(folder), rows, score, quick, (1, 8, 64))


def measure(quick: bool) -> list[Row]:
    """All of it."""
    return [*heart(quick), *pneumonia(2, quick), *pneumonia(3, quick)]


if __name__ == "__main__":
    main("private_learning", ("numpy", "torch", "dp-accounting"), measure, SEED)
