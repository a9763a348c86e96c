"""Chains of transmission within one region; across regions nothing is claimed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from atoll.blueprints.epidemic.generator import YANGTZE_DELTA
from atoll.blueprints.epidemic.line_list import ELSEWHERE, NEAR, line_list
from atoll.blueprints.epidemic.links import NOT_YET, chains, told
from atoll.blueprints.epidemic.outbreak import simulate
from atoll.contract.errors import SchemaError


def test_chains_by_hand() -> None:
    cases = np.array(["a", "b", "c", "d", "e"], object)
    linked = np.array([None, "a", "b", "elsewhere", ""], object)
    found = chains(cases, linked)
    assert found.chain.tolist() == [0, 0, 0, 1, 2]
    assert found.size.tolist() == [3, 1, 1]
    assert found.infector.tolist() == [-1, 0, 1, -1, -1]
    assert found.outside.tolist() == [3]
    assert found.index_cases.tolist() == [0, 3, 4]


@given(st.lists(st.integers(0, 40), max_size=40))
def test_chains_are_the_connected_components(parents: list[int]) -> None:
    cases = np.array([f"c{i}" for i in range(len(parents))], object)
    linked = np.array([None if p == i else f"c{p}" for i, p in enumerate(parents)], object)
    inside = [(i, p) for i, p in enumerate(parents) if p < len(parents)]
    graph = coo_matrix((np.ones(len(inside)), np.array(inside, int).reshape(-1, 2).T), (len(parents),) * 2)
    number, labels = connected_components(graph, directed=False) if parents else (0, np.empty(0))
    found = chains(cases, linked)
    assert len(found.size) == number
    assert len({*zip(found.chain.tolist(), labels.tolist(), strict=True)}) == number
    assert found.outside.tolist() == [i for i, p in enumerate(parents) if p >= len(parents)]


@pytest.mark.parametrize(
    ("cases", "linked", "code"),
    [(["a", "a"], [None, None], "epidemic.repeated-case"), (["a"], ["a"], "epidemic.self-link")],
)
def test_lists_that_cannot_be(cases: list[str], linked: list[str | None], code: str) -> None:
    with pytest.raises(SchemaError) as caught:
        chains(np.array(cases, object), np.array(linked, object))
    assert caught.value.code == code and "'a'" not in str(caught.value)


def test_nothing_is_claimed_across_regions() -> None:
    assert told() == {"shared": None, "note": NOT_YET} and "not available" in NOT_YET


def test_an_outbreaks_links_are_found_within_each_region_and_point_outside_where_they_do() -> None:
    outbreak = simulate(dataclasses.replace(YANGTZE_DELTA, days=30), 3)
    rows = line_list(outbreak, 3)
    linked_elsewhere = 0
    for region in np.unique(rows["region"]):
        own = rows["region"] == region
        ids, links = rows["x0"][own], rows["link_case"][own]
        found = chains(ids, links)
        assert np.array_equal(found.infector >= 0, rows["x14"][own] == NEAR)
        assert found.outside.tolist() == np.flatnonzero(rows["x14"][own] == ELSEWHERE).tolist()
        linked_elsewhere += len(found.outside)
        known = found.infector >= 0
        assert np.array_equal(ids[found.infector[known]], links[known])
    assert linked_elsewhere > 0
