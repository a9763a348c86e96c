"""The report's section about trust: who stands out, by what, and that sites' names stay text."""

from __future__ import annotations

from typing import Any

from atoll.report.html import page
from atoll.report.trust import REASONS, trust


def studied(result: dict[str, Any], suspects: list[dict[str, Any]], sites: int = 3) -> dict[str, Any]:
    told = {f"site-{i}": [0.1 * i, None, 1.2] for i in range(sites)}
    return {**result, "output": {"suspects": suspects, "trust": told}}


def test_suspects_are_told_with_what_was_seen_of_them(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    reasons = {name: {"rounds": 9, "of": 12, "figure": 4.26} for name in REASONS}
    seen = closed_world(page(studied(result, [{"site": "site-1", "rounds": 9, "reasons": reasons}]), details))
    told = "".join(seen.text)
    assert "trust" in seen.anchors() and "site-1 stands out." in told
    for said in REASONS.values():
        assert said.format("4.3") in told


def test_nobody_stands_out_and_nothing_is_shown_where_no_rule_was(model_study: Any, closed_world: Any) -> None:
    result, details = model_study
    assert "No site stands out." in "".join(closed_world(page(studied(result, []), details)).text)
    assert "trust" not in closed_world(page(result, details)).anchors()


def test_more_sites_than_a_plot_holds_and_hostile_names_do_no_harm(
    model_study: Any, closed_world: Any, hostile: str
) -> None:
    result, details = model_study
    many = studied(result, [{"site": hostile, "rounds": 1, "reasons": {hostile + "{x}": {"rounds": 1, "of": 1}}}], 40)
    many["output"]["trust"][hostile] = [1.0, 1.0, 1.0]
    told = "".join(closed_world(page(many, details)).text)
    assert "The first 24 sites are shown." in told


def test_what_is_malformed_is_left_out(model_study: Any) -> None:
    result, details = model_study
    for output in ({"trust": {}}, {"trust": [1]}, {"trust": {"a": [1.0]}, "suspects": 3}):
        assert trust({**result, "output": output}, details) is None
    assert trust({**result, "output": {"trust": {"a": None}, "suspects": [None]}}, details) is not None
