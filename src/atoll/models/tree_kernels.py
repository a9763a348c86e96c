"""Inner loops of trees, compiled: bins, histograms, routing and prediction.

Import it inside functions only: numba takes long to load, and every program is loaded at each start.

A table is *codes*, uint8 [num_rows, num_features] in C order: 0 where a cell is missing, else 1 + the number of edges
that are ≤ float32(x); a category c is 1 + c. Cells of all features stand side by side: those of feature f are
offsets[f] … offsets[f + 1] − 1, the first of them for missing, offsets int64 [num_features + 1].

All kernels release the GIL. Sums are of integers, so that they are exact and do not depend on the order.

Sources: Chen & Guestrin 2016, XGBoost (KDD), §3.3; Ke et al. 2017, LightGBM (NeurIPS), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

FURTHEST = np.finfo(np.float32).max
"""Values beyond it, either way, count as it: float32 has no infinities here."""
Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def compiled(kernel: Kernel) -> Kernel:
    """*kernel* by numba: without the GIL, kept on disk, division by zero as numpy has it."""
    return cast(Kernel, njit(nogil=True, cache=True, error_model="numpy")(kernel))


def to_codes(values: NDArray[np.float64], edges: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of a numeric column, [num_rows]. edges: finite, strictly rising, at most 253."""
    ladder = np.full(256, np.inf, np.float32)
    ladder[: len(edges)] = edges
    codes = np.empty(len(values), np.uint8)
    _to_codes(np.ascontiguousarray(values, np.float64), ladder, codes)
    return codes


@compiled
def _to_codes(values: Any, ladder: Any, codes: Any) -> None:
    for i in range(len(values)):
        x = np.float32(min(max(values[i], -FURTHEST), FURTHEST))
        at = np.uintp(0)
        for step in (128, 64, 32, 16, 8, 4, 2, 1):  # a binary search without branches
            at += np.uintp(step) * np.uintp(ladder[at + np.uintp(step - 1)] <= x)
        codes[i] = 0 if np.isnan(values[i]) else 1 + at


def histogram(
    codes: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    slot: NDArray[np.int32],
    g: NDArray[np.int64],
    h: NDArray[np.int64],
    num_slots: int,
) -> NDArray[np.int64]:
    """(Σ g, Σ h, rows) of every cell of every slot, int64 [num_slots, offsets[-1], 3].

    slot: of each row, −1 for a row that counts nowhere, [num_rows]. g, h: integers, [num_rows]. It takes about one
    nanosecond for each row and feature, as long as a slot's cells fit the cache.
    """
    out = np.zeros((num_slots, int(offsets[-1]), 3), np.int64)
    _histogram(
        np.ascontiguousarray(codes, np.uint8), np.asarray(offsets[:-1], np.uint32),
        np.ascontiguousarray(slot, np.int32), np.ascontiguousarray(g, np.int64), np.ascontiguousarray(h, np.int64), out,
    )  # fmt: skip
    return out


@compiled
def _histogram(codes: Any, begins: Any, slot: Any, g: Any, h: Any, out: Any) -> None:
    features = np.uintp(codes.shape[1])  # unsigned places spare numpy's counting from the end: a third of the time
    for i in range(len(codes)):
        if slot[i] < 0:
            continue
        cells, row, g_here, h_here = out[np.uintp(slot[i])], codes[i], g[i], h[i]
        f = np.uintp(0)
        while f < features:
            cell = np.uintp(begins[f]) + np.uintp(row[f])
            cells[cell, 0] += g_here
            cells[cell, 1] += h_here
            cells[cell, 2] += 1
            f += np.uintp(1)


