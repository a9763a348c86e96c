"""The report of statistics, from real runs: sections, what is withheld, hostile names; and the terminal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from atoll.cli import show, tables
from atoll.report import sentences
from atoll.report.groups import reach_95
from atoll.report.html import page
from atoll.report.scorecard import bin_label
from atoll.report.words import compact

SECTIONS = [
    "statistics", "distributions", "missing", "evidence", "correlation", "collinearity", "components", "crosstables",
    "groups", "tests", "survival", "drift", "quality", "preparation", "releases", "traffic", "verify",
]  # fmt: skip


@pytest.fixture
def told(closed_world: Any) -> Callable[[Any], str]:
    """A study's page, checked, as text."""
    return lambda study: "".join(closed_world(page(*study)).text)


def alone(study: Any, kind: str, **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """*study* with only one kind of statistic, changed."""
    result, details = study
    only = {key: value for key, value in result.items() if key != "statistics"}
    return {**only, "output": {kind: {**result["output"][kind], **changed}}}, details


def emptied(value: Any, nothing: Any) -> Any:
    """*value* with *nothing* for every number but those that are codes, which the schema tells anyway."""
    codes = {"key", "groups", "row_values", "column_values", "probabilities"}
    if isinstance(value, dict):
        codes |= set() if "probabilities" in value else {"values"}
        return {key: item if key in codes and isinstance(item, list | int) else emptied(item, nothing)
                for key, item in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [emptied(item, nothing) for item in value]
    return nothing if isinstance(value, int | float) and not isinstance(value, bool) else value


def test_every_statistic_has_its_section(everything_study: Any, closed_world: Any) -> None:
    seen = closed_world(page(*everything_study))
    assert seen.anchors() == SECTIONS
    words = "".join(seen.text)
    assert "Three sites computed quantiles, distributions, cross-tables, information values and 9 more" in words
    assert "without pooling their records" in words and "says most about default (IV " in words
    assert "PSI against all sites together" in words and "Log-rank test: χ²(1)" in words
    labels = " ".join(str(a["aria-label"]) for a in seen.all("svg"))
    for drawn in (
        "Histogram of age", "Quantiles of income", "Bars: region: hills", "share of missing cells of debt",
        "information value for default", "weight of evidence of income", "Pearson’s correlation of 4 columns",
        "variance-inflation factors", "loadings of age, income and debt", "of each sex, the share of each default",
        "mean income by region", "Kaplan–Meier curves", "population-stability index of", "data quality",
    ):  # fmt: skip
        assert drawn in labels, drawn


@pytest.mark.parametrize("kind", list(sentences.KINDS))
def test_a_statistic_alone_says_what_it_found(everything_study: Any, kind: str, told: Any) -> None:
    study = alone(everything_study, kind)
    words = told(study)
    lede = words[words.index("Three sites computed") :].split("records", 1)[0]
    assert sentences.KINDS[kind].what(study[0]["output"][kind]) in lede


def test_the_numbers_are_those_of_the_result(everything_study: Any, told: Any) -> None:
    found = everything_study[0]["output"]
    words = told(everything_study)
    best = found["woe"]["ranking"][0]
    assert f"{best} says most about default (IV {found['woe']['features'][best]['iv']:.2f})" in words
    assert f"t = {found['ttest']['t']:.3f}".replace("-", "−")[:8] in words
    assert f"χ²({found['crosstab']['tables'][0]['test']['dof']})" in words
    rows = everything_study[0]["preparation"]
    assert f"{rows['rows']} rows were kept and {rows['dropped']['without age']} left out." in words


def test_what_is_withheld_is_said_to_be(everything_study: Any, told: Any) -> None:
    """Two people live on isles: their count, and what would tell it, is nowhere, and the page says so."""
    result, _ = everything_study
    region = result["output"]["frequency"]["columns"]["region"]
    assert None in region["counts"] and any(g["count"] is None for g in result["output"]["group_by"]["groups"])
    for kind in ("frequency", "crosstab", "group_by"):
        assert "withheld" in told(alone(everything_study, kind)), kind
    assert "×" in told(alone(everything_study, "frequency"))


@pytest.mark.parametrize("kind", list(sentences.KINDS))
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_everything_may_be_withheld(everything_study: Any, kind: str, nothing: float | None, told: Any) -> None:
    result, details = alone(everything_study, kind)
    words = told((emptied(result, nothing), details))
    assert "None" not in words and "nan" not in words.lower().split()
    if kind not in ("pca", "correlation", "vif", "ttest", "anova"):
        assert "withheld" in words or "told" in words
    result["output"][kind] = dict.fromkeys(result["output"][kind])
    told((result, details))


def test_preparation_tells_small_reasons_only_that_they_are(everything_study: Any, told: Any) -> None:
    result, details = everything_study
    result["preparation"] = {"rows": 500, "dropped": {"without age": None, "duplicate rows": 40}}
    words = told((result, details))
    assert "500 rows were kept and at least 40 left out." in words and "withheld: fewer than may be told" in words


def test_a_withheld_column_and_withheld_bins_of_describe(statistics_study: Any, told: Any) -> None:
    result, details = statistics_study
    columns = result["statistics"]["columns"]
    columns["age"]["histogram"][8] = None
    columns["chol"] = {"rows": 569, "withheld": True, "count": None, "missing": None, "histogram": [], "edges": []}
    words = told((result, details))
    assert "× marks a bin that is withheld" in words and words.count("withheld") >= 7


@pytest.mark.parametrize("name", ["income", "region", "default", "isles", "north", "statistics.several"])
def test_hostile_names_stay_text(
    everything_study: Any, name: str, closed_world: Any, rename: Any, hostile: str
) -> None:
    result, details = rename(everything_study[0], name, hostile), rename(everything_study[1], name, hostile)
    content = page(result, details)
    seen = closed_world(content)
    assert "<script" not in content and "\x00" not in content and "\u202e" not in content
    assert '<script>alert("1")</script>&\'$x_2$' in "".join(seen.text)


def test_hostile_notes_and_units_stay_text(everything_study: Any, closed_world: Any, hostile: str) -> None:
    result, details = everything_study
    for found in result["output"].values():
        found |= {"note": hostile, "notes": [hostile]}
    for feature in result["output"]["woe"]["features"].values():
        feature["note"] = hostile
    result["preparation"]["dropped"] = {hostile: 7}
    details["units"] = dict.fromkeys(COLUMN_NAMES, hostile)
    closed_world(page(result, details))


COLUMN_NAMES = ("age", "income", "debt", "months")


def test_drift_between_periods(periods_study: Any, closed_world: Any, told: Any) -> None:
    words = told(periods_study)
    assert closed_world(page(*periods_study)).anchors()[0] == "drift"
    assert "From before 2024-01-01 to after it," in words and "Drift since 2024-01-01" in words


def test_sites_that_share_nothing_of_their_own(everything_study: Any, told: Any) -> None:
    result, details = everything_study
    result["output"]["psi"]["own"] = {}
    result["output"]["quality"]["sites"] = {}
    words = told((result, details))
    assert "No site shares its own index" in words and "No site shares its own score" in words


def test_the_same_input_gives_the_same_bytes(everything_study: Any, draw_anew: Any) -> None:
    before = page(*everything_study)
    draw_anew()
    assert page(*copy.deepcopy(everything_study)) == before


def test_many_columns_and_groups_do_not_overload_a_chart(everything_study: Any, closed_world: Any) -> None:
    names = [f"column_{i}" for i in range(70)]
    matrix = np.eye(70).tolist()
    study = alone(
        everything_study,
        "correlation",
        columns=names,
        matrix=matrix,
        pairs_count=matrix,
        p_values=matrix,
        error_bound=None,
    )
    labels = [a["aria-label"] for a in closed_world(page(*study)).all("svg")]
    assert any("of 40 columns" in str(label) for label in labels)


def test_intervals_of_means_are_students() -> None:
    low, high = stats.t.interval(0.95, 9, loc=0, scale=2 / math.sqrt(10))
    assert reach_95(10, 2.0) == pytest.approx(high) == pytest.approx(-low)
    assert reach_95(1, 2.0) is None and reach_95(None, 2.0) is None and reach_95(10, None) is None


@pytest.mark.parametrize(
    ("one", "first", "expected"),
    [
        ({"from": 0, "to": 42_980.0}, True, "≤ 43k"),
        ({"from": 42_980.0, "to": 1_000_000}, False, "43k – 1M"),
        ({"values": [2, 3, 4, 5]}, False, "2 to 5"),
        ({"values": [-2]}, False, "−2"),
        ({"values": ["a", "c"]}, False, "a, c"),
        ({"values": [1, 2]}, False, "1, 2"),
    ],
)
def test_bins_have_short_names(one: dict[str, Any], first: bool, expected: str) -> None:
    assert bin_label(one, first=first) == expected


def test_short_numbers() -> None:
    assert [compact(x) for x in (0, 0.05, -12_345, 2.5e6, 3e9, None)] == ["0", "0.05", "−12.3k", "2.5M", "3G", "–"]


def test_collinear_columns_are_named(everything_study: Any, told: Any) -> None:
    columns = {"a": {"vif": None, "r_squared": 1.0}, "b": {"vif": 2.0, "r_squared": 0.5}}
    words = told(alone(everything_study, "vif", columns=columns))
    assert "a can be computed exactly from the other columns" in words and "∞" in words


# ---------------------------------------------------------------- in the terminal


@pytest.mark.parametrize("kind", [*sentences.KINDS, "describe"])
def test_the_terminal_tells_every_kind(everything_study: Any, kind: str, rename: Any) -> None:
    result, _ = everything_study
    only = {"output": {kind: result["output"][kind]}} if kind != "describe" else {"statistics": result["statistics"]}
    with show.out.capture() as captured:
        tables.tell(only)
        tables.tell(emptied(only, None))
        tables.tell(rename(only, "income", "[red]\x1b[31mincome"))
    said = captured.get()
    assert len(said.splitlines()) > 6 and "None" not in said and "\x1b[31mincome" not in said
    if kind not in ("crosstab", "survival", "quality", "frequency"):
        assert "[red]" in said


def test_the_terminal_tells_what_it_does_not_know() -> None:
    with show.out.capture() as captured:
        tables.tell({"output": {"new": {"score": 0.25, "columns": {"a": 1}, "word": "[b]", "nothing": None}}})
    said = captured.get()
    assert "0.2500" in said and "1 entries" in said and "[b]" in said
