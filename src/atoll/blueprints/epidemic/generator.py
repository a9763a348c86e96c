"""Four regional offices' case tables, as they would be exported, with the truth beside them.

The epidemic is that of :mod:`atoll.blueprints.epidemic.outbreak`, the records those of
:mod:`atoll.blueprints.epidemic.line_list`. This file has a scenario of the Yangtze delta and makes of it the files that
four offices would export: one in the contract's form, three with names, codes, units, date formats and repeated rows of
their own, for the recipe to mend.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from atoll.blueprints.epidemic.line_list import Columns, line_list
from atoll.blueprints.epidemic.outbreak import NEVER, Outbreak, Region, Scenario, simulate

_M = 1e6
YANGTZE_DELTA = Scenario(
    regions=(
        Region("shanghai", {"shanghai": 24.87 * _M}, 75, ascertainment=0.7, negatives=1.6, mean_age=46),
        Region(
            "jiangsu",
            {
                "suzhou": 12.75 * _M, "nanjing": 9.31 * _M, "xuzhou": 9.08 * _M, "nantong": 7.73 * _M,
                "wuxi": 7.46 * _M, "yancheng": 6.71 * _M, "changzhou": 5.28 * _M, "suqian": 4.99 * _M,
                "lianyungang": 4.60 * _M, "yangzhou": 4.56 * _M, "huaian": 4.56 * _M, "taizhou_js": 4.51 * _M,
                "zhenjiang": 3.21 * _M,
            },
            60, ascertainment=0.62, report_days=4.2, negatives=1.0, mean_age=44,
        ),
        Region(
            "zhejiang",
            {
                "hangzhou": 11.94 * _M, "wenzhou": 9.57 * _M, "ningbo": 9.40 * _M, "jinhua": 7.05 * _M,
                "taizhou_zj": 6.62 * _M, "jiaxing": 5.40 * _M, "shaoxing": 5.27 * _M, "huzhou": 3.37 * _M,
                "lishui": 2.51 * _M, "quzhou": 2.28 * _M, "zhoushan": 1.16 * _M,
            },
            95, ascertainment=0.66, negatives=1.2, mean_age=42,
        ),
        Region(
            "anhui",
            {
                "hefei": 9.37 * _M, "fuyang": 8.20 * _M, "bozhou": 5.00 * _M, "luan": 4.39 * _M, "suzhou_ah": 5.32 * _M,
                "anqing": 4.17 * _M, "chuzhou": 3.99 * _M, "wuhu": 3.64 * _M, "bengbu": 3.30 * _M, "huainan": 3.03 * _M,
                "xuancheng": 2.50 * _M, "maanshan": 2.16 * _M, "huaibei": 1.97 * _M, "chizhou": 1.34 * _M,
                "huangshan": 1.33 * _M, "tongling": 1.31 * _M,
            },
            70, ascertainment=0.55, report_days=5.2, negatives=0.7, mean_age=40,
        ),
    ),
    start="2020-01-05", days=100, imports=(0, 27), contact=((0, 1.0), (14, 0.62), (22, 0.28)),
)  # fmt: skip
"""Four regions (residents of their cities: 2020 census), importations until the outer world is closed off, and two
steps down of contacts; an invented course, not that of any real epidemic."""

SCHEMA: Mapping[str, Mapping[str, Any]] = {
    "report_date": {"dtype": "date", "role": "time", "grain": "1d", "missing": "forbid"},
    "city": {"dtype": "text", "missing": "forbid"},
    "x0": {"dtype": "text", "role": "entity", "missing": "forbid", "description": "case id"},
    "x1": {
        "values": [0, 1, 2],
        "description": "status at first: 0 no symptoms, 1 suspected, 2 diagnosed clinically",
    },
    "x2": {"values": [0, 1], "description": "health worker"},
    "x3": {"values": [0, 1], "description": "sex: 0 female, 1 male"},
    "x4": {"dtype": "real", "unit": "year", "range": [0, 120], "description": "age"},
    "x5": {"dtype": "date", "grain": "1d", "description": "onset of symptoms"},
    "x6": {"dtype": "real", "unit": "°C", "range": [34, 43], "description": "maximum temperature"},
    "x7": {"dtype": "real", "unit": "10⁹/L", "range": [0, 50], "description": "white cells"},
    "x8": {"dtype": "real", "unit": "10⁹/L", "range": [0, 15], "description": "lymphocytes"},
    "x9": {"values": [0, 1, 2], "description": "chest imaging: 0 normal, 1 one side abnormal, 2 both"},
    "x10": {"values": [0, 1], "description": "history: a coexisting disorder"},
    "x11": {"values": [0, 1, 2], "description": "blood sample, first test: 0 not taken, 1 negative, 2 positive"},
    "x12": {"values": [0, 1, 2], "description": "throat sample, first test, as x11"},
    "x13": {"values": [0, 1, 2], "description": "bronchial sample, first test, as x11"},
    "x14": {
        "values": [0, 1, 2, 3],
        "description": "link to other cases: 0 none known, 1 in the region, 2 in another region, 3 from outside",
    },
    "link_case": {
        "dtype": "text",
        "role": "ignore",
        "description": "x0 of the case it is linked to",
    },
    "delay_days": {"dtype": "real", "unit": "day", "range": [0, 60], "description": "from onset to report"},
    "confirmed": {"values": [0, 1], "role": "label", "missing": "forbid", "description": "by the last test"},
    "severe": {"values": [0, 1], "role": "label", "missing": "forbid", "description": "severe course"},
}
"""The data contract of the case tables (the further laboratory values come to it)."""
CLASSES = {
    **dict.fromkeys(("x0", "link_case"), "identifier"),
    "city": "trajectory",
    **dict.fromkeys(("x3", "x4"), "demographic"),
    **dict.fromkeys(("x1", "x2", *(f"x{n}" for n in range(5, 14)), "confirmed", "severe", "delay_days"), "clinical"),
}
"""What kind of data each column is; a region's policy may keep kinds from every program: withhold: [identifier]."""


