"""The epidemic sections: what they say, what they leave out, and how they look in a real browser."""

from __future__ import annotations

import copy
import datetime as dt
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from atoll.report import epidemic
from atoll.report.epidemic_plots import SHAPES, risk_map, shape_of
from atoll.report.html import page, write_report

DAY = dt.date(2020, 2, 1)
REGIONS = ("shanghai", "jiangsu", "zhejiang", "anhui")
DAYS = [str(DAY - dt.timedelta(n)) for n in range(11, -1, -1)]


def intervals(rows: list[tuple[Any, float]], key: str) -> list[dict[str, Any]]:
    return [{key: at, "mean": mean, "low": 0.7 * mean, "high": 1.5 * mean} for at, mean in rows]


@pytest.fixture
def found() -> dict[str, Any]:
    """What the daily job returns, whole."""
    regions: dict[str, Any] = {
        name: {
            "risk": 0.1 + 0.2 * i, "by_day": [{"day": d, "risk": (0.1 + 0.2 * i) * n / 11} for n, d in enumerate(DAYS)],
            "forecast": intervals([(1, 20.0 + i), (7, 150.0 + i)], "days"), "alarm": i > 1,
            "alarm_since": "2020-01-24" if i > 1 else None, "level": "orange" if i > 1 else "yellow",
        }
        for i, name in enumerate(REGIONS)
    }  # fmt: skip
    return {
        "day": str(DAY), "partial": False, "absent": [], "late": [], "window_days": 7, "ceiling_per_100k": 0.2,
        "joint": {"risk": 0.36, "sum": 1.6, "by_day": [{"day": d, "risk": 0.03 * n} for n, d in enumerate(DAYS)],
                  "population": 2.35e8, "level": "orange", "action": "trace contacts within 24 hours"},
        "regions": regions, "incidence": [{"day": d, "cases": 20.0 * n} for n, d in enumerate(DAYS)],
        "forecast": {
            "learned": intervals([(1, 230.0), (3, 700.0), (7, 1610.0), (14, 2400.0)], "days"),
            "seir": intervals([(str(DAY + dt.timedelta(n)), 200.0 + n) for n in range(1, 15)], "day"),
        },
        "reproduction": intervals([(d, 2.4 - 0.1 * n) for n, d in enumerate(DAYS)], "day"),
        "drivers": [{"feature": "new_mean7", "importance": 0.6}, {"feature": "hubei_lag3", "importance": 0.3},
                    {"feature": "day", "importance": 0.1}],
        "alarms": {"regions": 2, "cities": 9},
        "interventions": [
            {"name": "as it is", "effect": "no change", "cases": 2400, "low": 1700, "high": 3600, "averted": 0},
            {"name": "closing", "effect": "contacts −40 %", "cases": 1200, "low": 900, "high": 1700, "averted": 1200},
        ],
        "links": {"shared": None, "note": "Links across regions need private matching."},
    }  # fmt: skip


