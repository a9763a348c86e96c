"""Make four health offices out of the public series: each with a store, names and date formats of its own.

    python examples/epidemic-statistics/prepare.py DATA OUT [--postgresql URL]

DATA is the folder with china_national_province_city_daily.csv.gz. OUT gets each office's own table and
sites.yaml. Shanghai's office keeps its table in the PostgreSQL database at URL (its password in
$ATOLL_EXAMPLE_PASSWORD), or in an SQLite file where there is none; Jiangsu's in a DuckDB file; Zhejiang's is a
CSV file in GBK with Chinese names and some rows exported twice; Anhui's a CSV file with day/month/year and
thousands separators. All values are those of the source.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
from pathlib import Path

import duckdb
import pandas as pd
import yaml

FILE = "china_national_province_city_daily.csv.gz"
COUNTS = ["confirmed", "suspected", "cured", "dead"]
CHINESE = {"date": "日期", "city": "城市", "confirmed": "确诊", "suspected": "疑似", "cured": "治愈", "dead": "死亡"}
TWICE = 120
"""Rows that Zhejiang's export holds twice."""


def read(data: Path, province: str) -> pd.DataFrame:
    """A province's rows by city and day."""
    table = pd.read_csv(data / FILE, usecols=["date", "province", "city", *COUNTS])
    table = table[(table["province"] == province) & table["city"].notna()]
    return table[["date", "city", *COUNTS]].reset_index(drop=True)


def shanghai(table: pd.DataFrame, out: Path, url: str) -> dict[str, object]:
    if not url:
        with sqlite3.connect(out / "shanghai.sqlite") as file:
            table.rename(columns={"date": "report_date"}).to_sql("cases", file, index=False, if_exists="replace")
        return {"url": "sqlite:///shanghai.sqlite", "table": "cases", "columns": {"date": "report_date"}}
    import psycopg

    with psycopg.connect(url, password=os.environ.get("ATOLL_EXAMPLE_PASSWORD")) as database:
        database.execute("DROP TABLE IF EXISTS cases")
        numbers = ", ".join(f"{name} integer" for name in COUNTS)
        database.execute(f"CREATE TABLE cases (report_date date, city text, {numbers}, reporter text)")  # type: ignore[arg-type]
        with database.cursor().copy("COPY cases FROM STDIN") as copy:
            for row in table.itertuples(index=False):
                copy.write_row((*row, "office"))
    return {
        "url": url, "table": "cases", "columns": {"date": "report_date"}, "password_env": "ATOLL_EXAMPLE_PASSWORD",
    }  # fmt: skip


def jiangsu(table: pd.DataFrame, out: Path) -> dict[str, object]:
    (out / "jiangsu.duckdb").unlink(missing_ok=True)
    with duckdb.connect(str(out / "jiangsu.duckdb")) as file:
        file.register("given", table.assign(date=pd.to_datetime(table["date"])))
        file.execute("CREATE TABLE cases AS SELECT CAST(date AS DATE) AS date, * EXCLUDE (date) FROM given")
    return {"url": "duckdb:///jiangsu.duckdb", "table": "cases"}


def zhejiang(table: pd.DataFrame, out: Path) -> dict[str, object]:
    dates = pd.to_datetime(table["date"])
    table = table.assign(date=dates.dt.strftime("%Y年%m月%d日"))
    table = pd.concat([table, table.iloc[:TWICE]])
    table.rename(columns=CHINESE).to_csv(out / "zhejiang.csv", index=False, encoding="gb18030")
    return {"path": "zhejiang.csv", "encoding": "gb18030"}


def anhui(table: pd.DataFrame, out: Path) -> dict[str, object]:
    table = table.assign(date=pd.to_datetime(table["date"]).dt.strftime("%d/%m/%Y"))
    for name in COUNTS:
        table[name] = table[name].map("{:,}".format)
    table.rename(columns=str.upper).to_csv(out / "anhui.csv", index=False, sep=";", encoding="utf-8-sig")
    return {"path": "anhui.csv", "separator": ";"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("data", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--postgresql", default="", metavar="URL")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    sites = {
        "shanghai": shanghai(read(given.data, "上海市"), given.out, given.postgresql),
        "jiangsu": jiangsu(read(given.data, "江苏省"), given.out),
        "zhejiang": zhejiang(read(given.data, "浙江省"), given.out),
        "anhui": anhui(read(given.data, "安徽省"), given.out),
    }
    (given.out / "sites.yaml").write_text(yaml.safe_dump(sites, allow_unicode=True, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
