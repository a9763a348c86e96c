"""The section for a site's director: gains, contributions, and who the model is better without."""

from __future__ import annotations

from typing import Any

import pytest

from atoll.report.html import page
from atoll.report.value import site_value
from atoll.runtime.value import value_of


@pytest.fixture
def valued(model_study: tuple[dict[str, Any], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study with contributions beside what each site would have alone."""
    result, details = model_study
    shares = {"north": (0.06, 0.75), "harbour": (0.02, 0.25), "university": (-0.01, 0.0)}
    sites = {site: {"value": value, "share": share} for site, (value, share) in shares.items()}
    told = {"method": "gtg", "worth": "accuracy", "sites": sites, "negative": ["university"]}
    result["output"] = {**result.get("output", {}), "contribution": told}
    result["value"] = value_of(result)
    return result, details


def test_it_shows_gain_share_and_who_makes_the_model_worse(valued: Any) -> None:
    made = site_value(*valued)
    assert made is not None
    text = made.html()
    assert "by guided permutations" in text
    assert "75.0 %" in text
    assert "better without university" in text
    assert text.count("<figure") == 2  # not every site told its rows
    assert 'href="#value"' in page(*valued)


def test_it_is_left_out_where_nothing_is_known(model_study: Any) -> None:
    assert site_value(*model_study) is None
    assert site_value({"value": {"metric": None, "sites": {}}}, {}) is None


def test_what_was_not_told_is_a_dash(valued: Any) -> None:
    result, details = valued
    nothing = dict.fromkeys(("local", "federated", "gain", "row_share", "contribution", "value"))
    result["value"] = {"metric": None, "sites": {"north": nothing}}
    result["output"] = {}
    made = site_value(result, details)
    assert made is not None
    assert "is not known" in made.html()
    assert made.html().count("–") >= 6
