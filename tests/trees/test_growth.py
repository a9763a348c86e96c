"""Growth from sums alone: what is asked, what follows, and that anybody may drive it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import ProtocolError
from atoll.models.tree_splits import Rules
from atoll.models.trees import COVER, FEATURE, LEAF, THRESHOLD, UNUSED
from atoll.trees.binning import Bins
from atoll.trees.growth import Batch, Growing, Rows, drawn
from atoll.trees.noisy import mended

EDGES = np.array([-1, -0.5, 0, 0.5, 1], np.float32)
BINS = Bins(("a", "b", "k"), (EDGES, EDGES[:2], np.empty(0, np.float32)), np.array([0, 0, 4]))


def rows(seed: int, n: int, trees: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    codes = np.column_stack([random.integers(0, size, n) for size in (7, 4, 5)]).astype(np.uint8)
    signal = (codes[:, 0] > 3) * 2.0 + (codes[:, 2] == 2) - 1
    g = np.stack([signal * (-1) ** tree + random.normal(0, 0.3, n) for tree in range(trees)], axis=1)
    return codes, np.rint(g * 2**16).astype(np.int64), np.full((n, trees), 2**16, np.int64)


RULES = Rules(l2=1.0, min_child_weight=0.0, min_rows=3, g_unit=2.0**-16, h_unit=2.0**-16)


def grown(parts: list[Any], trees: int, depth: int, rules: Rules = RULES, **more: Any) -> tuple[Batch, list[int]]:
    """A batch on the rows of some parties, and how many nodes each level asked."""
    batch = Batch(trees, depth, BINS)
    growing, held, asked = Growing(batch, rules, 0.5, **more), [Rows(codes, trees) for codes, _, _ in parts], []
    while not growing.done:
        level = 0
        while len(places := growing.wanted()):
            level += len(places)
            nodes = batch.open[places]
            sums = [
                mine.sums(BINS.offsets, nodes, g, h, batch.words.shape[1])
                for mine, (_, g, h) in zip(held, parts, strict=True)
            ]
            growing.told(places, np.sum(sums, axis=0), "all")
        asked.append(level)
        growing.decide()
        for mine in held:
            mine.descend(batch)
    return batch, asked


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(0, 80), min_size=1, max_size=4))
def test_subtraction_and_parts_do_not_change_a_bit(seed: int, trees: int, depth: int, sizes: list[int]) -> None:
    parts = [rows(seed + i, n, trees) for i, n in enumerate(sizes)]
    whole = [tuple(np.concatenate(each) for each in zip(*parts, strict=True))]
    one, asked = grown(parts, trees, depth)
    other, _ = grown(whole, trees, depth)
    assert one.words.tobytes() == other.words.tobytes()
    every, all_asked = grown(whole, trees, depth, subtract=False)
    same = every.words[:, :, :4] == one.words[:, :, :4]
    assert same.all(), "asking all nodes finds the same"
    assert sum(asked) <= sum(all_asked)
    assert all(n <= trees * max(2 ** (level - 1), 1) for level, n in enumerate(asked))


def test_trees_are_whole_and_leaves_hold_enough_rows() -> None:
    codes, g, h = rows(1, 400, 2)
    batch, _ = grown([(codes, g, h)], 2, 4, Rules(min_rows=20, min_child_weight=0, g_unit=2.0**-16, h_unit=2.0**-16))
    feature = batch.words[:, :, FEATURE]
    inner = feature.shape[1] // 2
    for tree in range(2):
        for node in range(inner):
            below = feature[tree, [2 * node + 1, 2 * node + 2]]
            assert ((below != UNUSED) == (feature[tree, node] >= 0)).all()
    leaves = feature == LEAF
    assert batch.words[leaves][:, COVER].min() >= 20
    np.testing.assert_allclose(np.where(leaves, batch.words[:, :, COVER], 0).sum(axis=1), 400)
    node = Rows(codes, 2)
    for _ in range(4):
        node.descend(batch)
    for tree in range(2):
        for leaf in np.unique(node.node[tree]):
            here = node.node[tree] == leaf
            value = -g[here, tree].sum() / (h[here, tree].sum() + 2**16) * 0.5
            assert batch.words[tree, leaf, THRESHOLD] == np.float32(value)


def test_nobody_is_asked_about_nodes_that_cannot_split() -> None:
    codes, g, h = rows(2, 40, 1)
    _, asked = grown([(codes, g, h)], 1, 5, Rules(min_rows=15, min_child_weight=0, g_unit=2.0**-16, h_unit=2.0**-16))
    assert asked[0] == 1
    assert sum(asked[2:]) == 0


def test_a_sibling_is_wanted_where_the_sums_are_of_others() -> None:
    codes, g, h = rows(3, 300, 1)
    batch = Batch(1, 2, BINS)
    growing, held = Growing(batch, RULES), Rows(codes, 1)
    growing.told(growing.wanted(), held.sums(BINS.offsets, batch.open, g, h, 7), ("a", "b"))
    growing.decide()
    held.descend(batch)
    first = growing.wanted()
    assert len(first) == 1
    growing.told(first, held.sums(BINS.offsets, batch.open[first], g, h, 7), ("a",))
    second = growing.wanted()
    assert second.tolist() == [1 - first[0]]
    growing.told(second, held.sums(BINS.offsets, batch.open[second], g, h, 7), ("a",))
    assert not len(growing.wanted())


def test_excluded_rows_go_along_but_do_not_count() -> None:
    codes, g, h = rows(4, 100, 2)
    included = np.random.default_rng(1).random((2, 100)) < 0.5
    some = Rows(codes, 2, included).sums(BINS.offsets, np.array([[0, 0], [1, 0]]), g, h, 3)
    for tree in range(2):
        mine = included[tree]
        alone = Rows(codes[mine], 2).sums(BINS.offsets, np.array([[tree, 0]]), g[mine], h[mine], 3)
        assert np.array_equal(some[tree], alone[0])


def test_totals_are_the_histograms_sums() -> None:
    codes, g, h = rows(5, 100, 2)
    batch, _ = grown([(codes, g, h)], 2, 2)
    held = Rows(codes, 2)
    for _ in range(2):
        held.descend(batch)
    nodes = np.array([[0, 3], [0, 4], [1, 5], [1, 6]])
    totals = held.totals(nodes, g, h, 7)
    assert np.array_equal(totals, held.sums(BINS.offsets, nodes, g, h, 7)[:, :7].sum(axis=1))


def test_drawn_trees_are_complete_and_use_every_kind_of_feature() -> None:
    batch = Batch(3, 5, BINS)
    told = drawn(batch, np.random.default_rng(1))
    assert len(told) == 5
    assert len(batch.open) == 3 * 32
    inner = batch.words[:, :31, FEATURE]
    assert set(np.unique(inner)) == {0, 1, 2}
    again = Batch(3, 5, BINS)
    for words in told:
        again.apply(words)
    assert again.words.tobytes() == batch.words.tobytes()
    none = Batch(1, 3, Bins(("a",), (np.empty(0, np.float32),), np.zeros(1, np.int64)))
    assert drawn(none, np.random.default_rng(1)) == []


@pytest.mark.parametrize("width", [4, 6])
def test_words_of_another_shape_are_refused(width: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        Batch(2, 3, BINS).apply(np.zeros((2, width)))
    assert caught.value.code == "trees.bad-record"


def test_features_agree_on_a_nodes_totals_after_noise() -> None:
    random = np.random.default_rng(1)
    g, h = random.normal(0, 1000, (5, 16)), random.normal(100, 300, (5, 16))
    found = mended(g, h, BINS.offsets)
    starts = BINS.offsets[:-1]
    for word in (0, 1):
        totals = np.add.reduceat(found[..., word], starts, axis=1)
        assert (totals == totals[:, :1]).all()
    assert (np.add.reduceat(found[..., 1], starts, axis=1) >= 0).all()
    exact = random.integers(0, 50, (2, 5)).astype(float)
    cells = np.zeros((2, 16))
    cells[:, :5], cells[:, 7:12], cells[:, 11:16] = exact, 0, 0
    cells[:, 7:11], cells[:, 11:16] = exact[:, :4], 0
    cells[:, 7] += exact[:, 4]
    cells[:, 11] = exact.sum(axis=1)
    assert np.array_equal(mended(cells, cells, BINS.offsets)[..., 0], cells.astype(np.int64)), "sums that agree stay"