def route(
    codes: NDArray[np.uint8],
    node: NDArray[np.int32],
    feature: NDArray[np.int32],
    split_code: NDArray[np.int32],
    mask: NDArray[np.uint64],
    default_left: NDArray[np.bool_],
) -> NDArray[np.int32]:
    """Each row's node one level down, int32 [num_rows]; a row at a leaf, or nowhere (−1), stays.

    node: of each row, in heap order. feature (below 0: a leaf), split_code, mask, default_left: of one tree's nodes,
    [num_nodes]. A row goes left where its code ≤ split_code; if mask is not 0, unless the bit code − 1 of it is set;
    where it is missing, by default_left.
    """
    below: NDArray[np.int32] = _route(
        codes, node, np.ascontiguousarray(feature, np.int32), np.ascontiguousarray(split_code, np.int32),
        np.ascontiguousarray(mask, np.uint64), np.ascontiguousarray(default_left, np.bool_),
    )  # fmt: skip
    return below


@compiled
def _route(codes: Any, node: Any, feature: Any, split_code: Any, mask: Any, default_left: Any) -> Any:
    below = np.empty(len(node), np.int32)
    for i in range(len(node)):
        at = node[i]
        if at < 0 or feature[at] < 0:
            below[i] = at
            continue
        code = codes[i, feature[at]]
        if code == 0:
            left = default_left[at]
        elif mask[at] != 0:
            left = (mask[at] >> np.uint64(code - 1)) & np.uint64(1) == 0
        else:
            left = code <= split_code[at]
        below[i] = 2 * at + 1 if left else 2 * at + 2
    return below


def predict(
    x: NDArray[np.float32],
    feature: NDArray[np.int32],
    threshold: NDArray[np.float32],
    mask: NDArray[np.uint64],
    default_left: NDArray[np.bool_],
    value: NDArray[np.float64],
    base: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Margins of rows: base + Σ leaf values, trees in order, float64 [num_rows, outputs].

    x: of raw values, NaN where missing, a category as its place in the code list, [num_rows, num_features].
    The others: of nodes, [num_trees, num_nodes]; mask is 0 where a split is by threshold. base: [outputs].
    """
    found: NDArray[np.float64] = _predict(np.ascontiguousarray(x), feature, threshold, mask, default_left, value, base)
    return found


@compiled
def _left(x: Any, threshold: Any, mask: Any, default_left: Any) -> Any:
    if np.isnan(x):
        return default_left
    if mask != 0:
        return (mask >> np.uint64(x)) & np.uint64(1) == 0
    return x < threshold


@compiled
def _predict(x: Any, feature: Any, threshold: Any, mask: Any, default_left: Any, value: Any, base: Any) -> Any:
    outputs = len(base)
    found = np.empty((len(x), outputs))
    for first in range(0, len(x), 256):  # rows that stay in the cache while all trees see them
        last = min(first + 256, len(x))
        for i in range(first, last):
            for k in range(outputs):
                found[i, k] = base[k]
        for t in range(len(feature)):
            for i in range(first, last):
                at = 0
                while feature[t, at] >= 0:
                    left = _left(x[i, feature[t, at]], threshold[t, at], mask[t, at], default_left[t, at])
                    at = 2 * at + 1 if left else 2 * at + 2
                found[i, t % outputs] += value[t, at]
    return found


def leaf_of(
    x: NDArray[np.float32],
    feature: NDArray[np.int32],
    threshold: NDArray[np.float32],
    mask: NDArray[np.uint64],
    default_left: NDArray[np.bool_],
) -> NDArray[np.int32]:
    """The leaf that each row comes to in each tree, in heap order, int32 [num_rows, num_trees]; see :func:`predict`."""
    found: NDArray[np.int32] = _leaf_of(np.ascontiguousarray(x), feature, threshold, mask, default_left)
    return found


@compiled
def _leaf_of(x: Any, feature: Any, threshold: Any, mask: Any, default_left: Any) -> Any:
    found = np.empty((len(x), len(feature)), np.int32)
    for t in range(len(feature)):
        for i in range(len(x)):
            at = 0
            while feature[t, at] >= 0:
                left = _left(x[i, feature[t, at]], threshold[t, at], mask[t, at], default_left[t, at])
                at = 2 * at + 1 if left else 2 * at + 2
            found[i, t] = at
    return found
