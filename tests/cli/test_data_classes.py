"""``atoll check`` shows which columns a site's policy may withhold, and as what."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from atoll.cli.main import app

SCHEMA = {
    "name": "cases",
    "columns": {
        "case": {"dtype": "text", "data_class": "identifier"},
        "street": {"dtype": "text", "data_class": "identifier+trajectory"},
        "age": {"range": [0, 120]},
    },
}


def test_check_lists_data_classes(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    plan = {"atoll": 1, "name": "ages", "schema": "schema.yaml", "program": "statistics.describe",
            "params": {"columns": ["age"]}}  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    told = CliRunner().invoke(app, ["check", str(tmp_path / "plan.yaml")])
    assert told.exit_code == 0, told.output
    said = " ".join(told.output.split())
    assert "identifier data: case, street (" in said and "trajectory data: street (" in said and "withhold" in said
    machine = CliRunner().invoke(app, ["check", str(tmp_path / "plan.yaml"), "--json"])
    found = json.loads(machine.output)["data_classes"]
    assert found == {"identifier": ["case", "street"], "trajectory": ["street"]}
