"""The demo's three hospitals: scikit-learn's breast-cancer data, split so that they differ."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from atoll.contract.plan import Plan
from atoll.data.sources import SourceSpec

FEATURES = {"mean_radius": [5, 30], "mean_texture": [5, 45], "mean_smoothness": [0.03, 0.2], "mean_concavity": [0, 0.6]}
HOSPITALS = {"north": 0.25, "harbour": 0.35, "university": 0.4}
"""Share of all patients; the university hospital is sent the harder cases."""

SCHEMA: dict[str, Any] = {
    "name": "breast-cancer",
    "max_rows": 100_000,
    "columns": {
        "patient": {"dtype": "text", "role": "entity"},
        **{name: {"dtype": "real", "range": limits} for name, limits in FEATURES.items()},
        "malignant": {"dtype": "integer", "values": [0, 1], "role": "label", "missing": "forbid"},
    },
}


def write(folder: Path) -> tuple[dict[str, Plan], dict[str, SourceSpec]]:
    """Write plans, schema, sites.yaml and data/HOSPITAL.csv into *folder*; returns plans and sources.

    569 patients; 2 % of the cells of two features are left empty, to be imputed.
    """
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    generator = np.random.default_rng(20)
    places = {str(name).replace(" ", "_"): i for i, name in enumerate(bunch.feature_names)}
    columns = {name: bunch.data[:, places[name]] for name in FEATURES}
    malignant = 1 - bunch.target
    severity = malignant + generator.normal(0, 1.2, len(malignant))
    order = np.argsort(severity)
    bounds = np.cumsum([round(share * len(order)) for share in HOSPITALS.values()])[:-1]
    empty = {name: generator.random(len(order)) < 0.02 for name in ("mean_texture", "mean_concavity")}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    sources = {}
    for hospital, rows in zip(HOSPITALS, np.split(order, bounds), strict=True):
        sources[hospital] = SourceSpec(path=f"data/{hospital}.csv")
        with (folder / "data" / f"{hospital}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(SCHEMA["columns"])
            for row in generator.permutation(rows):
                cells = ["" if name in empty and empty[name][row] else columns[name][row] for name in FEATURES]
                writer.writerow([f"p{row:04d}", *cells, malignant[row]])
    common = {"atoll": 1, "purpose": "demonstration"}
    recipe = {"steps": [{"step": "impute", "columns": ["mean_texture", "mean_concavity"], "with": "mean"}]}
    params = {"family": "logistic", "target": "malignant", "features": list(FEATURES)}
    contents: dict[str, dict[str, Any]] = {
        "statistics": {**common, "name": "demo-statistics", "program": "statistics.describe"},
        "model": {**common, "name": "demo-model", "program": "horizontal.glm", "params": params,
                  "recipe": recipe, "run": {"seed": 7, "holdout": 0.3}},
    }  # fmt: skip
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    (folder / "sites.yaml").write_text(
        yaml.safe_dump({name: {"path": spec.path} for name, spec in sources.items()}, sort_keys=False)
    )
    plans = {}
    for name, content in contents.items():
        plan_file = folder / f"{name}.plan.yaml"
        plan_file.write_text(yaml.safe_dump({**content, "schema": "schema.yaml"}, sort_keys=False))
        plans[name] = Plan.load(plan_file)
    return plans, sources
