"""atoll simulate and atoll forecast, as people and as machines use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import AtollError, PlanError

FEATURES = ["a", "b"]
PLAN = {
    "name": "demo", "program": "horizontal.fedavg", "protection": "plain",
    "schema": {
        "name": "t",
        "columns": {
            **{name: {"range": [-10, 10]} for name in FEATURES},
            "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
        },
    },
    "params": {"family": "logistic", "target": "y", "features": FEATURES, "rounds": 6},
    "run": {"seed": 3, "holdout": 0.25, "min_group_size": 1},
}  # fmt: skip
FLEET = {"seed": 1, "sites": {"h": {"count": 12, "rows": {"low": 50, "high": 90}, "speed": {"median": 1, "spread": 1}}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plan, three sites with tables, and a fleet."""
    random = np.random.default_rng(0)
    for site in ("north", "south", "west"):
        x = np.clip(random.normal(size=(60, 2)), -9, 9)
        rows = [f"{a:.4f},{b:.4f},{int(a > b)}" for a, b in x]
        (tmp_path / f"{site}.csv").write_text("\n".join(["a,b,y", *rows, ""]))
    sites = {site: {"path": f"{site}.csv"} for site in ("north", "south", "west")}
    for name, content in (("plan", PLAN), ("sites", sites), ("fleet", FLEET), ("one", {"all": sites["west"]})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path


def atoll(*arguments: Any) -> str:
    """The output of a command; raises what it raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_a_simulated_run_leaves_what_a_run_leaves(folder: Path) -> None:
    common = [folder / "plan.yaml", "--data", folder, "--json"]
    real = json.loads(atoll("run", *common, "--out", folder / "real"))
    found = json.loads(atoll("simulate", *common, "--out", folder / "out", "--no-batch"))
    assert found["metrics"]["federated"] == real["metrics"]["federated"] and found["model"] == real["model"]
    assert found["wire"]["from_sites_bytes"] == pytest.approx(real["wire"]["from_sites_bytes"], rel=0.01)
    assert found["transport"] == "simulated" and (folder / "out" / "report.html").is_file()
    assert (folder / "out" / "model" / "model.safetensors").read_bytes() == (
        folder / "real" / "model" / "model.safetensors"
    ).read_bytes()


def test_one_table_is_dealt_to_sites_that_learn_in_virtual_time(folder: Path) -> None:
    options = ["--sites", folder / "one.yaml", "--data", folder, "--split", 12, "--fleet", folder / "fleet.yaml"]
    told = atoll("simulate", folder / "plan.yaml", *options, "--step-s", "0.5", "--out", folder / "out")
    assert "12 simulated sites" in told and "virtual time" in told
    result = json.loads((folder / "out" / "result.json").read_text())
    assert result["virtual_time"]["step_s"] == 0.5 and result["seconds"] > 6 * 0.5
    assert sum(site["rows"] for site in result["sites"].values()) == 60


def test_a_forecast_is_told_and_written(folder: Path) -> None:
    options = [folder / "plan.yaml", "--fleet", folder / "fleet.yaml", "--step-s", "0.1"]
    told = atoll("forecast", *options, "--out", folder / "f")
    assert "wall time" in told and "waited for" in told
    found = json.loads(atoll("forecast", *options, "--json"))
    assert found == json.loads((folder / "f" / "forecast.json").read_text())
    assert found["sites"] == 12 and found["rounds"] == 7 and found["complete"] and not found["failed"]
    page = (folder / "f" / "forecast.html").read_text()
    assert page.count("<svg") >= 2 and "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert found["waiting"][0]["site"] in page
    many = json.loads(atoll("forecast", *options, "--count", 40, "--json"))
    assert many["sites"] == 40 and len(many["waiting"]) == 20


def test_what_is_wrong_is_told_before_anything_is_forecast(folder: Path) -> None:
    def refused(*arguments: Any) -> AtollError:
        with pytest.raises(PlanError) as error:
            atoll(*arguments)
        return error.value

    (folder / "empty.yaml").write_text("sites: {}\n")
    (folder / "units.yaml").write_text("sites: {a: {down: 64 kbit}}\n")
    assert refused("forecast", folder / "plan.yaml", "--fleet", folder / "empty.yaml").code == "fleet.empty"
    assert refused("forecast", folder / "plan.yaml", "--fleet", folder / "units.yaml").code == "fleet.unit"
    assert refused("forecast", folder / "plan.yaml", "--fleet", folder / "none.yaml").code == "plan.missing-file"
    odd = ["--fleet", folder / "fleet.yaml", "--step-s", "-1"]
    assert refused("forecast", folder / "plan.yaml", *odd).code == "forecast.step"
    common = ["simulate", folder / "plan.yaml", "--data", folder, "--out", folder / "o"]
    assert refused(*common, "--split", "3").code == "simulate.one-source"
    assert refused(*common, "--fleet", folder / "fleet.yaml").code == "fleet.other-sites"
