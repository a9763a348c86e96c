"""The report's sections about models of trees: what they ask for, the first of them, and what moves predictions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from atoll.cli import show, tables
from atoll.report.html import page
from atoll.report.trees import explanation, trees


def test_a_real_run_shows_importance_trees_and_drivers(trees_study: Any, closed_world: Any) -> None:
    result, _ = trees_study
    seen = closed_world(page(*trees_study))
    assert {"trees", "explanation"} <= set(seen.anchors())
    words, told = "".join(seen.text), result["model"]["trees"]
    first = told["importance"][0]
    assert f"The model adds up 3 trees, with {told['leaves']} leaves in all." in words
    assert f"It leans most on {first['feature']}" in words
    labels = " ".join(str(a["aria-label"]) for a in seen.all("svg"))
    share = 100 * first["gain"] / sum(one["gain"] for one in told["importance"])
    assert f"Bars: share of gain. {first['feature']} {share:.1f} %" in labels
    root = told["drawn"][0]["root"]
    assert f"Tree: {root['feature']}" in labels and labels.count("Tree: ") == 2
    driver = result["output"]["explanation"]["drivers"][0]
    assert f"What moves the predictions most: {driver['feature']}" in words
    assert f"over {result['output']['explanation']['rows']} rows" in words
    assert f"mean SHAP of {driver['feature']}" in labels


def test_classes_are_told(trees_study: Any) -> None:
    result, details = trees_study
    result["model"]["trees"] |= {"outputs": 3, "drawn": []}
    made = trees(result, details)
    assert made is not None
    assert "one for each of 3 classes" in made.html()


def test_splits_count_where_no_gain_is_known(trees_study: Any) -> None:
    result, details = trees_study
    for one in result["model"]["trees"]["importance"]:
        one["gain"] = 0.0
    made = trees(result, details)
    assert made is not None
    assert "share of splits" in made.html() and "nan" not in made.html()


def test_trees_without_a_split_are_told(trees_study: Any) -> None:
    result, details = trees_study
    result["model"]["trees"] |= {"importance": [], "drawn": [], "trees": 0, "leaves": 0}
    made = trees(result, details)
    assert made is not None
    assert "predicts the same for everybody" in made.html()


def test_bins_without_rows_are_left_out_and_withheld_ones_are_said_to_be(trees_study: Any) -> None:
    result, details = trees_study
    course = {"bins": ["missing", "0 to 9", "9 to 20"], "rows": [0, None, 30], "mean": [None, None, 0.25]}
    result["output"]["explanation"]["dependence"] = {"age": course}
    made = explanation(result, details)
    assert made is not None
    label = next(part for part in made.html().split("aria-label") if "mean SHAP of age in year" in part)
    assert "missing" not in label and "0 to 9 withheld; 9 to 20 0.25" in label


def test_other_studies_have_neither(model_study: Any, statistics_study: Any) -> None:
    for study in (model_study, statistics_study):
        assert trees(*study) is None
        assert explanation(*study) is None


@pytest.mark.parametrize("gone", ["importance", "drawn", "trees", "leaves", "outputs"])
def test_any_part_may_be_missing(trees_study: Any, gone: str) -> None:
    told = trees_study[0]["model"]["trees"]
    told["drawn"] = told["drawn"][:1]
    for value in (None, math.nan if gone in ("trees", "leaves", "outputs") else []):
        told[gone] = value
        made = trees(*trees_study)
        assert made is not None
        assert "nan" not in made.html() and "None" not in made.html()
    del told[gone]
    assert trees(*trees_study) is not None


def test_what_is_malformed_is_left_out(trees_study: Any, closed_world: Any) -> None:
    result, details = trees_study
    node = {"feature": "age", "below": None, "children": [{"feature": "x", "right": None}, 3, {"value": None}]}
    result["model"]["trees"]["drawn"] = [{"tree": None, "root": node}, {"root": 4}, None]
    result["model"]["trees"]["importance"].append({"feature": None, "gain": None})
    result["output"]["explanation"] |= {"rows": None, "dependence": {"income": {"bins": [1], "mean": [None]}, "age": 1}}
    closed_world(page(result, details))


@pytest.mark.parametrize("name", ["income", "region", "coast", "default"])
def test_hostile_names_stay_text(trees_study: Any, closed_world: Any, rename: Any, hostile: str, name: str) -> None:
    result, details = rename(trees_study[0], name, hostile), rename(trees_study[1], name, hostile)
    content = page(result, details)
    closed_world(content)
    assert "<script" not in content


def test_the_terminal_tells_drivers(trees_study: Any) -> None:
    found = trees_study[0]["output"]["explanation"]
    with show.out.capture() as captured:
        tables.tell({"output": {"explanation": found}})
    told = captured.get()
    assert f"the predictions of {found['rows']} rows" in told
    assert found["drivers"][0]["feature"] in told and "mean |SHAP|" in told