def schema(extra: int = 0) -> dict[str, Any]:
    """The data contract, as schema.yaml has it."""
    columns: dict[str, dict[str, Any]] = {name: {"dtype": "integer", **column} for name, column in SCHEMA.items()}
    for n in range(extra):
        columns[f"x{15 + n}"] = {"dtype": "real", "range": [-10, 10], "description": "laboratory value, standardised"}
    for name, column in columns.items():
        if kind := CLASSES.get(name, "clinical" if name not in SCHEMA else ""):
            column["data_class"] = kind
    return {"name": "epidemic-cases", "version": "1", "max_rows": 1_000_000, "columns": columns}


_WORDS: Mapping[str, Mapping[str, str]] = {
    "x1": {"无症状": "0", "疑似病例": "1", "临床诊断": "2"},
    "x2": {"否": "0", "是": "1"},
    "x3": {"女": "0", "男": "1"},
    "x9": {"正常": "0", "单侧异常": "1", "双侧异常": "2"},
    "x10": {"无": "0", "有": "1"},
    "x11": {"未采": "0", "阴性": "1", "阳性": "2"},
    "x12": {"未采": "0", "阴性": "1", "阳性": "2"},
    "x13": {"未采": "0", "阴性": "1", "阳性": "2"},
    "x14": {"不明": "0", "本省": "1", "外省": "2", "输入": "3"},
}
_OLD_CODES: Mapping[str, Mapping[str, str]] = {
    "x3": {"F": "0", "M": "1"},
    "x9": {"normal": "0", "unilateral": "1", "bilateral": "2"},
    "x12": {"N/T": "0", "NEG": "1", "POS": "2"},
}
_CITIES = dict(
    zip(
        ("苏州市", "南京市", "徐州市", "南通市", "无锡市", "盐城市", "常州市", "宿迁市", "连云港市", "扬州市", "淮安市",
         "泰州市", "镇江市"),
        YANGTZE_DELTA.regions[1].cities, strict=True,
    )
)  # fmt: skip
_CHINESE = {
    "report_date": "报告日期", "city": "城市", "x0": "病例编号", "x1": "病例分类", "x2": "医务人员", "x3": "性别",
    "x4": "年龄", "x5": "发病日期", "x6": "最高体温", "x7": "白细胞", "x8": "淋巴细胞", "x9": "胸部影像",
    "x10": "基础疾病", "x11": "血液标本", "x12": "咽拭子", "x13": "支气管标本", "x14": "病例关联",
}  # fmt: skip
_FAHRENHEIT = (5 / 9, -160 / 9)


def recipe() -> dict[str, Any]:
    """The cleaning that makes all four offices' tables keep the contract, as recipe.yaml has it."""
    codes: dict[str, dict[str, str]] = {}
    for words in (_WORDS, _OLD_CODES):
        for name, known in words.items():
            codes[name] = {**codes.get(name, {}), **known}
    both: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, known in codes.items():
        both.setdefault(tuple(known.items()), []).append(name)
    clean: list[dict[str, Any]] = [
        {"step": "rename", "columns": {name: [theirs] for name, theirs in _CHINESE.items()}},
        {"step": "text", "columns": ["x0", "city"], "width": "half", "remove": " "},
        {"step": "text", "columns": ["x0"], "case": "upper"},
        {"step": "dates", "columns": ["report_date", "x5"], "formats": ["%Y-%m-%d", "%Y年%m月%d日", "%d/%m/%Y"]},
        {"step": "units", "column": "x6", "to": "°C", "from": {"°F": list(_FAHRENHEIT)}},
        {"step": "codes", "columns": ["city"], "map": _CITIES},
        *({"step": "codes", "columns": names, "map": dict(known)} for known, names in both.items()),
        {"step": "deduplicate", "key": ["x0"], "latest": "report_date"},
    ]
    return {"version": "1", "clean": clean}


