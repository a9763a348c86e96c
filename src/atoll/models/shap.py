"""Shapley values of trees: what each feature adds to a row's margin, exactly.

The game's worth of a set S of features is what the trees expect of a row of which S is known: below a split by another
feature both sides count, by their cover (path-dependent). So a row's values sum to its margin less what is expected of
a row of which nothing is known; that is also what XGBoost's ``pred_contribs`` tells.

A leaf of value v counts by itself. Of the d features on its path, i lets a share z_i of the cover through, and the row
either (o_i = 1) or not (0); j is worth v (o_j − z_j) Σ_k k! (d − 1 − k)! / d! c_k, where c_k is the coefficient of t^k
in Π_{i ≠ j} (z_i + o_i t). That takes d² steps for a leaf and a row, and is stable; a leaf of few features is worked
out but once for each case of the o_i, of which there are far fewer than rows.

Import it inside functions only: numba takes long to load.

Sources: Lundberg et al. 2020, From Local Explanations to Global Understanding with Explainable AI for Trees (Nature
Machine Intelligence), algorithm 1; Yang 2021, Fast TreeSHAP, §3 (cases that many rows share).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.models.model import Floats
from atoll.models.tree_kernels import _left as goes_left
from atoll.models.tree_kernels import compiled
from atoll.models.trees import COVER, Trees

DEEPEST = 12
KEPT = 8
"""So many features of a leaf have at most 256 cases of which let a row through."""


def shap_values(model: Trees, inputs: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """(what each feature adds to each margin, [num_rows, outputs, num_features]; what is expected of a row of which
    nothing is known, [outputs]). inputs: as :meth:`Trees.inputs` gives them."""
    inputs, nodes = np.ascontiguousarray(inputs), model.nodes
    found = np.zeros((model.outputs, len(inputs), len(model.settings.features)))
    expected = np.array(model.base)
    for t in range(len(nodes.feature)):
        shares = _shares(nodes.feature[t], model.words[t, :, COVER])
        expected[t % model.outputs] += _add(
            inputs, nodes.feature[t], nodes.threshold[t], nodes.mask[t], nodes.default_left[t], nodes.value[t], shares,
            WEIGHTS, found[t % model.outputs],
        )  # fmt: skip
    return np.ascontiguousarray(found.transpose(1, 0, 2)), expected


def most(model: Trees) -> Floats:
    """The largest |value| that a feature can have of any row, [outputs, num_features]: the spread of the leaves of all
    trees that ask for it."""
    nodes, found = model.nodes, np.zeros((model.outputs, len(model.settings.features)))
    for t, feature in enumerate(nodes.feature):
        asked = np.unique(feature[feature >= 0])
        values = nodes.value[t][feature == -1]
        found[t % model.outputs, asked] += values.max() - values.min()
    return found


def _weights() -> Floats:
    table = np.zeros((DEEPEST + 1, DEEPEST + 1))
    for d in range(1, DEEPEST + 1):
        for k in range(d):
            table[d, k] = math.factorial(k) * math.factorial(d - 1 - k) / math.factorial(d)
    return table


WEIGHTS = _weights()
"""[d, k]: of sets of k others among d features."""


@compiled
def _shares(feature: Any, cover: Any) -> Any:
    """Of each node the share of its parent's cover, [num_nodes]; halves where there is none."""
    shares = np.ones(len(feature))
    for at in range(len(feature) // 2):
        if feature[at] >= 0:
            both = cover[2 * at + 1] + cover[2 * at + 2]
            left = cover[2 * at + 1] / both if both > 0 else 0.5
            shares[2 * at + 1], shares[2 * at + 2] = left, 1 - left
    return shares


@compiled
def _leaf(value: Any, z: Any, d: Any, passes: Any, weights: Any, product: Any, rest: Any, added: Any) -> None:
    """What a leaf adds to each of its d features, into *added*; *passes* has a bit for each that lets the row through.
    product, rest: room for polynomials."""
    scale, ones = value, 0
    product[0] = 1.0
    for p in range(d):
        if passes >> p & 1:  # times z + t
            ones += 1
            product[ones] = product[ones - 1]
            for k in range(ones - 1, 0, -1):
                product[k] = product[k] * z[p] + product[k - 1]
            product[0] *= z[p]
        else:
            scale *= z[p]
    stopped = 0.0
    for k in range(min(ones + 1, d)):
        stopped += weights[d, k] * product[k]
    for p in range(d):
        if not passes >> p & 1:
            added[p] = -scale * stopped
            continue
        rest[ones - 1] = product[ones]  # divided by z + t
        for k in range(ones - 1, 0, -1):
            rest[k - 1] = product[k] - z[p] * rest[k]
        worth = 0.0
        for k in range(ones):
            worth += weights[d, k] * rest[k]
        added[p] = scale * (1 - z[p]) * worth


@compiled
def _paths(feature: Any, leaves: Any, shares: Any) -> Any:
    """Of each leaf, in arrays [leaves, DEEPEST]: the nodes above it, whether it is left of them, and the place of their
    feature among those of its path; these features, and the share of the cover that each lets through. Before them, how
    many nodes and features there are, [leaves]."""
    count = len(leaves)
    length, different = np.zeros(count, np.int64), np.zeros(count, np.int64)
    above, place, names = (
        np.zeros((count, DEEPEST), np.int64), np.zeros((count, DEEPEST), np.int64), np.zeros((count, DEEPEST), np.int64)
    )  # fmt: skip
    leftwards, z = np.zeros((count, DEEPEST), np.bool_), np.ones((count, DEEPEST))
    for j in range(count):
        at = leaves[j]
        while at > 0:
            parent, k, p = (at - 1) // 2, length[j], 0
            above[j, k], leftwards[j, k] = parent, at == 2 * parent + 1
            while p < different[j] and names[j, p] != feature[parent]:
                p += 1
            if p == different[j]:
                names[j, p] = feature[parent]
                different[j] += 1
            place[j, k] = p
            z[j, p] *= shares[at]
            length[j] += 1
            at = parent
    return length, different, above, leftwards, place, names, z


@compiled
def _add(
    x: Any, feature: Any, threshold: Any, mask: Any, default_left: Any, value: Any, shares: Any, weights: Any, out: Any
) -> Any:
    """Add one tree's values to *out*, [num_rows, num_features]; returns what is expected of it."""
    leaves = np.flatnonzero(feature == -1)
    count = len(leaves)
    length, different, above, leftwards, place, names, z = _paths(feature, leaves, shares)
    expected, most = 0.0, 0
    for j in range(count):
        through = value[leaves[j]]
        for p in range(different[j]):
            through *= z[j, p]
        expected += through
        most = max(most, different[j])
    keep = most <= KEPT
    held = most if keep else DEEPEST
    cases, rooms = (1 << most, count) if keep else (1, 1)
    made, adds = np.zeros((rooms, cases), np.bool_), np.zeros((rooms, cases, held))
    product, rest = np.zeros(DEEPEST + 1), np.zeros(DEEPEST + 1)
    left = np.zeros(len(feature), np.bool_)
    for i in range(len(x)):
        for at in range(len(feature)):
            if feature[at] >= 0:
                left[at] = goes_left(x[i, feature[at]], threshold[at], mask[at], default_left[at])
        for j in range(count):
            d = different[j]
            passes = (1 << d) - 1
            for k in range(length[j]):
                if left[above[j, k]] != leftwards[j, k]:
                    passes &= ~(1 << place[j, k])
            room, case = (j, passes) if keep else (0, 0)
            if not made[room, case]:
                _leaf(value[leaves[j]], z[j], d, passes, weights, product, rest, adds[room, case])
                made[room, case] = keep
            for p in range(d):
                out[i, names[j, p]] += adds[room, case, p]
    return expected
