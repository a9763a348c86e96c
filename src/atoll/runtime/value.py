"""What taking part is worth to each site: its own model against the federation's, its rows, and its contribution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

BETTER = {
    "auc": 1, "accuracy": 1, "balanced_accuracy": 1, "r2": 1, "log_loss": -1, "mae": -1, "rmse": -1,
}  # fmt: skip
"""Metrics in the order in which one is chosen; 1: higher is better."""


def value_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` of result.json: {"metric", "sites": {site: {"local", "federated", "gain", "row_share",
    "contribution", "value"}}}, each None where it was not told; {} where nothing is known of what sites gain or add.

    federated: of the model that the site ends with, its personal one where it has one. gain: by how much that is better
    than the site's own, negative where it is worse. row_share: of all rows that were told of, if every site told.
    contribution: the share that the ledger records; value: what it is made of.
    """
    own = result.get("metrics", {}).get("per_site", {})
    found = result.get("output", {}).get("contribution", {}).get("sites", {})
    pairs = {site: (one.get("local", {}), one.get("personal") or one.get("federated", {})) for site, one in own.items()}
    metric = next((name for name in BETTER if any(_number(a, name, b) is not None for a, b in pairs.values())), None)
    if metric is None and not found:
        return {}
    rows = {site: one.get("rows") for site, one in result.get("sites", {}).items()}
    known = sum(number or 0 for number in rows.values()) if all(number is not None for number in rows.values()) else 0
    sites = {}
    for site in rows:
        local, together = pairs.get(site, ({}, {}))
        mine, ours = (_number(part, metric) for part in (local, together))
        gain = None if metric is None or mine is None or ours is None else BETTER[metric] * (ours - mine)
        sites[site] = {
            "local": mine, "federated": ours, "gain": gain,
            "row_share": rows[site] / known if known else None,
            "contribution": found.get(site, {}).get("share"), "value": found.get(site, {}).get("value"),
        }  # fmt: skip
    return {"metric": metric, "sites": sites}


def _number(metrics: Mapping[str, Any], name: str | None, also: Mapping[str, Any] | None = None) -> float | None:
    """A metric that is there, and a number; with *also*, there too."""
    value = metrics.get(name) if name is not None else None
    if not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value) if also is None or _number(also, name) is not None else None
