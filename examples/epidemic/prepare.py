"""Make four regions' own stores out of the public series, and their case lists.

    python examples/epidemic/prepare.py DATA OUT [--until DAY] [--cases N] [--seed N] [--postgresql URL]

DATA is the folder with china_national_province_city_daily.csv.gz. OUT gets each region's own table of the series
(cumulative counts by city and day, as reported: with corrections downward and missing days), sites.yaml, and under
cases/ each region's case list out of the project's generator, with a sites.yaml of its own. --until ends the series
with a day, so that the next day can be made to come. Shanghai keeps its series in the PostgreSQL database at URL (its
password in $ATOLL_EXAMPLE_PASSWORD), or in an SQLite file where there is none; Jiangsu in a DuckDB file; Zhejiang's is
a CSV file in GBK with Chinese names, whose last days were exported twice; Anhui's a CSV file with day/month/year and
thousands separators. What is public stands beside a region's own counts in each: new cases of Hubei and of the whole
country that day, and the region's resident population (census of 2020).
"""

from __future__ import annotations

import argparse
import os
import sqlite3
from pathlib import Path

import duckdb
import pandas as pd
import yaml

from atoll.blueprints.epidemic.generator import write as write_cases

FILE = "china_national_province_city_daily.csv.gz"
COUNTS = ["confirmed", "cured", "dead"]
PUBLIC = ["hubei_new", "national_new", "population"]
REGIONS = {
    "shanghai": ("上海市", 24_870_895), "jiangsu": ("江苏省", 84_748_016),
    "zhejiang": ("浙江省", 64_567_588), "anhui": ("安徽省", 61_027_171),
}  # fmt: skip
"""Province and resident population: National Bureau of Statistics, Seventh National Population Census (2020), no. 3."""
CHINESE = {
    "date": "日期", "city": "城市", "confirmed": "累计确诊", "cured": "累计治愈", "dead": "累计死亡",
    "hubei_new": "湖北新增", "national_new": "全国新增", "population": "常住人口",
}  # fmt: skip
TWICE = 60
"""Rows at its end that Zhejiang's export holds twice."""


def read(data: Path, until: str) -> pd.DataFrame:
    """The whole public series until a day ("": all)."""
    table = pd.read_csv(data / FILE, usecols=["date", "province", "city", *COUNTS])
    return table[table["date"] <= until] if until else table


def rise(table: pd.DataFrame) -> pd.Series[float]:
    """By how much a cumulative count by date rose since the day before; a correction downward counts as none."""
    return table.set_index("date")["confirmed"].sort_index().diff().clip(lower=0)


def public(table: pd.DataFrame) -> pd.DataFrame:
    """What everybody knows, by day: new cases of Hubei and of the country."""
    nation = table[table["province"].isna()].drop_duplicates("date")
    hubei = table[(table["province"] == "湖北省") & table["city"].isna()].drop_duplicates("date")
    return pd.DataFrame({"hubei_new": rise(hubei), "national_new": rise(nation)}).fillna(0).astype(int)


def of_region(table: pd.DataFrame, known: pd.DataFrame, region: str) -> pd.DataFrame:
    """A region's rows by city and day, with what is public."""
    province, population = REGIONS[region]
    own = table[(table["province"] == province) & table["city"].notna()]
    own = own[["date", "city", *COUNTS]].join(known, on="date").assign(population=population)
    return own.reset_index(drop=True)


def shanghai(table: pd.DataFrame, out: Path, url: str) -> dict[str, object]:
    names = {"date": "report_date", "city": "district"}
    told = {"table": "series", "columns": names}
    if not url:
        with sqlite3.connect(out / "shanghai.sqlite") as file:
            table.rename(columns=names).to_sql("series", file, index=False, if_exists="replace")
        return {"url": "sqlite:///shanghai.sqlite", **told}
    import psycopg

    with psycopg.connect(url, password=os.environ.get("ATOLL_EXAMPLE_PASSWORD")) as database:
        numbers = ", ".join(f"{name} integer" for name in [*COUNTS, *PUBLIC])
        database.execute("DROP TABLE IF EXISTS series")
        database.execute(f"CREATE TABLE series (report_date date, district text, {numbers})")  # type: ignore[arg-type]
        with database.cursor().copy("COPY series FROM STDIN") as copy:
            for row in table.itertuples(index=False):
                copy.write_row(tuple(row))
    return {"url": url, **told, "password_env": "ATOLL_EXAMPLE_PASSWORD"}


def jiangsu(table: pd.DataFrame, out: Path) -> dict[str, object]:
    (out / "jiangsu.duckdb").unlink(missing_ok=True)
    with duckdb.connect(str(out / "jiangsu.duckdb")) as file:
        file.register("given", table.assign(date=pd.to_datetime(table["date"])))
        file.execute("CREATE TABLE series AS SELECT CAST(date AS DATE) AS date, * EXCLUDE (date) FROM given")
    return {"url": "duckdb:///jiangsu.duckdb", "table": "series"}


def zhejiang(table: pd.DataFrame, out: Path) -> dict[str, object]:
    table = table.assign(date=pd.to_datetime(table["date"]).dt.strftime("%Y年%m月%d日"))
    table = pd.concat([table, table.iloc[-TWICE:]])
    table.rename(columns=CHINESE).to_csv(out / "zhejiang.csv", index=False, encoding="gb18030")
    return {"path": "zhejiang.csv", "encoding": "gb18030"}


def anhui(table: pd.DataFrame, out: Path) -> dict[str, object]:
    table = table.assign(date=pd.to_datetime(table["date"]).dt.strftime("%d/%m/%Y"))
    for name in [*COUNTS, *PUBLIC]:
        table[name] = table[name].map("{:,}".format)
    table.rename(columns=str.upper).to_csv(out / "anhui.csv", index=False, sep=";", encoding="utf-8-sig")
    return {"path": "anhui.csv", "separator": ";"}


def write_sites(path: Path, sites: dict[str, dict[str, object]]) -> None:
    path.write_text(yaml.safe_dump(sites, allow_unicode=True, sort_keys=False), encoding="utf-8")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("data", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--until", default="", metavar="DAY", help="the last day of the series")
    arguments.add_argument("--cases", type=int, default=20_000, help="rows of a region's case list (0: none)")
    arguments.add_argument("--seed", type=int, default=7)
    arguments.add_argument("--postgresql", default="", metavar="URL")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    table = read(given.data, given.until)
    known = public(table)
    own = {region: of_region(table, known, region) for region in REGIONS}
    sites = {
        "shanghai": shanghai(own["shanghai"], given.out, given.postgresql),
        "jiangsu": jiangsu(own["jiangsu"], given.out),
        "zhejiang": zhejiang(own["zhejiang"], given.out),
        "anhui": anhui(own["anhui"], given.out),
    }
    write_sites(given.out / "sites.yaml", sites)
    if given.cases:
        write_cases(given.out / "cases", given.seed, rows=given.cases)


if __name__ == "__main__":
    main()
