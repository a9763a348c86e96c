"""The report: its structure, that it needs nothing from outside, escaping, and parts that are missing."""

from __future__ import annotations

import copy
import math
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

from atoll.report.html import outcome, page, write_report


def test_a_model_study_has_every_section(model_study: Any, tmp_path: Path, closed_world: Any) -> None:
    write_report(tmp_path / "report.html", *model_study)
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    seen = closed_world(content)
    assert seen.anchors() == [
        "results", "sites", "convergence", "coefficients", "statistics", "missing", "preparation", "releases",
        "traffic", "verify",
    ]  # fmt: skip
    assert len(seen.all("svg")) == 2 + 3 + 1 + 1 + 3 + 1 + 1
    told = "".join(seen.text)
    for words in (
        "heart-disease", "87 of 100 pairs", "north (142 rows)", "0.874", "± 0.0003", "per mmHg", "132.5", "12 (2.1 %)",
        "gradient (6 numbers), hessian (21 numbers)", "Each of north, harbour and university released", "3.8 kB",
        "161.9 kB", "atoll ledger verify ledger/*.jsonl", model_study[0]["plan_hash"], "python 3.11.7",
        "2025-03-12 14:05 UTC", "no ε is claimed", "1 of 2 sites", "every label is the same", "1 min 23 s",
    ):  # fmt: skip
        assert words in told, words


def test_a_study_of_statistics_has_no_model(statistics_study: Any, closed_world: Any) -> None:
    content = page(*statistics_study)
    assert closed_world(content).anchors() == ["statistics", "missing", "preparation", "releases", "traffic", "verify"]
    assert "569 records at 3 sites, described together in 3 columns." in content


def test_a_regression_names_the_unit_of_its_error(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    result["model"]["spec"] = {"family": "linear", "target": "chol"}
    errors = {"mae": 31.25, "rmse": 40.0, "r2": 0.4}
    result["metrics"] = {"federated": errors, "per_site": {"north": {"federated": {**errors, "rows": 9.0}}}}
    told = "".join(closed_world(page(result, details)).text)
    assert "off by 31.2 mg/dl on average" in told and "MAE, mg/dl" in told and "Odds ratio" not in told


def test_the_same_input_gives_the_same_bytes(model_study: Any, draw_anew: Any) -> None:
    before = page(*model_study)
    draw_anew()
    assert page(*copy.deepcopy(model_study)) == before


def test_hostile_names_stay_text(model_study: Any, closed_world: Any, hostile: str) -> None:
    result, details = model_study
    h = hostile
    for key in ("study", "program", "plan_hash", "run", "transport", "protection", "seed"):
        result[key] = h
    result["sites"][h] = {"rows": h}
    result["metrics"]["federated"][h] = result["metrics"]["pooled"][h] = h
    result["metrics"]["per_site"][h] = {"federated": {"auc": 0.5, "rows": h}, "local": {"auc": 0.6}}
    result["metrics"]["notes"][h] = h
    result["privacy"] = {"protection": h, "unit": h, "epsilon": 1.0, "statement": h}
    result["model"]["table"].append({"name": h, "coefficient": 1.0, "std_error": 0.1, "p_value": h})
    result["statistics"]["columns"][h] = result["statistics"]["columns"]["age"]
    result["fitted"][h] = {h: h, "list": [h, 1.5], "map": {h: None}}
    details["units"] |= {h: h, "age": h}
    details["rounds"].append({"number": 9, "name": h, "seconds": h})
    details["releases"][h] = [{"program": h, "handler": h, "what": h, "bytes": h, "times": h}]
    details |= {"purpose": h, "created": h, "versions": {h: h}}
    content = page(result, details)
    seen = closed_world(content)
    assert "<script" not in content and "\x00" not in content and "\u202e" not in content
    assert content.count("&lt;script&gt;") > 20
    assert '<script>alert("1")</script>&\'$x_2$' in "".join(seen.text)


def test_any_part_may_be_missing(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    closed_world(page({}, {}))
    closed_world(page({}, details))
    for key in result:
        closed_world(page({**result, key: None}, {}))
    for key in details:
        closed_world(page({k: result[k] for k in ("sites", "wire", "privacy")}, {**details, key: None}))


@pytest.mark.slow
def test_any_combination_of_parts_may_be_missing(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    parts = ("metrics", "model", "statistics", "sites", "wire", "fitted", "privacy")
    kept = ("history", "curves", "units", "releases")
    for absent in chain.from_iterable(combinations(parts, n) for n in range(len(parts) + 1)):
        left = {k: v for k, v in result.items() if k not in absent}
        for lost in (None, *kept):
            closed_world(page(left, {k: v for k, v in details.items() if k != lost}))


@pytest.mark.parametrize("part", ["pooled", "federated", "per_site", "notes"])
def test_metrics_may_be_missing(model_study: Any, part: str, closed_world: Any) -> None:
    result, details = model_study
    del result["metrics"][part]
    told = "".join(closed_world(page(result, details)).text)
    assert ("in one place" in told) == (part != "pooled")
    for found in result["metrics"].get("per_site", {}).values():
        found.pop("local")
    assert "trained at the site alone" not in "".join(closed_world(page(result, details)).text)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, -math.inf])
def test_numbers_may_be_missing(model_study: Any, nothing: float | None, closed_world: Any) -> None:
    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: emptied(item) for key, item in value.items()}
        if isinstance(value, list):
            return [emptied(item) for item in value]
        return nothing if isinstance(value, int | float) else value

    result, details = emptied(model_study[0]), emptied(model_study[1])
    told = "".join(closed_world(page(result, details)).text)
    assert "–" in told and "nan" not in told.lower().split() and "None" not in told and "inf " not in told


