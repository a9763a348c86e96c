"""Trees' inner loops: they are what plain numpy and Python say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.models import tree_kernels

FURTHEST = float(np.finfo(np.float32).max)
cell = st.one_of(
    st.floats(width=32, allow_infinity=False), st.floats(), st.sampled_from([0.0, -0.0, 0.1, 1e300, -1e300, np.nan])
)


@given(st.lists(cell, max_size=40), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=253))
def test_codes_count_the_edges_that_are_not_above(values: list[float], drawn: list[float]) -> None:
    edges = np.unique(np.array(drawn, np.float32))
    column = np.array(values, np.float64)
    found = tree_kernels.to_codes(column, edges)
    single = np.clip(column, -FURTHEST, FURTHEST).astype(np.float32)
    wanted = np.where(np.isnan(column), 0, 1 + np.searchsorted(edges, single, side="right"))
    assert found.dtype == np.uint8
    assert found.tolist() == wanted.tolist()


def test_all_codes_are_used() -> None:
    edges = np.arange(253, dtype=np.float32)
    values = np.append(np.arange(-1, 253) + 0.5, np.nan)
    assert tree_kernels.to_codes(values, edges).tolist() == [*range(1, 255), 0]
    assert tree_kernels.to_codes(np.repeat(values, 2)[::2], edges).tolist() == [*range(1, 255), 0]  # not contiguous
    assert not len(tree_kernels.to_codes(np.empty(0), edges))


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(1, 4), st.integers(1, 5))
def test_histograms_are_exact_sums(seed: int, rows: int, features: int, slots: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 255, features)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    codes = random.integers(0, sizes, (rows, features)).astype(np.uint8)
    slot = random.integers(-1, slots, rows).astype(np.int32)
    most = 2 ** int(random.integers(1, 56))
    g, h = random.integers(-most, most, rows), random.integers(-most // 4, most, rows)
    wanted = np.zeros((slots, offsets[-1], 3), np.int64)
    some = slot >= 0
    for f in range(features):
        cells = (slot[some], offsets[f] + codes[some, f])
        np.add.at(wanted, cells, np.column_stack([g, h, np.ones(rows, np.int64)])[some])
    found = tree_kernels.histogram(codes, offsets, slot, g, h, slots)
    assert found.dtype == np.int64
    assert np.array_equal(found, wanted)
    order = random.permutation(rows)
    again = tree_kernels.histogram(codes[order], offsets, slot[order], g[order], h[order], slots)
    assert np.array_equal(again, wanted)


def grown(random: np.random.Generator, trees: int, depth: int, sizes: list[int]) -> dict[str, Any]:
    """Random trees over numbers (a size of 0) and categories."""
    nodes = 2 ** (depth + 1) - 1
    found: dict[str, Any] = {
        "feature": np.full((trees, nodes), -2, np.int32), "threshold": np.zeros((trees, nodes), np.float32),
        "mask": np.zeros((trees, nodes), np.uint64), "default_left": random.random((trees, nodes)) < 0.5,
        "value": np.zeros((trees, nodes)),
    }  # fmt: skip
    for t in range(trees):
        pending = [0]
        while pending:
            at = pending.pop()
            if 2 * at + 1 >= nodes or random.random() < 0.2:
                found["feature"][t, at], found["value"][t, at] = -1, random.normal()
                continue
            f = int(random.integers(len(sizes)))
            found["feature"][t, at] = f
            if sizes[f]:
                found["mask"][t, at] = random.integers(1, 2 ** sizes[f])
            else:
                found["threshold"][t, at] = random.integers(-3, 4)
            pending += [2 * at + 1, 2 * at + 2]
    return found


def walked(row: Any, trees: dict[str, Any], t: int) -> int:
    """The leaf of one row, as the definition says."""
    at = 0
    while trees["feature"][t, at] >= 0:
        x, mask = row[trees["feature"][t, at]], int(trees["mask"][t, at])
        if np.isnan(x):
            left = bool(trees["default_left"][t, at])
        else:
            left = not mask >> int(x) & 1 if mask else bool(x < trees["threshold"][t, at])
        at = 2 * at + (1 if left else 2)
    return at


def drawn(random: np.random.Generator, rows: int, sizes: list[int]) -> Any:
    columns = [random.integers(0, n, rows) if n else random.integers(-4, 5, rows) for n in sizes]
    found = np.column_stack(columns).astype(np.float32)
    return np.where(random.random(found.shape) < 0.2, np.float32(np.nan), found)


@pytest.mark.parametrize("rows", [0, 1, 300, 700])
@pytest.mark.parametrize("outputs", [1, 3])
def test_prediction_is_a_walk(rows: int, outputs: int) -> None:
    random, sizes = np.random.default_rng(rows + outputs), [0, 53, 0, 4]
    trees, x = grown(random, 4 * outputs, 5, sizes), drawn(random, rows, sizes)
    base = random.normal(size=outputs)
    leaves = np.array([[walked(row, trees, t) for t in range(4 * outputs)] for row in x], np.int64)
    leaves = leaves.reshape(rows, 4 * outputs)
    splits = {name: trees[name] for name in ("feature", "threshold", "mask", "default_left")}
    assert np.array_equal(tree_kernels.leaf_of(x, **splits), leaves)
    wanted = np.tile(base, (rows, 1))
    for t in range(4 * outputs):
        wanted[:, t % outputs] += trees["value"][t][leaves[:, t]]
    assert tree_kernels.predict(x, **trees, base=base).tobytes() == wanted.tobytes()
    assert np.array_equal(tree_kernels.predict(x[::2], **trees, base=base), wanted[::2])


def test_routing_by_codes_comes_to_the_same_leaves() -> None:
    random, sizes, depth = np.random.default_rng(5), [0, 53, 0, 4], 5
    trees, x = grown(random, 6, depth, sizes), drawn(random, 500, sizes)
    edges = np.arange(-3, 4, dtype=np.float32)
    codes = np.column_stack([
        np.where(np.isnan(x[:, f]), 0, x[:, f] + 1).astype(np.uint8) if n else tree_kernels.to_codes(x[:, f], edges)
        for f, n in enumerate(sizes)
    ])  # fmt: skip
    for t in range(6):
        split_code = np.searchsorted(edges, trees["threshold"][t]).astype(np.int32) + 1
        node = np.zeros(len(x), np.int32)
        node[::10] = -1
        for _ in range(depth):
            node = tree_kernels.route(
                codes, node, trees["feature"][t], split_code, trees["mask"][t], trees["default_left"][t]
            )
        wanted = np.array([walked(row, trees, t) for row in x])
        wanted[::10] = -1
        assert np.array_equal(node, wanted)
