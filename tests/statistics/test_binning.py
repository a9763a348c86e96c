"""Bins merged to the largest information value: against all ways to merge, and WOE as it must run."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.statistics.binning import pooled, segmented, woe_iv


@settings(max_examples=80)
@given(
    counts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=7),
    bins=st.integers(2, 5),
    least=st.sampled_from([1, 15, 40]),
    direction=st.sampled_from([-1, 0, 1]),
)
def test_optimal_is_the_best_of_all_ways_to_merge(
    counts: list[tuple[int, int]], bins: int, least: int, direction: int
) -> None:
    parts, labels = np.array(counts), np.array([100, 100])
    best = -math.inf
    for number in range(min(bins, len(parts))):
        for inner in itertools.combinations(range(1, len(parts)), number):
            sums = np.add.reduceat(parts, [0, *inner])
            values, iv = woe_iv(sums, labels, 0.5)
            if (sums.sum(axis=1) >= least).all() and (not direction or (direction * np.diff(values) > 0).all()):
                best = max(best, iv.sum())
    found, ends = segmented(parts, labels, bins, least, 0.5, direction)
    assert found == pytest.approx(best, rel=1e-12, abs=1e-15)
    assert ends[-1] == len(parts)
    assert len(ends) <= bins
    if best > -math.inf:
        assert woe_iv(np.add.reduceat(parts, [0, *ends[:-1]]), labels, 0.5)[1].sum() == pytest.approx(best, abs=1e-12)


@given(counts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=9))
def test_pooled_blocks_are_monotone(counts: list[tuple[int, int]]) -> None:
    parts, labels = np.array(counts), np.array([100, 100])
    blocks = pooled([[i] for i in range(len(parts))], parts, labels, 0.5, 1)
    assert [i for block in blocks for i in block] == list(range(len(parts)))
    values = woe_iv(np.array([parts[block].sum(axis=0) for block in blocks]), labels, 0.5)[0]
    assert len(values) == 1 or (np.diff(values) > 0).all()