def test_sites_that_released_different_things_are_told_apart(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    details["releases"]["harbour"][1]["bytes"] = 5_000
    details["releases"]["university"] = []
    told = "".join(closed_world(page(result, details)).text)
    assert "Each of north and harbour released" in told and "3.8 kB to 5.0 kB" in told
    assert "university released nothing." in told


def test_a_privacy_loss_is_told_with_its_unit(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    result["privacy"] |= {"epsilon": 1.25, "unit": "record"}
    assert "ε = 1.25 for each record." in "".join(closed_world(page(result, details)).text)


def test_the_outcome_compares_honestly(model_study: Any) -> None:
    result, details = model_study
    assert outcome(result, details).endswith("the same as a model trained on all records in one place.")
    result["metrics"]["pooled"]["auc"] = 0.891
    assert outcome(result, details).endswith("a model trained on all records in one place reaches 0.891.")


def test_a_site_is_not_said_to_lack_the_model_that_is_shown(model_study: Any, closed_world: Any) -> None:
    result, details = copy.deepcopy(model_study)
    words = "A model of university alone could not be made"
    assert words in "".join(closed_world(page(result, details)).text)
    per_site = result["metrics"]["per_site"]
    per_site["university"]["local"] = per_site["north"]["local"]
    assert words not in "".join(closed_world(page(result, details)).text)


def test_the_rows_of_a_site_that_has_only_a_model_of_its_own_are_told(model_study: Any, closed_world: Any) -> None:
    result, details = copy.deepcopy(model_study)
    found = result["metrics"]["per_site"]["university"]
    found |= {"personal": {**found["federated"], "rows": 4711.0}, "federated": {}}
    assert "4,711" in "".join(closed_world(page(result, details)).text)


def test_personal_models_stand_beside_the_others(model_study: Any, closed_world: Any) -> None:
    result, details = copy.deepcopy(model_study)
    plain = page(result, details)
    metrics = result["metrics"]
    metrics["personal"] = {**metrics["federated"], "auc": 0.912}
    for site, auc in (("north", 0.93), ("harbour", 0.91), ("university", 0.8)):
        metrics["per_site"][site]["personal"] = {**metrics["federated"], "auc": auc, "rows": 43.0}
    content = page(result, details)
    told = "".join(closed_world(content).text)
    assert "each has a model of its own" in outcome(result, details) and "91 of 100 pairs" in outcome(result, details)
    for words in (
        "“Personal” are the models that sites keep", "between personal and pooled", "fitted to each site",
        "ROC curve, personal models",
    ):  # fmt: skip
        assert words in told and words not in plain, words
    assert "the personal model does better than one that the site trains alone at 1 of 2 sites" in told
    assert "the shared model does better than the site’s own at 1 of 2 sites" in plain
    [plot] = [line for line in content.split("<svg") if "Bars: AUC on held-out rows" in line]
    assert "north: local 0.882, federated 0.896, personal 0.930" in plot and "var(--personal)" in plot
    assert "all sites: federated 0.874, personal 0.912, pooled 0.874" in plot
    assert 'class="key personal"' in content and "key personal" not in plain


def test_many_sites_do_not_make_an_endless_plot(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    one = result["metrics"]["per_site"]["north"]
    result["metrics"]["per_site"] = {f"site-{i:03d}": one for i in range(200)}
    result["sites"] = {name: {"rows": 1} for name in result["metrics"]["per_site"]}
    seen = closed_world(page(result, details))
    assert "The plots show the first 24 sites." in "".join(seen.text)
    assert max(float(str(a["height"])) for a in seen.all("svg")) < 1_500


def test_the_page_says_first_who_saw_what_and_whether_numbers_carry_noise(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    told = page(result, details)
    assert "carry noise" not in "".join(closed_world(told).text)
    result["privacy"] |= {
        "protection": "secagg", "statement": "Sums were masked: the coordinator saw only the sum of 3 sites.",
        "unit": "entity", "epsilon": 0.5, "delta": 1e-6, "mechanism": "discrete_gaussian", "noised": True,
        "warnings": ["delta is too large"],
    }  # fmt: skip
    told = page(result, details)
    text = "".join(closed_world(told).text)
    for words in ("saw only the sum of 3 sites", "ε = 0.500, δ = 1.0 × 10⁻⁶ for each entity", "discrete gaussian",
                  "Warning: delta is too large."):  # fmt: skip
        assert words in text, words
    assert told.index("The numbers on this page carry noise") < told.index("<main")
    sections = {part.split('"')[0]: part for part in told.split('<section id="')[1:]}
    marked = {name for name, part in sections.items() if "These numbers carry noise" in part}
    assert marked == set(sections) - {"releases", "traffic", "verify"}


def test_nothing_is_promised_of_a_run_that_says_nothing(closed_world: Any) -> None:
    assert "Protection" not in "".join(closed_world(page({"study": "s"}, {})).text)
    exact = page({"protection": "plain", "privacy": {"noised": False}}, {})
    assert "no number carries noise" in "".join(closed_world(exact).text)
