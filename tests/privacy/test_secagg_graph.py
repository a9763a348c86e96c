"""The graph of who masks with whom: symmetric, regular, connected, of logarithmic degree; and thresholds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.protection import Choice, Terms
from atoll.crypto.shamir import MAX_HOLDERS
from atoll.privacy.secagg import graph
from atoll.privacy.secagg.graph import FULL_GRAPH_SITES, degree, holders, neighbours, threshold

ADVERSARIES = ("curious", "active")


def terms(size: int, adversary: str = "curious", run: str = "run", number: int = 0, attempt: int = 0) -> Terms:
    roster = {f"s{i:05}": bytes(32) for i in range(size)}
    return Terms(run, number, attempt, roster, "roster", 1, Choice(sum="secagg", adversary=adversary))


def reached(around: Mapping[str, Sequence[str]], without: Collection[str] = ()) -> int:
    """How many sites can be reached from one of those that are left."""
    left = [site for site in around if site not in without]
    seen, found = {left[0]}, [left[0]]
    while found:
        new = set(around[found.pop()]) - seen - set(without)
        seen |= new
        found += new
    return len(seen)


@given(st.integers(1, 10_000))
def test_thresholds(n: int) -> None:
    curious, active = threshold(n, "curious"), threshold(n, "active")
    assert n / 2 < curious <= n / 2 + 1 and Fraction(2 * n, 3) < active <= Fraction(2 * n, 3) + 1
    assert curious <= active <= n
    assert 2 * curious > n  # no two sets of them are disjoint
    assert 2 * active - n > (n - 1) // 3  # any two share more than a third: an honest site, if at most that collude


@pytest.mark.parametrize(
    ("n", "curious", "active"), [(1, 1, 1), (2, 2, 2), (3, 2, 3), (4, 3, 3), (5, 3, 4), (9, 5, 7), (10, 6, 7)]
)  # fmt: skip
def test_thresholds_of_small_cohorts(n: int, curious: int, active: int) -> None:
    assert (threshold(n, "curious"), threshold(n, "active")) == (curious, active)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("size", [1, 2, 3, 10, FULL_GRAPH_SITES])
def test_everyone_masks_with_everyone_in_a_small_cohort(size: int, adversary: str) -> None:
    around = neighbours(terms(size, adversary))
    assert all(list(others) == sorted(set(around) - {site}) for site, others in around.items())


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("size", [65, 70, 101, 300, 1000, 3000])
def test_the_sparse_graph_is_symmetric_regular_and_connected(size: int, adversary: str) -> None:
    around = neighbours(terms(size, adversary))
    k = degree(size, adversary)
    assert len(around) == size and k < size - 1
    for site, others in around.items():
        assert len(others) == len(set(others)) == k and site not in others and list(others) == sorted(others)
        assert all(site in around[other] for other in others)
    assert reached(around) == size


@pytest.mark.parametrize("size", [70, 200, 1000])
def test_it_stays_connected_when_a_fifth_drops_out_and_a_fifth_colludes(size: int) -> None:
    random = np.random.default_rng(1)
    around = neighbours(terms(size))
    for _ in range(50):
        without = set(random.choice(list(around), math.ceil(0.4 * size), replace=False))
        assert reached(around, without) == size - len(without)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_the_degree_grows_with_the_logarithm(adversary: str) -> None:
    sizes = [100, 200, 400, 1000, 2000, 5000, 10_000, 100_000]
    found = [degree(size, adversary) for size in sizes]
    assert found == sorted(found) and all(k % 2 == 0 for k in found) and max(found) < MAX_HOLDERS
    assert found[-1] < (180 if adversary == "curious" else MAX_HOLDERS)
    if adversary == "curious":
        assert found[-1] - found[-2] <= found[-2] - found[3]  # ten times as many sites cost ever less


def tail(population: int, marked: int, drawn: int, at_least: int) -> Fraction:
    """P(at least so many of *drawn* are marked), hypergeometric, in exact arithmetic: the second implementation."""
    most = min(marked, drawn)
    ways = (math.comb(marked, i) * math.comb(population - marked, drawn - i) for i in range(at_least, most + 1))
    return Fraction(sum(ways), math.comb(population, drawn))


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("size", [65, 100, 300, 1000])
def test_the_degree_keeps_its_promises(size: int, adversary: str) -> None:
    """No neighbourhood is taken over, and none is lost, by the exact tail of the hypergeometric distribution."""
    k = degree(size, adversary)
    needed = threshold(k + 1, adversary)
    colluding = tail(size - 1, math.ceil(graph.COLLUDING * size), k, needed)
    assert size * colluding <= Fraction(1, 2 ** graph.SECURITY_BITS[adversary])
    lost = tail(size - 1, math.ceil(graph.DROPPING * size), k, k + 1 - needed + 1)
    limit = graph.CORRECTNESS_BITS if k < MAX_HOLDERS - 1 else 10  # the most neighbours: somewhat fewer dropouts
    assert size * lost <= Fraction(1, 2**limit)


def test_the_order_is_another_in_each_run_round_and_attempt() -> None:
    graphs = [
        neighbours(t) for t in (terms(80), terms(80, run="other"), terms(80, number=1), terms(80, attempt=1))
    ]  # fmt: skip
    assert neighbours(terms(80)) == graphs[0]
    assert all(one != other for i, one in enumerate(graphs) for other in graphs[:i])


@pytest.mark.parametrize("size", [5, 90])
def test_holders_are_numbered_alike_by_everybody(size: int) -> None:
    around = neighbours(terms(size))
    for site, others in around.items():
        number = holders(site, others)
        assert set(number) == {site, *others} and sorted(number.values()) == list(range(1, len(others) + 2))
