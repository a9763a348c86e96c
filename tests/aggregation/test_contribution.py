"""Values of sites: Shapley's axioms, his sum over all orders, and GTG-Shapley beside it."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.aggregation.contribution import Coalition, exact, gtg, leave_one_out, shares, valued

SITES = ("a", "b", "c", "d")


def game(seed: int, sites: tuple[str, ...] = SITES) -> dict[Coalition, float]:
    random = np.random.default_rng(seed)
    every = [frozenset(s for i, s in enumerate(sites) if code >> i & 1) for code in range(2 ** len(sites))]
    return {coalition: float(random.normal()) for coalition in every}


def by_orders(worth: dict[Coalition, float], sites: tuple[str, ...]) -> dict[str, float]:
    """The definition: what a site adds, over all orders in which sites come."""
    values = dict.fromkeys(sites, 0.0)
    orders = list(permutations(sites))
    for order in orders:
        for place, site in enumerate(order):
            values[site] += worth[frozenset(order[: place + 1])] - worth[frozenset(order[:place])]
    return {site: value / len(orders) for site, value in values.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_exact_values_are_the_mean_over_all_orders(size: int) -> None:
    sites = tuple("abcde"[:size])
    worth = game(size, sites)
    assert valued(exact(sites), worth.__getitem__) == pytest.approx(by_orders(worth, sites), abs=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_values_add_up_to_what_all_gain(seed: int) -> None:
    worth = game(seed)
    gained = worth[frozenset(SITES)] - worth[frozenset()]
    random = np.random.default_rng(seed)
    assert sum(valued(exact(SITES), worth.__getitem__).values()) == pytest.approx(gained, abs=1e-9)
    assert sum(valued(gtg(SITES, random), worth.__getitem__).values()) == pytest.approx(gained, abs=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_sites_that_add_the_same_have_the_same_value_and_those_that_add_nothing_none(seed: int) -> None:
    base = game(seed, ("a", "c"))

    def worth(coalition: Coalition) -> float:  # a and b are alike; d is a dummy
        twins = len(coalition & {"a", "b"})
        return twins**2 + base[frozenset({"a"} & coalition if twins else ()) | (coalition & {"c"})] * (twins != 1)

    found = valued(exact(SITES), worth)
    assert found["a"] == pytest.approx(found["b"], abs=1e-12)
    assert found["d"] == pytest.approx(0, abs=1e-12)
    assert valued(gtg(SITES, np.random.default_rng(seed)), worth)["d"] == 0
    assert valued(leave_one_out(SITES), worth)["d"] == 0


def test_guided_permutations_come_near_the_exact_values() -> None:
    sites = tuple("abcdef")
    for seed in range(4):
        worth = game(seed, sites)
        additive = {c: 3.0 * sum(ord(s) - 96 for s in c) + worth[c] for c in worth}
        wanted = valued(exact(sites), additive.__getitem__)
        found = valued(gtg(sites, np.random.default_rng(seed), most=200), additive.__getitem__)
        assert found == pytest.approx(wanted, rel=0.15)


def test_they_are_exact_where_sites_add_up_and_few_coalitions_are_asked() -> None:
    sites, asked = tuple("abcdefgh"), set[Coalition]()

    def worth(coalition: Coalition) -> float:
        asked.add(coalition)
        return float(sum(ord(site) - 96 for site in coalition))

    found = valued(gtg(sites, np.random.default_rng(0)), worth)
    assert found == pytest.approx({site: ord(site) - 96 for site in sites})
    assert len(asked) < 2 ** len(sites)


def test_a_round_that_changes_little_is_not_looked_into() -> None:
    asked: list[Coalition] = []

    def worth(coalition: Coalition) -> float:
        asked.append(coalition)
        return 0.001 * (len(coalition) == 4)

    assert valued(gtg(SITES, np.random.default_rng(0), between=0.001), worth) == dict.fromkeys(SITES, 0.0)
    assert asked == [frozenset(), frozenset(SITES)]


def test_a_permutation_ends_where_nothing_is_left_to_gain() -> None:
    """One site is enough: with it no larger coalition is asked for."""
    asked: list[Coalition] = []

    def worth(coalition: Coalition) -> float:
        asked.append(coalition)
        return float(bool(coalition)) + 1e-4 * len(coalition)

    found = valued(gtg(SITES, np.random.default_rng(0), within=0.01), worth)
    assert {len(coalition) for coalition in asked} == {0, 1, 4}
    assert found == pytest.approx(dict.fromkeys(SITES, 0.25), abs=1e-3)


def test_leaving_one_out_is_what_the_model_loses() -> None:
    worth = game(1)
    every = frozenset(SITES)
    found = valued(leave_one_out(SITES), worth.__getitem__)
    assert found == {site: worth[every] - worth[every - {site}] for site in SITES}


@settings(max_examples=25)
@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_shares_are_of_what_is_positive_and_sum_to_one(values: dict[str, float]) -> None:
    found = shares(values)
    assert found.keys() == values.keys()
    assert all(share >= 0 and (share == 0 or values[site] > 0) for site, share in found.items())
    if max(values.values()) > 0:
        assert sum(round(share * 1_000_000) for share in found.values()) == 1_000_000
    else:
        assert set(found.values()) == {0.0}
    total = sum(max(value, 0) for value in values.values()) or 1.0
    assert all(abs(share - max(values[site], 0) / total) < 2e-6 for site, share in found.items()) or total == 1.0


def test_shares_of_thirds() -> None:
    assert shares({"x": 1.0, "y": 1.0, "z": 1.0, "w": -3.0}) == {"x": 0.333334, "y": 0.333333, "z": 0.333333, "w": 0.0}
