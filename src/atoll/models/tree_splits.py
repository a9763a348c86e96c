"""The best split of every node of a level, from its histogram.

Import it inside functions only, as ``tree_kernels``. All of it is a function of the sums: who has the same sums finds
the same splits. Ties go to the lowest feature, then the lowest code, then to missing cells going left.

Sources: Chen & Guestrin 2016, XGBoost (KDD), eq. 5-7 and algorithm 3 (missing cells either way); Fisher 1958, On
Grouping for Maximum Homogeneity (categories in the order of their mean: some prefix is the best subset); monotone
constraints as XGBoost has them: weights clipped into a node's bounds, the middle of both handed down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.models.tree_kernels import FURTHEST, compiled

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a split has to keep to.

    l2: λ. min_split_gain: γ. min_child_weight: least Σ Hessian of a child, in real units. min_rows: fewest rows of a
    child. g_unit, h_unit: what one step of the histogram's integers is worth.
    """

    l2: float = 1.0
    min_split_gain: float = 0.0
    min_child_weight: float = 1.0
    min_rows: int = 1
    g_unit: float = 1.0
    h_unit: float = 1.0


@dataclass(frozen=True, slots=True)
class Splits:
    """Of each node, [num_nodes]; feature is −1 (and gain 0) where there is no split.

    code: rows whose code is ≤ it go left (0: every row whose cell is there goes right). mask: of a categorical split,
    the bits of the categories that go right, else 0. left, right: (Σ g, Σ h, rows), int64 [num_nodes, 3], missing
    included. left_bounds, right_bounds: (lowest, highest) weight allowed below, [num_nodes, 2].
    """

    gain: Floats
    feature: NDArray[np.int32]
    code: NDArray[np.int32]
    mask: NDArray[np.uint64]
    default_left: NDArray[np.bool_]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    left_bounds: Floats
    right_bounds: Floats


