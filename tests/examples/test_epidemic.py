"""The epidemic example on the real series: what four regions' offices prepare, learn and tell day by day."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from atoll.blueprints.epidemic.generator import recipe, schema
from atoll.cli.main import app
from atoll.contract.plan import Plan
from atoll.data.site_data import SiteData
from atoll.runtime.sandbox import read_sites, run_sandbox

EXAMPLE = Path(__file__).parents[2] / "examples" / "epidemic"
PROVINCES = {"shanghai": "上海市", "jiangsu": "江苏省", "zhejiang": "浙江省", "anhui": "安徽省"}
UNTIL = "2020-02-10"


def prepare(data: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, str(EXAMPLE / "prepare.py"), str(data / "covid19-china-cities"), str(out), *options]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def offices(atoll_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(atoll_data, tmp_path_factory.mktemp("offices"), "--until", UNTIL, "--cases", "1500")


def call(*arguments: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"})
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_the_cases_contract_is_the_generators() -> None:
    assert yaml.safe_load((EXAMPLE / "cases-schema.yaml").read_text()) == schema()
    assert yaml.safe_load((EXAMPLE / "cases-recipe.yaml").read_text()) == recipe()


def test_every_store_gives_the_series_of_its_region(offices: Path, atoll_data: Path) -> None:
    """Counted a second time by pandas: four kinds of store, corrections downward, missing days, rows sent twice."""
    plan = Plan.load(EXAMPLE / "forecast-7.yaml").model_copy(update={"recipe": _recipe()})
    whole = pd.read_csv(atoll_data / "covid19-china-cities" / "china_national_province_city_daily.csv.gz")
    whole = whole[(whole["date"] <= UNTIL) & whole["city"].notna()]
    for site, spec in read_sites(offices / "sites.yaml").items():
        table = SiteData.read(spec, plan, offices, site).base()
        own = whole[whole["province"] == PROVINCES[site]]
        assert set(table["city"]) == set(own["city"])
        for city, rows in own.groupby("city"):
            here = table["city"] == city
            days = pd.date_range(rows["date"].min(), rows["date"].max())
            assert here.sum() == len(days), "one row a day, also for days without a report"
            new = table["confirmed_diff1"][here]
            assert (new >= 0).all()
            counts = rows.sort_values("date")["confirmed"].to_numpy()
            if (np.diff(counts) >= 0).all():  # corrections downward move cases to other days
                assert new.sum() == counts[-1] - counts[0]
            week, lately = pd.Series(new).rolling(7).mean().shift(-7), pd.Series(new).rolling(3, 1).mean()
            growth, told = np.log(((week + 2) / (lately + 2)).to_numpy()), table["growth_next_7"][here]
            known = ~np.isnan(growth)
            assert np.allclose(told[known], growth[known]), "the target is what came after"
            assert np.isnan(told[-7:]).all()


def _recipe() -> Any:
    return Plan.load(EXAMPLE / "daily.yaml").recipe


@pytest.mark.parametrize(
    "name",
    ["cases-iv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cases-correlation", "cases-logistic"))],
)
def test_case_lists(offices: Path, tmp_path: Path, name: str) -> None:
    plan = Plan.load(EXAMPLE / f"{name}.yaml")
    result, _ = run_sandbox(plan, read_sites(offices / "cases" / "sites.yaml"), offices / "cases", tmp_path)
    dropped = result["preparation"]["dropped"]
    assert dropped["duplicate rows"] > 0 and dropped["superseded rows"] > 0
    if name == "cases-iv":
        assert set(result["output"]["woe"]["ranking"][:4]) <= {"x1", "x7", "x8", "x9", "x12"}
    if name == "cases-logistic":
        assert result["metrics"]["federated"]["auc"] > 0.85


@pytest.fixture(scope="module")
def trained(offices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed models and the plan that names them."""
    out, plan = tmp_path_factory.mktemp("trained"), EXAMPLE / "daily.yaml"
    for days in (1, 3, 7, 14):
        made = out / str(days)
        made.mkdir()
        asked = Plan.load(EXAMPLE / f"forecast-{days}.yaml")
        few = asked.model_copy(update={"params": {**asked.params, "trees": 4}})
        run_sandbox(few, read_sites(offices / "sites.yaml"), offices, made)
        filled = ("--plan", plan, "--out", out / "daily.yaml")
        call("install", made / "model", "--name", f"epidemic-{days}", "--models", out / "models", *filled)
        plan = out / "daily.yaml"
    return out


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_day_after_day(
    offices: Path, trained: Path, atoll_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """The day before the last, then the last, and then the last again."""
    monkeypatch.setenv("ATOLL_MODELS", str(trained / "models"))
    before = prepare(atoll_data, tmp_path / "before", "--until", "2020-02-09", "--cases", "0")
    out = tmp_path / "out"

    def daily(data: Path) -> str:
        return call("daily", trained / "daily.yaml", "--sites", data / "sites.yaml", "--data", data, "--out", out,
                    "--transport", transport)  # fmt: skip

    assert "2020-02-09" in daily(before)
    assert "2020-02-10" in daily(offices)
    assert "nobody was asked" in daily(offices)
    history = json.loads((out / "history.json").read_text())["days"]
    assert [entry["day"] for entry in history] == ["2020-02-09", UNTIL]
    assert len({entry["plan_hash"] for entry in history}) == 1
    found = json.loads((out / UNTIL / "result.json").read_text())["output"]["epidemic"]
    assert 0 < found["joint"]["risk"] < 1 and set(found["regions"]) == set(PROVINCES)
    assert found["joint"]["population"] == 24_870_895 + 84_748_016 + 64_567_588 + 61_027_171
    assert {one["days"] for one in found["forecast"]["learned"]} == {1, 3, 7, 14}
    call("ledger", "verify", *(out / "ledger").glob("*.jsonl"))
    shutil.rmtree(out)
