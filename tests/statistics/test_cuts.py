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
        assert smallest == 1 or (parts[[0, -1]].sum(axis=1) >= smallest).all()
    for place in set(order) - set(cuts):  # and no further cut was possible
        more = sorted([*cuts, place])
        parts = np.diff(reached[more], axis=0, prepend=np.zeros((1, 2), int), append=total[None])
        ends = parts[[0, -1]].sum(axis=1)
        assert ((parts > 0) & (parts < smallest)).any() or (smallest > 1 and (ends < smallest).any())


def test_where_every_cell_is_large_every_cut_is_kept() -> None:
    reached = np.cumsum(np.full((9, 2), 5), axis=0)
    assert kept(reached, reached[-1] + 5, halving(9), 5) == list(range(9))


# ---------------------------------------------------------------- extremes


def test_the_first_and_the_last_part_hold_somebody() -> None:
    cells = np.array([[0], [0], [3], [9], [0], [9], [4], [1], [0], [0]])
    reached = np.cumsum(cells, axis=0)
    assert kept(reached[:-1], reached[-1], halving(9), 5) == [3, 4, 5]
    assert kept(reached[:-1], reached[-1], halving(9), 5, ordered=False) == [0, 1, 3, 4, 5, 7, 8]  # names


def test_missing_cells_may_be_nobody_but_the_lowest_values_may_not() -> None:
    for missing in (0, 2, 4, 9):
        reached = np.cumsum([[missing], [0], [1], [3], [9], [9], [0]], axis=0)
        cuts = kept(reached[:-1], reached[-1], range(6), 5, start=0)
        assert (0 in cuts) == (missing in (0, 9))
        assert [cut for cut in cuts if cut] == [4]


@given(
    cells=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=6, max_size=30),
    smallest=st.integers(2, 6),
    data=st.data(),
)
def test_moving_the_highest_people_changes_no_cut(
    cells: list[tuple[int, int]], smallest: int, data: st.DataObject
) -> None:
    people = sorted((place, kind) for place, cell in enumerate(cells) for kind in (0, 1) for _ in range(cell[kind]))
    if len(people) < smallest:
        return
    least = people[-smallest][0]
    places = st.integers(least, len(cells) - 1)
    moved = [*people[: 1 - smallest], *((data.draw(places), kind) for _, kind in people[1 - smallest :])]
    found = []
    for rows in (people, moved):
        counts = np.zeros((len(cells), 2), int)
        np.add.at(counts, tuple(np.array(rows).T), 1)
        reached = np.cumsum(counts, axis=0)
        cuts = kept(reached[:-1], reached[-1], halving(len(cells) - 1), smallest)
        found.append((cuts, reached[cuts].tolist()))
    assert found[0] == found[1]
