"""Graphs of sites: every mixing matrix averages, as fast as the papers say."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.aggregation.topology import Topology, connectivity, heard, mixing, spectral_gap, told, without

every_topology = pytest.mark.parametrize("topology", get_args(Topology))


@every_topology
@settings(max_examples=25)
@given(size=st.integers(1, 40), number=st.integers(0, 9))
def test_mixing_is_doubly_stochastic(topology: Topology, size: int, number: int) -> None:
    weights = mixing(topology, size, number)
    assert weights.shape == (size, size)
    assert (weights >= 0).all()
    assert np.allclose(weights.sum(0), 1, atol=1e-12)
    assert np.allclose(weights.sum(1), 1, atol=1e-12)
    assert (np.diag(weights) > 0).all()
    for site in range(size):
        assert all(site in told(weights, other) for other in heard(weights, site))


@pytest.mark.parametrize("topology", ["ring", "mesh", "torus", "complete"])
@settings(max_examples=25)
@given(size=st.integers(1, 30))
def test_metropolis_weights_go_both_ways(topology: Topology, size: int) -> None:
    weights = mixing(topology, size)
    assert np.array_equal(weights, weights.T)
    degree = [len(heard(weights, site)) for site in range(size)]
    for i in range(size):
        for j in heard(weights, i):
            assert weights[i, j] == pytest.approx(1 / (1 + max(degree[i], degree[j])))


@pytest.mark.parametrize("topology", [name for name in get_args(Topology) if name != "one_peer"])
@settings(max_examples=25)
@given(size=st.integers(2, 30))
def test_every_round_brings_sites_nearer(topology: Topology, size: int) -> None:
    weights, gap = mixing(topology, size), spectral_gap(mixing(topology, size))
    assert 0 < gap <= 1 + 1e-12
    x = np.random.default_rng(size).normal(size=(size, 3))
    before, after = (np.linalg.norm(y - y.mean(0)) for y in (x, weights @ x))
    assert after <= (1 - gap) * before + 1e-9


@settings(max_examples=25)
@given(size=st.integers(3, 60))
def test_the_gap_of_a_ring_is_that_of_its_circulant(size: int) -> None:
    eigenvalues = (1 + 2 * np.cos(2 * np.pi * np.arange(1, size) / size)) / 3
    assert spectral_gap(mixing("ring", size)) == pytest.approx(1 - np.abs(eigenvalues).max(), abs=1e-12)


@pytest.mark.parametrize("size", [2, 4, 6, 8, 10, 16, 32, 64])
def test_the_gap_of_an_exponential_graph_is_ying_s(size: int) -> None:
    """Ying et al. 2021, Proposition 1: 2 / (1 + ⌈log₂ n⌉) for even n."""
    assert spectral_gap(mixing("exponential", size)) == pytest.approx(2 / (1 + np.ceil(np.log2(size))), abs=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8, 32])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_one_peer_after_another_averages_exactly(size: int, first: int) -> None:
    """Ying et al. 2021, Lemma 1."""
    hops, whole = int(np.log2(size)), np.eye(size)
    for number in range(first, first + hops):
        weights = mixing("one_peer", size, number)
        assert all(len(heard(weights, site)) == 1 for site in range(size))
        whole = weights @ whole
    assert np.allclose(whole, 1 / size, atol=1e-12)


def test_shapes() -> None:
    assert [heard(mixing("ring", 5), site) for site in (0, 3)] == [[1, 4], [2, 4]]
    assert [heard(mixing("mesh", 6), site) for site in (0, 4)] == [[1, 3], [1, 3, 5]]
    assert [heard(mixing("torus", 9), site) for site in (0, 4)] == [[1, 2, 3, 6], [1, 3, 5, 7]]
    assert heard(mixing("exponential", 8), 0) == [4, 6, 7]
    assert told(mixing("exponential", 8), 0) == [1, 2, 4]


@every_topology
@settings(max_examples=25)
@given(size=st.integers(2, 20), gone=st.sets(st.integers(0, 19)))
def test_weights_of_those_who_are_gone_stay_at_home(topology: Topology, size: int, gone: set[int]) -> None:
    weights = mixing(topology, size)
    rows = []
    for site in range(size):
        here = [] if site in gone else [j for j in heard(weights, site) if j not in gone]
        rows.append(without(weights[site], site, here))
        assert rows[-1].sum() == pytest.approx(1)
        assert all(rows[-1][j] == weights[site, j] for j in here)
        assert rows[-1][site] >= weights[site, site] - 1e-12
    if np.array_equal(weights, weights.T):
        assert np.allclose(np.sum(rows, 0), 1, atol=1e-12)


@every_topology
@settings(max_examples=25)
@given(size=st.integers(1, 20))
def test_distances_between_neighbours_bound_those_from_the_mean(topology: Topology, size: int) -> None:
    weights, x = mixing(topology, size), np.random.default_rng(size).normal(size=(size, 2))
    between = sum(weights[i, j] * np.sum((x[i] - x[j]) ** 2) for i in range(size) for j in range(size))
    assert between >= 2 * connectivity(weights) * np.sum((x - x.mean(0)) ** 2) - 1e-9
