"""Cuts leave no part with a small group, and sites that could all cut, cut alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.statistics.cuts import halving, kept


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 100])
def test_halving_takes_each_place_once(size: int) -> None:
    assert sorted(halving(size)) == list(range(size))


def test_halving_starts_in_the_middle() -> None:
    assert halving(7) == [3, 1, 5, 0, 2, 4, 6]


@given(
    cells=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40),
    smallest=st.integers(1, 8),
)
def test_no_part_between_cuts_holds_a_small_group(cells: list[tuple[int, int]], smallest: int) -> None:
    reached = np.cumsum(np.array(cells), axis=0)
    total, order = reached[-1], halving(len(cells) - 1)
    cuts = kept(reached[:-1], total, order, smallest)
    assert cuts == sorted(set(cuts))
    parts = np.diff(reached[cuts], axis=0, prepend=np.zeros((1, 2), int), append=total[None])
    if cuts:
        assert ((parts == 0) | (parts >= smallest)).all()
    for place in set(order) - set(cuts):  # and no further cut was possible
        more = sorted([*cuts, place])
        parts = np.diff(reached[more], axis=0, prepend=np.zeros((1, 2), int), append=total[None])
        assert ((parts > 0) & (parts < smallest)).any()


def test_where_every_cell_is_large_every_cut_is_kept() -> None:
    reached = np.cumsum(np.full((9, 2), 5), axis=0)
    assert kept(reached, reached[-1] + 5, halving(9), 5) == list(range(9))
