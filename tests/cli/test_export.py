"""``atoll export`` and ``atoll import``: models of trees for XGBoost, and from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.models.random_trees import (
    SCHEMA,
    assert_alike,
    booster,
    drawn,
    kept,
    rows,
)
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import PlanError
from atoll.models import stored, xgboost_json
from atoll.models.model import make


def called(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_commands_write_a_model_for_xgboost_and_read_it_again(tmp_path: Path) -> None:
    model = drawn("exp", 4, 3, 6)
    table = rows(60, 6, model)
    done = called("export", kept(model, tmp_path / "model", objective="cox"))
    assert done.exit_code == 0, done.output
    path = tmp_path / "model" / "model.xgboost.json"
    assert_alike(model, booster(path.read_bytes(), tmp_path), table)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA.model_dump(mode="json")))
    asked = ("import", path, "--target", "cases", "--out", tmp_path / "taken")
    done = called(*asked, "--schema", tmp_path / "schema.yaml")
    assert done.exit_code == 0, done.output
    found, schema, about = stored.load(tmp_path / "taken")
    assert schema == SCHEMA
    assert about["model"]["objective"] == "survival:cox"
    assert about["imported"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.predict(table) == pytest.approx(model.predict(table), rel=1e-5)
    assert called("export", tmp_path / "taken", "--out", tmp_path / "again.json").exit_code == 0
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert isinstance(called(*asked).exception, PlanError)


def test_a_plan_gives_the_schema_of_its_prepared_table(tmp_path: Path) -> None:
    model = drawn("identity", 2, 2, 6)
    (tmp_path / "model.json").write_bytes(xgboost_json.to_json(model, SCHEMA))
    plan = {
        "atoll": 1, "name": "p", "purpose": "x", "schema": SCHEMA.model_dump(mode="json"), "dataset": "d",
        "program": "statistics.describe", "params": {},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    done = called("import", tmp_path / "model.json", "--target", "value", "--plan", tmp_path / "plan.yaml",
                  "--out", tmp_path / "taken")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert stored.load(tmp_path / "taken")[1].columns == SCHEMA.columns


@pytest.mark.parametrize("kind", ["safetensors", "xgboost"])
def test_a_format_is_for_some_kinds_of_models(tmp_path: Path, kind: str) -> None:
    if kind == "safetensors":
        folder = kept(drawn("identity", 1, 1, 1), tmp_path)
    else:
        linear = make({"kind": "linear", "family": "linear", "features": ["a"], "target": "value"}, SCHEMA)
        told = {"spec": linear.spec(), "layers": ["weights"]}
        stored.save(tmp_path, {"model": told, "schema": SCHEMA.model_dump(mode="json")}, linear.arrays())
        folder = tmp_path
    found = called("export", folder, "--format", kind).exception
    assert isinstance(found, PlanError)
    assert found.code == "export.format"
