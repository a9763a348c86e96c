"""What trees tell of themselves, without any row: how much each feature was asked for, and the first trees.

Source: Friedman 2001, Greedy Function Approximation (Annals of Statistics), §8.1: a feature's importance is the loss
that its splits took off. "gain", "cover" and "splits" are XGBoost's "total_gain", "total_cover" and "weight".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atoll.models.trees import COVER, DEFAULT, FEATURE, GAIN, LEAF, THRESHOLD, Trees

FIRST = 2
"""So many trees are told whole."""
DEEPEST = 2
"""And so many levels of splits of each, below the first."""


def importance(model: Trees) -> list[dict[str, Any]]:
    """[{"feature", "gain", "cover", "splits"}, …] of features that are asked for, summed over all splits; the greatest
    gain first."""
    words = model.words
    splits = words[words[:, :, FEATURE] >= 0]
    names, place = model.settings.features, splits[:, FEATURE].astype(np.int64)
    count = np.bincount(place, minlength=len(names))
    gain, cover = (np.bincount(place, splits[:, word], len(names)) for word in (GAIN, COVER))
    found = [
        {"feature": names[i], "gain": float(gain[i]), "cover": float(cover[i]), "splits": int(count[i])}
        for i in np.flatnonzero(count)
    ]
    return sorted(found, key=lambda one: (-one["gain"], -one["splits"], one["feature"]))


def told(model: Trees) -> dict[str, Any]:
    """{"importance", "trees" and "leaves" in use, "outputs", "drawn": the first trees}, as plain values."""
    feature = model.words[:, :, FEATURE]
    used = feature[:, 0] >= 0
    return {
        "importance": importance(model),
        "trees": int(used.sum()),
        "leaves": int((feature[used] == LEAF).sum()),
        "outputs": model.outputs,
        "drawn": [{"tree": int(t), "root": _node(model, int(t), 0, DEEPEST)} for t in np.flatnonzero(used)[:FIRST]],
    }


def _node(model: Trees, tree: int, at: int, levels: int) -> dict[str, Any]:
    """A leaf {"value", "cover"}; a split {"feature", "below" (its threshold) or "right" (values that go right),
    "missing", "cover", "children": [left, right], [] where it is too deep to be told}."""
    node = model.words[tree, at]
    if node[FEATURE] == LEAF:
        return {"value": float(node[THRESHOLD]), "cover": float(node[COVER])}
    place = int(node[FEATURE])
    name = model.settings.features[place]
    asked: dict[str, Any] = {"below": float(node[THRESHOLD])}
    if model.categorical[place]:
        values = model.schema.columns[name].values or ()
        asked = {"right": [value for i, value in enumerate(values) if int(node[THRESHOLD]) >> i & 1]}
    below = [_node(model, tree, side, levels - 1) for side in (2 * at + 1, 2 * at + 2)] if levels else []
    missing = "left" if node[DEFAULT] else "right"
    return {"feature": name, **asked, "missing": missing, "cover": float(node[COVER]), "children": below}
