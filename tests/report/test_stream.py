"""The report's section about online learning: errors by period, alarms of all and of each, and nothing that was not."""

from __future__ import annotations

from typing import Any

import pytest

from atoll.report.html import page
from atoll.report.stream import stream

DETAILS = {"history": [{"step": i, "loss": 0.43 + 0.26 * 4.0**-i} for i in range(12)]}


def studied(**more: Any) -> dict[str, Any]:
    """What an online run over twelve periods leaves, with drift in the eighth."""
    periods = [
        {"period": i, "begins": f"2024-01-{1 + 2 * i:02d}", "rows": 300 + i, "error": 0.2 + 0.5 * (i == 8),
         "drift": i == 8, "sites_drifting": 2 * (i == 8) + (i == 9)}
        for i in range(12)
    ]  # fmt: skip
    how = {"time": "seen", "detector": "adwin", "on_drift": "boost", "task": "binary"}
    sites = {name: {"rows": 1200} for name in ("north", "harbour", "university")}
    return {"study": "stations", "sites": sites, "output": {"periods": periods, "stream": how, **more}}


def test_periods_errors_and_alarms_are_told(closed_world: Any) -> None:
    alarms = {"north": [8], "harbour": [8, 9]}
    seen = closed_world(page(studied(alarms=alarms), DETAILS))
    told, drawn = "".join(seen.text), " ".join(str(svg["aria-label"]) for svg in seen.all("svg"))
    assert "stream" in seen.anchors()
    assert "each of 12 periods" in told
    assert "on average 0.242 (share called wrongly)" in told
    assert "(ADWIN) in period 8 (2024-01-17). In the period after it the sites learned at a higher rate." in told
    assert "8 0.700; 9 0.200" in drawn and "drift in 8" in drawn
    assert "sites that saw drift, of 3, by period: 8: 2; 9: 1" in drawn
    assert "north: 8; harbour: 8 and 9" in drawn
    assert "0.430" in told.split("Period by period")[1]  # the convergence's loss, beside its period


def test_without_alarms_it_says_so_and_draws_no_sites(closed_world: Any) -> None:
    calm = studied()
    for one in calm["output"]["periods"]:
        one |= {"drift": False, "sites_drifting": 0}
    seen = closed_world(page(calm, DETAILS))
    assert "No drift was detected" in "".join(seen.text)
    assert "sites that saw drift, of" not in " ".join(str(svg["aria-label"]) for svg in seen.all("svg"))


def test_what_is_withheld_is_a_gap(closed_world: Any) -> None:
    few = studied()
    few["output"]["periods"][3] |= {"rows": None, "error": None}
    seen = closed_world(page(few, DETAILS))
    assert "withheld" in "".join(seen.text)
    line = next(str(svg["aria-label"]) for svg in seen.all("svg") if "by period: 0" in str(svg["aria-label"]))
    assert "2 0.200; 4 0.200" in line


def test_many_periods_and_sites_and_hostile_names_do_no_harm(closed_world: Any, hostile: str) -> None:
    many = studied(alarms={f"{hostile}{i}": [0, 249] for i in range(30)})
    many["output"]["periods"] = [
        {**many["output"]["periods"][8], "period": i, "begins": hostile, "drift": i == 8} for i in range(250)
    ]
    told = "".join(closed_world(page(many, DETAILS)).text)
    assert "The first 200 of 250 periods." in told and "the first 24 of 30" in told


@pytest.mark.parametrize(
    "output",
    [
        {}, {"periods": []}, {"periods": 3}, {"periods": [1], "stream": {"task": "binary"}},
        {"periods": [{"period": 0}], "stream": "adwin"},
    ],
)  # fmt: skip
def test_where_there_is_no_stream_there_is_no_section(output: dict[str, Any]) -> None:
    assert stream({**studied(), "output": output}, DETAILS) is None


def test_what_is_malformed_is_left_out(closed_world: Any) -> None:
    odd = studied(alarms={"north": None, "harbour": ["x", 8]})
    odd["output"]["periods"].append({"period": "x", "error": "y", "drift": "z", "sites_drifting": None})
    assert stream(odd, {**DETAILS, "history": [1, {"step": [], "loss": 2}]}) is not None
