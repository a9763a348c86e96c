"""The statistics examples, on the real data: every released number equals the pooled answer by pandas and scipy.

The pooled side reads the public files by itself and shares nothing with Atoll but the question.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from benchmarks.postgres import programs, server
from scipy import stats

from atoll.contract.plan import Plan
from atoll.runtime.sandbox import read_sites, run_sandbox

EXAMPLES = Path(__file__).parents[2] / "examples"
REL = 1e-9
STATIONS = (
    "Aotizhongxin", "Changping", "Dingling", "Dongsi", "Guanyuan", "Gucheng", "Huairou", "Nongzhanguan", "Shunyi",
    "Tiantan", "Wanliu", "Wanshouxigong",
)  # fmt: skip


def run(example: str, data: Path, out: Path, sites: Path | None = None, transport: Any = "local") -> dict[str, Any]:
    folder = EXAMPLES / example
    plan = Plan.load(folder / "plan.yaml")
    return run_sandbox(plan, read_sites(sites or folder / "sites.yaml"), data, out, transport)[0]


def same(found: Any, wanted: Any, *, scale: float = 0.0) -> None:
    """Equal to 1e-9, relative (or of *scale*, for sums that cancel)."""
    assert found == pytest.approx(wanted, rel=REL, abs=REL * scale, nan_ok=True)


def described(found: Mapping[str, Any], pooled: pd.DataFrame) -> None:
    assert set(found) <= set(pooled.columns)
    for name, told in found.items():
        values = pooled[name].dropna().to_numpy(float)
        assert told["count"] == len(values)
        assert told["missing"] == len(pooled) - len(values)
        same(told["mean"], values.mean(), scale=np.abs(values).mean())
        same(told["std"], values.std(ddof=1))
        bins = [0 if rows is None else rows for rows in told["histogram"]]
        assert sum(bins) <= len(values)


def quantiles(found: Mapping[str, Any], pooled: pd.DataFrame) -> None:
    for name, told in found["columns"].items():
        values = pooled[name].dropna().to_numpy(float)
        for p, value, error in zip(told["probabilities"], told["values"], told["errors"], strict=True):
            assert abs(value - np.quantile(values, p, method="inverted_cdf")) <= error + 1e-9


def correlated(found: Mapping[str, Any], pooled: pd.DataFrame) -> None:
    names = found["columns"]
    wanted, told = pooled[names].corr().to_numpy(), np.array(found["matrix"], float)
    released = ~np.isnan(told)
    assert released.mean() > 0.95  # where almost the same rows have both columns, the difference would tell few
    same(told[released].tolist(), wanted[released].tolist(), scale=1.0)
    there = pooled[names].notna().to_numpy(float)
    counts = np.array(found["pairs_count"], float)
    assert np.array_equal(counts[~np.isnan(counts)], (there.T @ there)[~np.isnan(counts)])


def grouped(found: Mapping[str, Any], pooled: pd.DataFrame) -> None:
    by = found["by"][0]
    shown = 0
    for group in found["groups"]:
        rows = pooled[pooled[by] == group["key"][0]]
        if group["count"] is None:
            assert len(rows) > 0
            continue
        shown += 1
        assert group["count"] == len(rows)
        for name, told in group["columns"].items():
            if told["count"] is not None:
                values = rows[name].dropna().to_numpy(float)
                assert told["count"] == len(values)
                same(told["mean"], values.mean(), scale=np.abs(values).mean())
                same(told["sum"], values.sum(), scale=np.abs(values).sum())
                same(told["std"], values.std(ddof=1))
    assert shown >= len(found["groups"]) - 2


# ---------------------------------------------------------------- three banks


@pytest.fixture(scope="module")
def banks(atoll_data: Path) -> pd.DataFrame:
    files = ("guest", "host_1", "host_2")
    folder = atoll_data / "default-credit-uci"
    return pd.concat([pd.read_csv(folder / f"default_credit_homo_{name}.csv.gz") for name in files], ignore_index=True)


@pytest.fixture(scope="module")
def credit(atoll_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("credit")
    return run("credit-statistics", atoll_data / "default-credit-uci", out)


def test_banks_information_values(credit: dict[str, Any], banks: pd.DataFrame) -> None:
    woe = credit["output"]["woe"]
    assert woe["ranking"][0] == max(woe["features"], key=lambda name: woe["features"][name]["iv"])
    goods, bads = (banks["y"] == 0).sum(), (banks["y"] == 1).sum()
    for name, told in woe["features"].items():
        edges = [told["bins"][0]["from"], *(one["to"] for one in told["bins"])]
        place = pd.cut(banks[name], edges, labels=False, include_lowest=True)
        table = pd.crosstab(place, banks["y"])
        assert table[1].tolist() == [one["positives"] for one in told["bins"]]
        assert table[0].tolist() == [one["negatives"] for one in told["bins"]]
        weight = np.log((table[0] / goods) / (table[1] / bads))
        same([one["woe"] for one in told["bins"]], weight.tolist())
        same(told["iv"], ((table[0] / goods - table[1] / bads) * weight).sum())


def test_banks_moments_correlation_and_inflation(credit: dict[str, Any], banks: pd.DataFrame) -> None:
    described(credit["statistics"]["columns"], banks)
    output = credit["output"]
    correlated(output["correlation"], banks)
    names = list(output["vif"]["columns"])
    inverse = np.linalg.inv(np.corrcoef(banks[names].to_numpy().T))
    wanted = dict(zip(names, np.diag(inverse), strict=True))
    for name, told in output["vif"]["columns"].items():
        assert told["vif"] == pytest.approx(wanted[name], rel=1e-7)  # inverting amplifies rounding


@pytest.mark.slow
def test_banks_over_the_network(credit: dict[str, Any], atoll_data: Path, tmp_path: Path) -> None:
    networked = run("credit-statistics", atoll_data / "default-credit-uci", tmp_path, transport="grpc")
    assert networked["output"] == credit["output"]
    assert networked["statistics"] == credit["statistics"]


# ---------------------------------------------------------------- four health offices


@pytest.fixture(scope="module")
def offices(atoll_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Their stores, with Shanghai's in a real PostgreSQL where one is installed."""
    out = tmp_path_factory.mktemp("offices")
    script = str(EXAMPLES / "epidemic-statistics" / "prepare.py")
    command = [sys.executable, script, str(atoll_data / "covid19-china-cities"), str(out)]
    with pytest.MonkeyPatch.context() as patch:
        if programs() is None:
            subprocess.run(command, check=True)
            yield out
            return
        with server() as database:
            patch.setenv("ATOLL_EXAMPLE_PASSWORD", database.password)
            subprocess.run([*command, "--postgresql", database.url], check=True)
            yield out