@pytest.fixture
def study(model_study: Any, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    result, details = model_study
    kept = {key: value for key, value in result.items() if key != "model"}
    kept |= {"study": "delta", "program": "epidemic.daily", "metrics": {"federated": {}, "per_site": {}}}
    return {**kept, "sites": {name: {"rows": 700} for name in REGIONS}, "output": {"epidemic": found}}, details


def words(made: Any) -> str:
    assert made is not None
    return str(made.html())


def test_the_page_says_risk_level_and_action(study: Any, closed_world: Any) -> None:
    seen = closed_world(page(*study))
    text = " ".join(" ".join(seen.text).split())
    assert (
        "On 1 February 2020 the joint risk of shanghai, jiangsu, zhejiang and anhui is 0.36 of 1, level orange" in text
    )
    assert "Trace contacts within 24 hours." in text
    assert seen.anchors()[:4] == ["risk", "outlook", "drivers", "interventions"]
    assert "Partial" not in text and "Late" not in text and "withheld" not in text


def test_sums_of_seir_stand_beside_the_learned_forecast(study: Any) -> None:
    told = words(epidemic.outlook(*study))
    summed = sum(200 + n for n in range(1, 8))
    assert "1,610 (1,127 to 2,415)" in told and f"{summed:,} (" in told
    assert "R_t" in told and "the epidemic is growing, though the interval holds 1" in told
    study[0]["output"]["epidemic"]["incidence"][-1]["cases"] = (
        None  # withheld: the sums are from that day on all the same
    )
    assert f"{summed:,} (" in words(epidemic.outlook(*study))


def test_what_is_partial_late_or_withheld_is_said(study: Any) -> None:
    found = study[0]["output"]["epidemic"]
    found |= {"partial": True, "absent": ["anhui"], "late": ["zhejiang"]}
    del found["regions"]["anhui"]
    found["regions"]["jiangsu"] = None
    told = words(epidemic.risk(*study))
    assert "anhui is not counted" in told and "zhejiang has no data of this day yet" in told
    assert "jiangsu shares no values of its own" in told
    assert "jiangsu withheld" in told and "anhui absent" in told  # the map's words, for who cannot see it
    assert "Partial: without anhui." in epidemic.headline(study[0])


def test_what_is_wrong_at_a_region_is_said_with_its_remedy(study: Any) -> None:
    found = study[0]["output"]["epidemic"]
    found["problems"] = [{"site": "anhui", "code": "epidemic.no-rows", "message": "no row", "remedy": "look at it"}]
    found["alarms"] |= {"joint": True, "of_cities": 69}
    told = words(epidemic.risk(*study))
    assert "anhui: no row. Remedy: look at it." in told and "epidemic.no-rows" in told
    assert "9 of 69" in told and "Joint alarm" in told
    found |= {"seir_note": "there are no cases", "forecast": {**found["forecast"], "seir": []}}
    assert "says nothing today: there are no cases" in words(epidemic.outlook(*study))


def test_nobody_shares_its_own(study: Any) -> None:
    study[0]["output"]["epidemic"]["regions"] = dict.fromkeys(REGIONS)
    told = words(epidemic.risk(*study))
    assert "only sums over all of them were seen" in told
    assert "Map of risk" not in told and "Joint risk by day" in told


PARTS = (
    ("joint", "day"), ("regions", "incidence", "window_days"), ("forecast", "drivers", "alarms"),
    ("reproduction", "interventions", "links", "late"),
)  # fmt: skip


@pytest.mark.parametrize("gone", PARTS, ids=lambda parts: parts[0])
@pytest.mark.parametrize("how", ["missing", "none"])
def test_any_part_may_be_missing(study: Any, closed_world: Any, gone: tuple[str, ...], how: str) -> None:
    found = study[0]["output"]["epidemic"]
    for one in gone:
        found.pop(one)
        found |= {} if how == "missing" else {one: None}
    closed_world(page(*study))


def test_numbers_that_are_none_or_words(study: Any, closed_world: Any) -> None:
    found = study[0]["output"]["epidemic"]
    for one in (found["joint"], found["regions"]["anhui"], *found["interventions"], *found["drivers"]):
        for key, value in one.items():
            one[key] = float("nan") if isinstance(value, float | int) else None
    found["incidence"] = [{"day": "no day", "cases": 1}, {"day": DAYS[0], "cases": None}, 3]
    found["forecast"]["seir"][2] = {"day": None}
    closed_world(page(*study))


def test_nothing_of_it_in_other_studies(model_study: Any) -> None:
    makers = (epidemic.risk, epidemic.outlook, epidemic.drivers, epidemic.interventions)
    assert [maker(*model_study) for maker in makers] == [None] * 4
    assert epidemic.headline(model_study[0]) == ""


def test_names_cannot_become_markup(study: Any, closed_world: Any, rename: Any, hostile: str) -> None:
    result, details = study
    for name in ("anhui", "closing", "new_mean7", "orange"):
        result = rename(result, name, hostile)
    seen = closed_world(page(result, details))
    assert "alert" in " ".join(seen.text)


def test_the_map_has_the_shapes_or_tiles() -> None:
    assert [shape_of(name) for name in ("Shanghai", "上海市", "江苏省", "hubei")] == [
        "shanghai",
        "shanghai",
        "jiangsu",
        "",
    ]
    risks = dict.fromkeys(SHAPES, (0.5, "", False))
    mapped, tiles = risk_map(risks, "m"), risk_map({**risks, "hubei": (None, "withheld", False)}, "m")
    assert mapped is not None and tiles is not None
    assert 'height="330"' in mapped and 'height="330"' not in tiles and "withheld" in tiles
    assert risk_map({}, "m") is None


def test_the_same_study_is_the_same_page(study: Any, draw_anew: Any) -> None:
    before = page(*study)
    draw_anew()
    assert page(*copy.deepcopy(study)) == before


def neighbours() -> ModuleType:
    """What test_browser.py drives the browser with."""
    spec = importlib.util.spec_from_file_location("browser_of_the_report", Path(__file__).with_name("test_browser.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


driving = neighbours()
browser = driving.browser


@driving.pytestmark
@pytest.mark.parametrize(
    ("kind", "size", "scheme"),
    [
        ("whole", "phone", "light"),
        ("whole", "desk", "dark"),
        ("partial", "phone", "dark"),
        ("partial", "desk", "light"),
    ],
)
def test_it_fits_and_stands_out(browser: Any, study: Any, tmp_path: Path, kind: str, size: str, scheme: str) -> None:
    if kind == "partial":
        found = study[0]["output"]["epidemic"]
        found |= {"partial": True, "absent": ["anhui"], "late": ["zhejiang"]}
        found["regions"] = {"jiangsu": None, "W" * 90: found["regions"]["zhejiang"]}
        found["joint"]["levels"] = [{"level": "green", "from": 0}, {"level": "W" * 90, "from": 0.2}]
        found["interventions"][1]["name"] = found["drivers"][0]["feature"] = "W" * 90
    write_report(tmp_path / "report.html", *study)
    driving.show(browser, tmp_path / "report.html", size, scheme)
    assert browser.get_log("browser") == []
    width = driving.SIZES[size][0]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    stray = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => e.scrollWidth > e.clientWidth + 1 &&"
        " e.clientWidth && !e.closest('.scroll, pre, svg')).map(e => e.outerHTML.slice(0, 200))"
    )
    assert stray == []
    outside = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].filter(t => { const a = t.getBoundingClientRect(),"
        " b = t.closest('figure').getBoundingClientRect(); return a.left < b.left || a.right > b.right ||"
        " a.top < b.top || a.bottom > b.bottom }).map(t => t.textContent)"
    )
    assert outside == []
    upon = browser.execute_script(
        "const found = []; for (const s of document.querySelectorAll('#risk svg')) {"
        " const t = [...s.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);"
        " for (let i = 0; i < t.length; i++) for (let j = 0; j < i; j++) { const a = t[i][1], b = t[j][1];"
        " if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)"
        " found.push([t[i][0], t[j][0]]) } } return found"
    )
    assert upon == []  # no word lies upon another
    inks = browser.execute_script(
        "return [...new Set([...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill))]"
    )
    card = browser.execute_script("return getComputedStyle(document.querySelector('figure')).backgroundColor")
    for ink in inks:
        light, dark = sorted((driving.luminance(ink), driving.luminance(card)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