def write(
    folder: Path | str,
    seed: int,
    scenario: Scenario = YANGTZE_DELTA,
    rows: int | None = None,
    extra: int = 0,
    dirty: bool = True,
) -> Outbreak:
    """Simulate *scenario* and write what its offices and we know into *folder*; returns the epidemic.

    REGION.csv for each region (three of them, by their place, in forms of their own unless *dirty* is false),
    schema.yaml, recipe.yaml (the cleaning) and sites.yaml; truth/infections.csv (everybody infected, and by whom),
    truth/links.csv (who infected whom across regions, of the cases in the tables), truth/daily.csv (infections, onsets
    and reports by region and day) and truth/scenario.json. rows: at most so many records of each region, drawn at
    random. extra: laboratory values x15 … (75 for 90 columns). The same arguments write the same bytes.
    """
    folder = Path(folder)
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    outbreak = simulate(scenario, seed)
    table = line_list(outbreak, seed, extra)
    rng = np.random.default_rng([seed, 3])
    start, sites = np.datetime64(scenario.start, "D"), {}
    kept = np.zeros(len(table["x0"]), bool)
    for place, region in enumerate(scenario.regions):
        here = np.flatnonzero(table["region"] == place)
        if rows is not None and len(here) > rows:
            here = np.sort(rng.choice(here, rows, replace=False))
        kept[here] = True
        cells = _cells({name: column[here] for name, column in table.items()}, scenario, extra)
        form = _FORMS[place % len(_FORMS)] if dirty else _in_contract
        cells, declared = form(_Export(cells, rng, start, start + scenario.days))
        _save(cells, folder / f"{region.name}.csv", declared.get("encoding", "utf-8"))
        sites[region.name] = {"path": f"{region.name}.csv", **declared}
    for name, content in {"schema": schema(extra), "recipe": recipe(), "sites": sites}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), "utf-8")
    _write_truth(folder / "truth", outbreak, table, kept)
    return outbreak


Cells = dict[str, NDArray[Any]]
"""Columns as text; "" is missing."""


def _cells(table: Columns, scenario: Scenario, extra: int) -> Cells:
    """The contract's columns as text."""
    cells: Cells = {}
    for name, column in schema(extra)["columns"].items():
        values = table[name]
        if name == "city":
            cells[name] = np.array(scenario.city_names(), object)[values]
        elif values.dtype.kind == "M":
            cells[name] = _dates(values, "%Y-%m-%d")
        elif values.dtype == object:
            cells[name] = values.copy()
        else:
            digits = 0 if "values" in column or name in ("x4", "delay_days") else 3
            text = [f"{v:.{digits}f}" for v in np.nan_to_num(values).tolist()]
            tidy = [t.rstrip("0").rstrip(".") for t in text] if digits else text
            cells[name] = np.where(np.isnan(values), "", np.array(tidy, object))
    return cells


def _dates(days: NDArray[Any], form: str) -> NDArray[Any]:
    """Days as text; NaT as ""."""
    known, place = np.unique(days, return_inverse=True)
    text = [day.strftime(form) if day is not None else "" for day in known.astype("datetime64[D]").tolist()]
    return np.array(text, object)[place]


@dataclass(frozen=True)
class _Export:
    """What an office exports: the contract's cells, of days from *start* to before *end*."""

    cells: Cells
    rng: np.random.Generator
    start: np.datetime64
    end: np.datetime64


def _in_contract(export: _Export) -> tuple[Cells, dict[str, Any]]:
    return export.cells, {}


def _in_words(export: _Export) -> tuple[Cells, dict[str, Any]]:
    """Chinese headings, words and city names in GB 18030; ids in lower case with a space."""
    chinese = {ours: theirs for theirs, ours in _CITIES.items()}
    cells = {**export.cells, **{name: _mapped(export.cells[name], words) for name, words in _WORDS.items()}}
    cells["city"] = np.array([chinese.get(name, name) for name in cells["city"]], object)
    cells["x0"] = np.array([f"{i[:2].lower()} {i[2:]}" for i in cells["x0"]], object)
    for name in ("report_date", "x5"):
        cells[name] = _dates(_parsed(cells[name]), "%Y年%m月%d日")
    return {_CHINESE.get(name, name): column for name, column in cells.items()}, {"encoding": "gb18030"}