@pytest.fixture(scope="module")
def cases(atoll_data: Path) -> pd.DataFrame:
    """The four provinces' rows, pooled, prepared by hand."""
    table = pd.read_csv(atoll_data / "covid19-china-cities" / "china_national_province_city_daily.csv.gz")
    table = table[table["province"].isin(["上海市", "江苏省", "浙江省", "安徽省"]) & table["city"].notna()]
    table = table.sort_values(["province", "city", "date"]).reset_index(drop=True)
    by = ["province", "city"]
    for name in ("confirmed", "cured", "dead"):
        table[f"{name}_diff1"] = table.groupby(by)[name].diff()
    rolled = table.groupby(by)["confirmed_diff1"].rolling(7, min_periods=1).mean()
    table["confirmed_diff1_mean_7"] = rolled.reset_index(level=[0, 1], drop=True)
    table["date_month"] = pd.to_datetime(table["date"]).dt.month
    return table


@pytest.mark.parametrize("transport", ["local", pytest.param("grpc", marks=pytest.mark.slow)])
def test_offices_with_four_kinds_of_store(offices: Path, cases: pd.DataFrame, tmp_path: Path, transport: Any) -> None:
    result = run("epidemic-statistics", offices, tmp_path, offices / "sites.yaml", transport)
    described(result["statistics"]["columns"], cases)
    output = result["output"]
    quantiles(output["quantiles"], cases)
    correlated(output["correlation"], cases)
    grouped(output["group_by"], cases)
    months = output["frequency"]["columns"]["date_month"]
    assert months["counts"] == cases["date_month"].value_counts().sort_index().tolist()
    assert result["preparation"]["rows"] == len(cases)
    assert result["preparation"]["dropped"] == {"duplicate rows": 120}


# ---------------------------------------------------------------- twelve stations


@pytest.fixture(scope="module")
def days(atoll_data: Path) -> pd.DataFrame:
    """All stations' days, pooled, prepared by hand in local time."""
    made = []
    for station in STATIONS:
        table = pd.read_csv(atoll_data / "beijing-air-quality" / f"PRSA_Data_{station}_20130301-20170228.csv.gz")
        table.index = pd.DatetimeIndex(pd.to_datetime(table[["year", "month", "day", "hour"]]))
        how: dict[str, str] = dict.fromkeys(
            ("PM2.5", "PM10", "SO2", "NO2", "CO", "TEMP", "PRES", "DEWP", "WSPM"), "mean"
        )
        daily = table.resample("1D").agg({**how, "O3": "max"})
        daily["RAIN"] = table["RAIN"].resample("1D").sum(min_count=1)
        daily["time_month"], daily["weekend"] = daily.index.month, (daily.index.day_of_week >= 5).astype(int)
        daily["PM2.5_lag1"] = daily["PM2.5"].shift(1)
        made.append(daily)
    return pd.concat(made, ignore_index=True)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_stations_on_one_time_grid(atoll_data: Path, days: pd.DataFrame, tmp_path: Path, transport: Any) -> None:
    result = run("air-quality", atoll_data / "beijing-air-quality", tmp_path, transport=transport)
    pooled = days.rename(columns={"weekend": "time_is_weekend"})
    described(result["statistics"]["columns"], pooled)
    output = result["output"]
    quantiles(output["quantiles"], pooled)
    correlated(output["correlation"], pooled)
    grouped(output["group_by"], pooled)
    week, weekend = (pooled.loc[pooled["time_is_weekend"] == day, "PM2.5"].dropna() for day in (0, 1))
    wanted = stats.ttest_ind(week, weekend, equal_var=False)
    assert abs(output["ttest"]["t"]) == pytest.approx(abs(wanted.statistic), rel=1e-8)
    same(output["ttest"]["p_value"], wanted.pvalue, scale=1.0)