def best_splits(
    hist: NDArray[np.int64],
    offsets: NDArray[np.int64],
    rules: Rules,
    *,
    categorical: NDArray[np.bool_] | None = None,
    monotone: NDArray[np.int8] | None = None,
    bounds: Floats | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> Splits:
    """The best split of each node.

    hist: as :func:`atoll.models.tree_kernels.histogram` gives it, [num_nodes, cells, 3]. categorical, monotone (+1:
    the prediction does not fall as the feature rises; −1; 0): [num_features]. bounds: (lowest, highest) weight of
    each node, [num_nodes, 2]. allowed: features that a node may split by, [num_nodes, num_features].
    """
    nodes, features = len(hist), len(offsets) - 1
    kinds = np.zeros(features, np.bool_) if categorical is None else np.ascontiguousarray(categorical, np.bool_)
    signs = np.zeros(features, np.int8) if monotone is None else np.ascontiguousarray(monotone, np.int8)
    if bounds is None:
        bounds = np.tile([-np.inf, np.inf], (nodes, 1))
    if allowed is None:
        allowed = np.ones((nodes, features), np.bool_)
    found = Splits(
        np.zeros(nodes), np.full(nodes, -1, np.int32), np.zeros(nodes, np.int32), np.zeros(nodes, np.uint64),
        np.ones(nodes, np.bool_), np.zeros((nodes, 3), np.int64), np.zeros((nodes, 3), np.int64),
        np.array(bounds, np.float64), np.array(bounds, np.float64),
    )  # fmt: skip
    _search(
        np.ascontiguousarray(hist, np.int64), np.ascontiguousarray(offsets, np.int64), kinds, signs,
        np.ascontiguousarray(bounds, np.float64), np.ascontiguousarray(allowed, np.bool_),
        float(rules.l2), float(rules.min_split_gain), float(rules.min_child_weight), int(rules.min_rows),
        float(rules.g_unit), float(rules.h_unit),
        found.gain, found.feature, found.code, found.mask, found.default_left, found.left, found.right,
        found.left_bounds, found.right_bounds,
    )  # fmt: skip
    return found


def weights_of(sums: NDArray[np.int64], rules: Rules, bounds: Floats | None = None) -> Floats:
    """The best weight of leaves with these (Σ g, Σ h, rows), [..., 3] → [...]: −G / (H + λ), within *bounds*
    [..., 2]; 0 where H + λ is not above 0."""
    g, h = sums[..., 0] * rules.g_unit, sums[..., 1] * rules.h_unit + rules.l2
    found = np.where(h > 0, -g / np.where(h > 0, h, 1.0), 0.0)
    return found if bounds is None else np.clip(found, bounds[..., 0], bounds[..., 1])


def threshold_of(edges: NDArray[np.float32], code: int) -> float:
    """The threshold of a split at *code*: present cells with lower codes or this one are below it."""
    return float(edges[code - 1]) if code > 0 else -float(FURTHEST)


@compiled
def _weight(g: float, h: float, low: float, high: float) -> float:
    return min(max(-g / h, low), high)


@compiled
def _score(g: float, h: float, low: float, high: float) -> float:
    """Twice what the weight within bounds takes off the loss: G² / H without bounds. h: λ included."""
    if low == -np.inf and high == np.inf:
        return g * g / h
    w = min(max(-g / h, low), high)
    return -(2.0 * g * w + h * w * w)


@compiled
def _gain(
    g: int, h: int, n: int, all_g: int, all_h: int, all_n: int, sign: int, low: float, high: float,
    l2: float, min_child_weight: float, min_rows: int, g_unit: float, h_unit: float,
) -> float:  # fmt: skip
    """½ (score left + score right) of a split, −1 where it is not allowed."""
    if n < min_rows or all_n - n < min_rows or n < 1 or all_n - n < 1:
        return -1.0
    left_h, right_h = h * h_unit, (all_h - h) * h_unit
    if left_h < min_child_weight or right_h < min_child_weight or left_h + l2 <= 0.0 or right_h + l2 <= 0.0:
        return -1.0
    left_g, right_g = g * g_unit, (all_g - g) * g_unit
    if sign != 0:
        a, b = _weight(left_g, left_h + l2, low, high), _weight(right_g, right_h + l2, low, high)
        if (sign > 0 and a > b) or (sign < 0 and a < b):
            return -1.0
    return 0.5 * (_score(left_g, left_h + l2, low, high) + _score(right_g, right_h + l2, low, high))


@compiled
def _search(
    hist: Any, offsets: Any, categorical: Any, monotone: Any, bounds: Any, allowed: Any, l2: Any, min_split_gain: Any,
    min_child_weight: Any, min_rows: Any, g_unit: Any, h_unit: Any, gain: Any, feature: Any, code: Any, mask: Any,
    default_left: Any, left: Any, right: Any, left_bounds: Any, right_bounds: Any,
) -> None:  # fmt: skip
    order = np.empty(256, np.int64)
    ratio = np.empty(256)
    for node in range(len(hist)):
        low, high = bounds[node, 0], bounds[node, 1]
        best = 0.0
        for f in range(len(offsets) - 1):
            if not allowed[node, f]:
                continue
            first, last = offsets[f], offsets[f + 1]
            all_g, all_h, all_n = 0, 0, 0
            for cell in range(first, last):
                all_g += hist[node, cell, 0]
                all_h += hist[node, cell, 1]
                all_n += hist[node, cell, 2]
            total_h = all_h * h_unit + l2
            if total_h <= 0.0:
                continue
            parent = 0.5 * _score(all_g * g_unit, total_h, low, high)
            # cells in the order in which they go left: as they are, or categories by their mean
            count = 0
            for cell in range(first + 1, last):
                if categorical[f]:
                    weight = hist[node, cell, 1] * h_unit + l2
                    if hist[node, cell, 2] <= 0 or weight <= 0.0:
                        continue
                    ratio[cell - first] = hist[node, cell, 0] * g_unit / weight
                    at = count
                    while at > 0 and ratio[order[at - 1] - first] > ratio[cell - first]:
                        order[at] = order[at - 1]
                        at -= 1
                    order[at] = cell
                else:
                    order[count] = cell
                count += 1
            missing_g, missing_h, missing_n = hist[node, first, 0], hist[node, first, 1], hist[node, first, 2]
            g, h, n = all_g, all_h, all_n  # categories that no row has go left
            if categorical[f]:
                for k in range(count):
                    g -= hist[node, order[k], 0]
                    h -= hist[node, order[k], 1]
                    n -= hist[node, order[k], 2]
                g, h, n = g - missing_g, h - missing_h, n - missing_n
            else:
                g, h, n = 0, 0, 0
            for k in range(count):
                if k > 0:
                    g += hist[node, order[k - 1], 0]
                    h += hist[node, order[k - 1], 1]
                    n += hist[node, order[k - 1], 2]
                for way in range(2):  # missing cells go left, then right
                    if way == 1 and (missing_n == 0 and missing_g == 0 and missing_h == 0):
                        break
                    a, b, c = g, h, n
                    if way == 0:
                        a, b, c = g + missing_g, h + missing_h, n + missing_n
                    found = _gain(
                        a, b, c, all_g, all_h, all_n, monotone[f], low, high, l2, min_child_weight, min_rows,
                        g_unit, h_unit,
                    )  # fmt: skip
                    if found < 0.0 or found - parent <= 1e-12 * found:  # what rounding makes of nothing
                        continue
                    if found - parent - min_split_gain > best:
                        best = found - parent - min_split_gain
                        gain[node], feature[node], default_left[node] = best, f, way == 0
                        left[node, 0], left[node, 1], left[node, 2] = a, b, c
                        right[node, 0], right[node, 1], right[node, 2] = all_g - a, all_h - b, all_n - c
                        code[node], mask[node] = k, np.uint64(0)
                        if categorical[f]:
                            code[node] = 0
                            for j in range(k, count):
                                mask[node] |= np.uint64(1) << np.uint64(order[j] - first - 1)
        f = feature[node]
        if f < 0 or monotone[f] == 0:
            continue
        middle = _weight(left[node, 0] * g_unit, left[node, 1] * h_unit + l2, low, high) / 2
        middle += _weight(right[node, 0] * g_unit, right[node, 1] * h_unit + l2, low, high) / 2
        if monotone[f] > 0:
            left_bounds[node, 1] = right_bounds[node, 0] = middle
        else:
            left_bounds[node, 0] = right_bounds[node, 1] = middle
