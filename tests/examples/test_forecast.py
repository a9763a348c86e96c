"""The forecasting examples on the real data: what their tables hold, and that a federation foretells better than now.

Windows and values to come are made a second time here, from the public files by pandas.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from atoll.contract.plan import Plan
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.runtime.catalogue import load_installed
from atoll.runtime.sandbox import read_sites, run_sandbox
from atoll.runtime.study import check_plan

pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[2] / "examples"
BORDER = np.datetime64("2012-03-01") + 1612 * np.timedelta64(5, "m")


@pytest.fixture(scope="module")
def districts(atoll_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("traffic")
    made = [sys.executable, str(EXAMPLES / "traffic" / "prepare.py"), str(out), "--data", str(atoll_data)]
    subprocess.run(made, check=True)
    return out


def parts(plan: Plan, sites: Path, folder: Path, name: str) -> tuple[Table, Table]:
    return SiteData.read(read_sites(sites)[name], plan, folder, name).parts({})


@pytest.mark.parametrize("name", ["traffic/plan", "air-quality/forecast", "air-quality/alarm", "air-quality/online"])
def test_plans_are_accepted(name: str) -> None:
    load_installed()
    check_plan(Plan.load(EXAMPLES / f"{name}.yaml"))


def test_districts_share_all_sensors_and_no_reading_of_the_test_is_learned(atoll_data: Path, districts: Path) -> None:
    speed = pd.read_csv(atoll_data / "traffic-los-loop" / "los_speed.csv.gz")
    tables = {
        name: pd.read_parquet(districts / f"{name}.parquet")
        for name in yaml.safe_load((districts / "sites.yaml").read_text())
    }
    assert len(tables) == 4
    assert sorted(s for table in tables.values() for s in table["sensor"].unique()) == sorted(speed.columns)
    for table in tables.values():
        moments = ((table["time"] - pd.Timestamp("2012-03-01")) / pd.Timedelta("5min")).astype(int).to_numpy()
        assert not ((moments >= 1600) & (moments < 1612)).any()
        sensor = np.array([speed.columns.get_loc(name) for name in table["sensor"]])
        values = speed.to_numpy()
        for column, steps in {"speed": 0, "speed_lag11": -11, "speed_15": 3, "speed_60": 12}.items():
            assert np.array_equal(table[column], values[moments + steps, sensor])
        here = values[:, np.unique(sensor)]
        assert (here[moments].min(1) - 1e-9 <= table["near"]).all()
        assert (table["near"] <= here[moments].max(1) + 1e-9).all()


def test_the_latest_fifth_is_held_out(districts: Path) -> None:
    plan = Plan.load(EXAMPLES / "traffic" / "plan.yaml")
    train, test = parts(plan, districts / "sites.yaml", districts, "district-1")
    assert test["time"].min() == BORDER
    assert train["time"].max() == BORDER - 13 * np.timedelta64(5, "m")
    sensors = len(train) // 1589
    assert (len(train), len(test)) == (1589 * sensors, 392 * sensors)


@pytest.mark.slow
def test_an_hour_of_a_station_and_what_comes(atoll_data: Path) -> None:
    folder, example = atoll_data / "beijing-air-quality", EXAMPLES / "air-quality"
    train, test = parts(Plan.load(example / "forecast.yaml"), example / "sites.yaml", folder, "dongsi")
    raw = pd.read_csv(folder / read_sites(example / "sites.yaml")["dongsi"].path)
    local = pd.to_datetime(raw[["year", "month", "day", "hour"]])
    raw.index = pd.DatetimeIndex(local - pd.Timedelta("8h"))
    known = raw["PM2.5"].shift(-1).notna() & raw["PM2.5"].shift(-24).notna()
    raw["held"] = raw["PM2.5"].ffill()
    assert len(train) + len(test) == known.sum()
    assert train["time"].max() < test["time"].min()
    for table in (train, test):
        times = pd.DatetimeIndex(table["time"])
        for name, series, steps in (
            ("PM2.5_ahead24", "PM2.5", -24),
            ("PM2.5_lag3", "held", 3),
            ("TEMP_lag11", "TEMP", 11),
        ):
            wanted = raw[series].shift(steps).reindex(times)
            assert np.array_equal(table[name], wanted, equal_nan=True)
        hours = (times + pd.Timedelta("8h")).hour.to_numpy()
        assert np.allclose(table["time_hour_sin"], np.sin(2 * np.pi * hours / 24))


@pytest.mark.slow
def test_districts_together_foretell_better_than_now(districts: Path, tmp_path: Path) -> None:
    plan = Plan.load(EXAMPLES / "traffic" / "plan.yaml")
    plan = plan.model_copy(update={"params": {**plan.params, "rounds": 10, "learning_rate": 0.05}})
    result: dict[str, Any] = run_sandbox(plan, read_sites(districts / "sites.yaml"), districts, tmp_path)[0]
    assert result["protection"] == "secagg"
    found = result["metrics"]["federated"]
    tests = [parts(plan, districts / "sites.yaml", districts, name)[1] for name in result["sites"]]
    for target in ("speed_15", "speed_30", "speed_60"):
        now = np.concatenate([np.abs(test[target] - test["speed"]) for test in tests]).mean()
        assert found[f"mae {target}"] < now
