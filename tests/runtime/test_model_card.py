"""What a run leaves of its model: the folder is read again, and its card tells what the run was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from atoll.models import estimator, stored
from atoll.models.importance import importance
from atoll.runtime.model_card import scores, table
from atoll.runtime.results import write_model

COLUMNS: dict[str, Any] = {
    "age": {"range": [0, 100], "unit": "year", "description": "at admission | rounded"},
    "dose": {"range": [0, 10], "unit": "mg"},
    "unused": {"range": [0, 1]},
    "ill": {"dtype": "integer", "values": [0, 1], "role": "label"},
}


def sites(federation: Any) -> dict[str, Any]:
    random, found = np.random.default_rng(0), {}
    for i, n in enumerate((60, 40, 80)):
        age, dose = random.uniform(0, 100, n), random.uniform(0, 10, n)
        ill = (random.random(n) < 1 / (1 + np.exp(4 - age / 12))).astype(float)
        found[f"s{i}"] = federation.table({"age": age, "dose": dose, "unused": dose / 10, "ill": ill}, COLUMNS)
    return found


def left(federation: Any, folder: Path, **more: Any) -> tuple[str, Any, Any]:
    """(README.md, model.json, the run's own model)."""
    params = {"target": "ill", "family": "logistic", "features": ["age", "dose"]}
    if "privacy" in more:
        params |= {"clip_norm_l2": 1.0, "rounds": 2}
    plan = federation.plan(
        "horizontal.fedavg" if "privacy" in more else "horizontal.glm", params, sites(federation), purpose="research",
        run={"holdout": 0.25, "seed": 3}, **more,
    )  # fmt: skip
    outcome = federation.run(plan, sites(federation))
    result, arrays = federation.store.result(federation.run_id)
    write_model(folder / "model", federation.store.run(federation.run_id)["plan"], result, arrays)
    text = (folder / "model" / "README.md").read_text(encoding="utf-8")
    return text, json.loads((folder / "model" / "model.json").read_text()), outcome["result"]["model"]


def test_the_folder_holds_the_runs_model(federation: Any, tmp_path: Path) -> None:
    _, about, model = left(federation, tmp_path)
    rows = sites(federation)["s0"]
    found, schema, _ = stored.load(tmp_path / "model")
    assert found.predict(rows).tobytes() == model.predict(rows).tobytes()
    frame = {"dose": rows["dose"], "age": rows["age"]}
    loaded: Any = estimator.load(tmp_path / "model")
    assert np.array_equal(loaded.predict_proba(frame)[:, 1], model.predict(rows))
    assert set(about) >= {"study", "program", "plan_hash", "run", "model", "fitted", "metrics", "privacy", "schema"}
    assert about["model"]["layers"] == ["weights"]
    assert (schema.columns["age"].unit, schema.columns["dose"].bounds()) == ("year", (0, 10))


def test_the_card_tells_what_the_run_was(federation: Any, tmp_path: Path) -> None:
    text, about, _ = left(federation, tmp_path)
    _, header, body = text.split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["library_name"] == "atoll"
    assert told["pipeline_tag"] == "tabular-classification"
    [result] = told["model-index"][0]["results"]
    scored = {one["type"]: one["value"] for one in result["metrics"]}
    assert scored["auc"] == about["metrics"]["federated"]["auc"]
    parts = {part.partition("\n")[0]: part for part in body.split("\n## ")}
    assert list(parts)[1:] == [
        "Model details", "Intended use", "Data contract", "Training data", "Training", "Privacy", "Metrics",
        "Limitations",
    ]  # fmt: skip
    assert about["plan_hash"] in parts["Model details"]
    assert "| age | feature | real | year | 0 to 100 | at admission \\| rounded |" in parts["Data contract"]
    assert "unused" not in text
    assert "| s1 | 40 |" in parts["Training data"]
    assert "25% of each site's rows" in parts["Training data"]
    assert yaml.safe_load(parts["Training"].split("```")[1].removeprefix("yaml"))["features"] == ["age", "dose"]
    assert about["privacy"]["statement"] in parts["Privacy"]
    assert "No noise" in parts["Privacy"]
    assert f"| all sites | federated | {scored['auc']:.4g} |" in parts["Metrics"]
    assert "| s2 | federated |" in parts["Metrics"]


def test_the_card_tells_the_privacy_promised(federation: Any, tmp_path: Path) -> None:
    privacy = {"unit": "site", "epsilon": 50, "delta": 1e-3}
    text, _, _ = left(federation, tmp_path, privacy=privacy, protection="plain")
    assert "ε = 50, δ = 0.001 for each site" in text
    assert "No noise" not in text
    assert "| s1 | not shared |" in text
    assert "No site shared metrics of its own." in text


def test_what_was_not_scored_is_said() -> None:
    assert scores({"federated": {}, "per_site": {"a": {"federated": {}}}}).startswith("No rows were held out")
    found = scores({"federated": {"mae": 2.0}, "per_site": {"a": {"federated": {"mae": None}, "local": {}}}})
    assert "| all sites | federated | 2 |" in found
    assert "| a | federated | – |" in found
    assert table(("x",), [["a|b\nc"]]).splitlines()[-1] == "| a\\|b c |"


def test_the_card_of_trees_tells_what_they_lean_on(federation: Any, tmp_path: Path) -> None:
    params = {"target": "ill", "features": ["age", "dose"], "trees": 2, "max_depth": 2, "max_bins": 8}
    plan = federation.plan("trees.boosted", params, sites(federation), purpose="research", run={"holdout": 0.25})
    model = federation.run(plan, sites(federation))["result"]["model"]
    result, arrays = federation.store.result(federation.run_id)
    assert result["model"]["trees"]["importance"] == json.loads(json.dumps(importance(model)))
    write_model(tmp_path / "model", federation.store.run(federation.run_id)["plan"], result, arrays)
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    gains = {one["feature"]: one["gain"] for one in importance(model)}
    assert f"| age | {gains['age'] / sum(gains.values()):.1%} |" in text
    assert text.index("## What it leans on") < text.index("## Limitations")
    loaded: Any = estimator.load(tmp_path / "model")
    rows = sites(federation)["s0"]
    frame = {"dose": rows["dose"], "age": rows["age"]}
    assert np.array_equal(loaded.predict_proba(frame)[:, 1], model.predict(rows))
    values, expected = loaded.shap_values(frame)
    assert np.allclose(values.sum(1) + expected, model.margins(model.inputs(rows))[:, 0])
