"""The best split is the best of all that there are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.models import tree_kernels
from atoll.models.tree_splits import Rules, best_splits, threshold_of, weights_of

WIDE = (-math.inf, math.inf)


@dataclass
class Node:
    """Rows of a node: codes [rows, features], g, h."""

    codes: Any
    g: Any
    h: Any
    sizes: list[int]
    categorical: list[bool]

    @property
    def offsets(self) -> Any:
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @property
    def hist(self) -> Any:
        slot = np.zeros(len(self.codes), np.int32)
        return tree_kernels.histogram(self.codes, self.offsets, slot, self.g, self.h, 1)

    def sums(self, rows: Any) -> tuple[int, int, int]:
        return int(self.g[rows].sum()), int(self.h[rows].sum()), int(np.sum(rows))


@st.composite
def nodes(draw: st.DrawFn, categories: bool = False) -> Node:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, features = draw(st.integers(0, 25)), draw(st.integers(1, 3))
    sizes = [draw(st.integers(2, 6)) for _ in range(features)]
    most = draw(st.sampled_from([2, 10, 1000]))
    codes = random.integers(0, sizes, (rows, features)).astype(np.uint8)
    codes[random.random(codes.shape) < draw(st.sampled_from([0, 0.3]))] = 0
    categorical = [categories and draw(st.booleans()) for _ in range(features)]
    return Node(codes, random.integers(-most, most + 1, rows), random.integers(0, most, rows), sizes, categorical)


def ways(node: Node, f: int) -> Iterator[tuple[int, int, bool, Any]]:
    """(code, mask, default left, the rows that go left) of every split, in the order of preference."""
    codes = node.codes[:, f]
    present = sorted(set(codes.tolist()) - {0})
    if node.categorical[f]:
        for n in range(len(present), 0, -1):
            for right in itertools.combinations(present, n):
                for default in (True, False):
                    mask = sum(1 << (code - 1) for code in right)
                    yield 0, mask, default, np.where(codes == 0, default, ~np.isin(codes, right))
    else:
        for code in range(node.sizes[f] - 1):
            for default in (True, False):
                yield code, 0, default, np.where(codes == 0, default, codes <= code)


def weight(sums: tuple[int, int, int], rules: Rules, bounds: tuple[float, float]) -> float:
    return min(max(-(sums[0] * rules.g_unit) / (sums[1] * rules.h_unit + rules.l2), bounds[0]), bounds[1])


def score(sums: tuple[int, int, int], rules: Rules, bounds: tuple[float, float]) -> float:
    g, h = sums[0] * rules.g_unit, sums[1] * rules.h_unit + rules.l2
    if bounds == WIDE:
        return g * g / h
    w = weight(sums, rules, bounds)
    return -(2 * g * w + h * w * w)


def best_of_all(
    node: Node, rules: Rules, sign: dict[int, int] | None = None, bounds: tuple[float, float] = WIDE
) -> tuple[float, tuple[int, int, int, bool] | None]:
    """By trying everything: (gain, (feature, code, mask, default left))."""
    best: tuple[float, tuple[int, int, int, bool] | None] = (0.0, None)
    whole = node.sums(np.ones(len(node.codes), bool))
    if whole[1] * rules.h_unit + rules.l2 <= 0:
        return best
    parent = 0.5 * score(whole, rules, bounds)
    for f in range(len(node.sizes)):
        for code, mask, default, rows in ways(node, f):
            left, right = node.sums(rows), node.sums(~np.asarray(rows, bool))
            least = min(left[2], right[2]) >= max(rules.min_rows, 1)
            heavy = min(left[1], right[1]) * rules.h_unit
            if not least or heavy < rules.min_child_weight or heavy + rules.l2 <= 0:
                continue
            a, b = weight(left, rules, bounds), weight(right, rules, bounds)
            if sign and (b - a) * sign.get(f, 0) < 0:
                continue
            found = 0.5 * (score(left, rules, bounds) + score(right, rules, bounds))
            if found - parent > 1e-12 * found and found - parent - rules.min_split_gain > best[0]:
                best = (found - parent - rules.min_split_gain, (f, code, mask, default))
    return best


def chosen(found: Any) -> tuple[int, int, int, bool] | None:
    if found.feature[0] < 0:
        return None
    return int(found.feature[0]), int(found.code[0]), int(found.mask[0]), bool(found.default_left[0])


def check_sums(node: Node, found: Any) -> None:
    """The sums that are told are those of the rows that go there."""
    if found.feature[0] < 0:
        assert found.gain[0] == 0 and not found.left.any() and not found.right.any()
        return
    tree = [np.full(3, -1, np.int32), np.zeros(3, np.int32), np.zeros(3, np.uint64), np.zeros(3, bool)]
    for array, told in zip(tree, (found.feature, found.code, found.mask, found.default_left), strict=True):
        array[0] = told[0]
    at = tree_kernels.route(node.codes, np.zeros(len(node.codes), np.int32), *tree)
    assert tuple(found.left[0]) == node.sums(at == 1)
    assert tuple(found.right[0]) == node.sums(at == 2)


rules = st.builds(
    Rules,
    l2=st.sampled_from([0.0, 1.0, 3.5]),
    min_split_gain=st.sampled_from([0.0, 0.5, 20.0]),
    min_child_weight=st.sampled_from([0.0, 1.0, 8.0]),
    min_rows=st.integers(0, 4),
    g_unit=st.sampled_from([1.0, 0.125]),
    h_unit=st.sampled_from([1.0, 0.25]),
)


@given(nodes(), rules)
def test_thresholds_are_the_best_of_all(node: Node, asked: Rules) -> None:
    found = best_splits(node.hist, node.offsets, asked)
    gain, split = best_of_all(node, asked)
    assert chosen(found) == split
    assert found.gain[0] == gain
    check_sums(node, found)


@given(nodes(categories=True), st.sampled_from([1.0, 0.125]))
def test_some_prefix_of_categories_is_the_best_of_all_subsets(node: Node, unit: float) -> None:
    """Without λ, where that is a theorem."""
    node.h += 1
    asked = Rules(l2=0.0, min_child_weight=0.0, g_unit=unit, h_unit=unit)
    found = best_splits(node.hist, node.offsets, asked, categorical=np.array(node.categorical))
    gain, split = best_of_all(node, asked)
    assert found.gain[0] == pytest.approx(gain, rel=1e-9)
    assert (found.feature[0] < 0) == (split is None)
    check_sums(node, found)


@given(nodes(categories=True), rules)
def test_what_is_told_of_a_subset_holds(node: Node, asked: Rules) -> None:
    found = best_splits(node.hist, node.offsets, asked, categorical=np.array(node.categorical))
    check_sums(node, found)
    if found.feature[0] < 0:
        return
    left, right = ((int(s[0]), int(s[1]), int(s[2])) for s in (found.left[0], found.right[0]))
    whole = (left[0] + right[0], left[1] + right[1], left[2] + right[2])
    gain = 0.5 * (score(left, asked, WIDE) + score(right, asked, WIDE) - score(whole, asked, WIDE))
    assert found.gain[0] == pytest.approx(gain - asked.min_split_gain, rel=1e-9, abs=1e-9)
    assert min(left[2], right[2]) >= max(asked.min_rows, 1)
    assert min(left[1], right[1]) * asked.h_unit >= asked.min_child_weight
    assert gain <= best_of_all(node, asked)[0] + asked.min_split_gain + 1e-9 * abs(gain)


signs = st.lists(st.integers(-1, 1), min_size=3, max_size=3)
limits = st.sampled_from([WIDE, (-0.3, 0.4), (0.0, math.inf), (-math.inf, -0.2), (0.1, 0.1)])


@given(nodes(), rules, signs, limits)
def test_constraints_hold(node: Node, asked: Rules, sign: list[int], bounds: tuple[float, float]) -> None:
    monotone = np.array(sign[: len(node.sizes)], np.int8)
    found = best_splits(node.hist, node.offsets, asked, monotone=monotone, bounds=np.array([bounds]))
    gain, split = best_of_all(node, asked, dict(enumerate(sign)), bounds)
    assert chosen(found) == split
    assert found.gain[0] == gain
    check_sums(node, found)
    way = monotone[found.feature[0]] if split else 0
    left, right = found.left_bounds[0], found.right_bounds[0]
    if way == 0:
        assert tuple(left) == tuple(right) == bounds
        return
    a, b = weights_of(np.stack([found.left[0], found.right[0]]), asked, np.array([bounds, bounds]))
    assert way * (b - a) >= 0
    below, above = (left, right) if way > 0 else (right, left)
    assert (below[0], above[1]) == bounds
    assert below[1] == above[0]
    assert min(a, b) - 1e-12 <= below[1] <= max(a, b) + 1e-12


def test_equal_splits_go_to_the_lowest_feature_then_code_then_left() -> None:
    codes = np.array([[1, 1, 1], [1, 1, 1], [4, 4, 4], [4, 4, 4]], np.uint8)
    node = Node(codes, np.array([-3, -3, 3, 3]), np.ones(4, np.int64), [6, 6, 6], [False] * 3)
    found = best_splits(node.hist, node.offsets, Rules())
    assert chosen(found) == (0, 1, 0, True)
    allowed = np.array([[False, True, True]])
    assert chosen(best_splits(node.hist, node.offsets, Rules(), allowed=allowed)) == (1, 1, 0, True)
    none = best_splits(node.hist, node.offsets, Rules(), allowed=~np.ones((1, 3), bool))
    assert chosen(none) is None


def test_missing_cells_alone_can_be_split_off() -> None:
    codes = np.array([[0], [0], [1], [3]], np.uint8)
    for kinds, wanted in (([False], (0, 0, 0, True)), ([True], (0, 0, 0b101, True))):
        node = Node(codes, np.array([-3, -3, 3, 3]), np.ones(4, np.int64), [4], kinds)
        found = best_splits(node.hist, node.offsets, Rules(), categorical=np.array(kinds))
        assert chosen(found) == wanted
        check_sums(node, found)
    edges = np.array([1.5, 2.5], np.float32)
    assert [threshold_of(edges, code) for code in (0, 1, 2)] == [-float(np.finfo(np.float32).max), 1.5, 2.5]


def test_all_53_categories_fit() -> None:
    codes = np.arange(54, dtype=np.uint8)[:, None]
    g = np.where(np.arange(54) % 2, 5, -5)
    node = Node(codes, g, np.ones(54, np.int64), [54], [True])
    found = best_splits(node.hist, node.offsets, Rules(), categorical=np.array([True]))
    assert int(found.mask[0]) == sum(1 << code for code in range(53) if (code + 1) % 2)
    assert bool(found.default_left[0])
    check_sums(node, found)


def test_nodes_are_each_for_themselves() -> None:
    random, sizes = np.random.default_rng(3), [20, 5, 40]
    codes = random.integers(0, sizes, (400, 3)).astype(np.uint8)
    g, h = random.integers(-9, 10, 400), random.integers(0, 9, 400)
    slot, offsets = random.integers(0, 7, 400).astype(np.int32), np.concatenate([[0], np.cumsum(sizes)])
    hist = tree_kernels.histogram(codes, offsets, slot, g, h, 7)
    together = best_splits(hist, offsets, Rules())
    for s in range(7):
        alone = best_splits(hist[s : s + 1], offsets, Rules())
        assert chosen(alone) is not None
        assert (alone.gain[0], alone.feature[0], alone.code[0]) == (
            together.gain[s], together.feature[s], together.code[s],
        )  # fmt: skip
        rows = slot == s
        node = Node(codes[rows], g[rows], h[rows], sizes, [False] * 3)
        check_sums(node, alone)


def test_noisy_sums_never_break_it() -> None:
    """Counts and Hessians below zero, features that do not add up to the same: found is finite, or nothing."""
    random = np.random.default_rng(8)
    offsets = np.array([0, 6, 12, 15])
    for _ in range(300):
        hist = random.integers(-50, 50, (3, 15, 3))
        found = best_splits(
            hist, offsets, Rules(l2=0.0, min_child_weight=0.0, min_rows=0), categorical=np.array([False, True, False]),
            monotone=np.array([1, 0, -1], np.int8),
        )  # fmt: skip
        assert np.isfinite(found.gain).all() and (found.gain >= 0).all()
        split = found.feature >= 0
        assert (found.left[split, 1:] > 0).all() and (found.right[split, 1:] > 0).all()
        assert np.isfinite(weights_of(found.left, Rules(l2=0.0))).all()


def test_weights_of_leaves() -> None:
    sums = np.array([[-6, 2, 3], [4, 0, 1], [0, -3, 0]])
    assert weights_of(sums, Rules(l2=1.0, g_unit=0.5, h_unit=2.0)).tolist() == [0.6, -2.0, 0.0]
    assert weights_of(sums, Rules(), np.array([[0, 1], [-1, 1], [0.5, 1]])).tolist() == [1.0, -1.0, 0.5]