def _repeated(export: _Export) -> tuple[Cells, dict[str, Any]]:
    """Some rows twice; for some patients an earlier, less complete report too; day/month/year."""
    rng, size = export.rng, len(export.cells["x0"])
    onset, report = _parsed(export.cells["x5"]), _parsed(export.cells["report_date"])
    before = report - rng.integers(1, 5, size)
    first = (rng.random(size) < 0.05) & (before >= np.where(np.isnat(onset), export.start, onset))
    order = np.concatenate([np.flatnonzero(first), np.arange(size), np.flatnonzero(rng.random(size) < 0.02)])
    early = np.arange(len(order)) < first.sum()
    cells = {name: column[order] for name, column in export.cells.items()}
    for name in ("x7", "x8", "x9"):
        cells[name] = np.where(early, "", cells[name])
    cells["report_date"] = _dates(np.where(early, before[order], report[order]), "%d/%m/%Y")
    cells["x5"] = _dates(onset[order], "%d/%m/%Y")
    return cells, {}


def _late(export: _Export) -> tuple[Cells, dict[str, Any]]:
    """Some reports 5 to 15 days late (or not yet there), another code list in the first half, degrees Fahrenheit."""
    rng, cells = export.rng, dict(export.cells)
    report = _parsed(cells["report_date"])
    report += np.where(rng.random(len(report)) < 0.06, rng.integers(5, 16, len(report)), 0)
    cells["report_date"] = _dates(report, "%Y-%m-%d")
    old = report < export.start + (export.end - export.start) // 2
    for name, words in _OLD_CODES.items():
        cells[name] = np.where(old, _mapped(cells[name], words), cells[name])
    factor, offset = _FAHRENHEIT
    cells["x6"] = np.array([f"{(float(c) - offset) / factor:.2f}" if c else "" for c in cells["x6"]], object)
    order = np.argsort(report, kind="stable")
    order = order[report[order] < export.end]
    return {name: column[order] for name, column in cells.items()}, {"units": {"x6": "°F"}}


_FORMS: tuple[Callable[[_Export], tuple[Cells, dict[str, Any]]], ...] = (_in_contract, _in_words, _repeated, _late)


def _mapped(column: NDArray[Any], words: Mapping[str, str]) -> NDArray[Any]:
    """Contract codes as an office writes them."""
    theirs = {code: word for word, code in words.items()}
    return np.array([theirs.get(cell, cell) for cell in column], object)


def _parsed(column: NDArray[Any]) -> NDArray[Any]:
    return np.array([cell or "NaT" for cell in column], "datetime64[D]")


def _save(cells: Cells, path: Path, encoding: str = "utf-8") -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(cells)
    writer.writerows(zip(*(column.tolist() for column in cells.values()), strict=True))
    path.write_bytes(text.getvalue().encode(encoding))


def _write_truth(folder: Path, outbreak: Outbreak, table: Columns, kept: NDArray[np.bool_]) -> None:
    scenario = outbreak.scenario
    regions = np.array([region.name for region in scenario.regions], object)
    ids = np.full(len(outbreak), "", object)
    listed = kept & (table["person"] >= 0)
    ids[table["person"][listed]] = table["x0"][listed]
    start = np.datetime64(scenario.start, "D")

    def day(column: NDArray[Any]) -> NDArray[Any]:
        seen = column < NEVER
        return _dates(np.where(seen, start + np.where(seen, column, 0), np.datetime64("NaT")), "%Y-%m-%d")

    region = regions[outbreak.region()]
    events = ("infected", "infectious", "onset", "reported")
    _save(
        {
            "person": np.arange(len(outbreak)), "infector": outbreak.infector, "region": region,
            "city": np.array(scenario.city_names(), object)[outbreak.city], "x0": ids,
            **{name: day(getattr(outbreak, name)) for name in events},
            "symptomatic": outbreak.symptomatic.astype(int), "traced": outbreak.traced.astype(int),
        },
        folder / "infections.csv",
    )  # fmt: skip
    whom = np.flatnonzero(outbreak.infector >= 0)
    who = outbreak.infector[whom]
    across = (region[who] != region[whom]) & (ids[who] != "") & (ids[whom] != "")
    who, whom = who[across], whom[across]
    links = {"infector": ids[who], "infector_region": region[who], "case": ids[whom], "case_region": region[whom]}
    _save({**links, "traced": outbreak.traced[whom].astype(int)}, folder / "links.csv")
    days = np.repeat(_dates(start + np.arange(scenario.days), "%Y-%m-%d"), len(regions))
    counts = {name: outbreak.daily(name).ravel() for name in events}
    _save({"day": days, "region": np.tile(regions, scenario.days), **counts}, folder / "daily.csv")
    told = {name: value for name, value in vars(replace(scenario, mobility=())).items() if name != "regions"}
    told["regions"] = [vars(region) for region in scenario.regions]
    (folder / "scenario.json").write_text(json.dumps(told, indent=1), "utf-8")
