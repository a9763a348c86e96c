"""Who is suspected: attackers are named with what speaks against them, and honest sites that differ are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.aggregation.rule import Aggregation
from atoll.aggregation.suspicion import PREFIX, WIDTH, Evidence, Seen, _tail, sketched

SITES = tuple(f"s{i}" for i in range(10))
SIZE, ROUNDS = 400, 12
Attack = Callable[[np.ndarray, int, list[np.ndarray]], np.ndarray]
"""(a site's honest change, round, results so far) → what it sends."""


def watched(
    attacks: dict[str, Attack], *, rounds: int = ROUNDS, spread: float = 1.0, claims: dict[str, float] | None = None,
    groups: int | None = None, seed: int = 0, evidence: Evidence | None = None, first: int = 0,
) -> Evidence:  # fmt: skip
    """Rounds of honest changes, each a common one, a site's own leaning, and chance, less some that attack."""
    aggregate = Aggregation(rule="median", attackers=4)
    found = evidence or Evidence(SITES, 3, groups is None)
    random = np.random.default_rng((seed, 1))
    leaning = spread * random.normal(size=(len(SITES), SIZE)) / SIZE**0.5
    results: list[np.ndarray] = []
    for number in range(rounds):
        random = np.random.default_rng((seed, 2, number))
        common = random.normal(size=SIZE) / SIZE**0.5
        honest = (common + leaning) * random.uniform(0.5, 2, (len(SITES), 1))
        changes = honest + random.normal(size=honest.shape) / SIZE**0.5
        sent = [attacks[s](c, number, results) if s in attacks else c for s, c in zip(SITES, changes, strict=True)]
        units = np.arange(len(SITES))[:, None]
        if groups is not None:
            units = np.array_split(random.permutation(len(SITES)), groups)  # type: ignore[assignment]
        means = np.array([np.mean([sent[i] for i in unit], 0) for unit in units])
        weights = np.array([sum((claims or {}).get(SITES[i], 40.0 + i) for i in unit) for unit in units])
        names = [tuple(SITES[i] for i in unit) for unit in units]
        told = Aggregation(rule="median").combine({"weights": means}, [" + ".join(name) for name in names])
        results.append(told.values["weights"])
        if number >= first:
            found.note(Seen(names, means, weights, results[-1], told.trust, [False] * len(names)))
    assert aggregate.least <= len(SITES)
    return found


def named(evidence: Evidence) -> dict[str, set[str]]:
    return {suspect["site"]: set(suspect["reasons"]) for suspect in evidence.told()["suspects"]}


ATTACKS: dict[str, tuple[str, Attack]] = {
    "sign flip": ("against", lambda change, *_: -change),
    "sign flip, fourfold": ("against", lambda change, *_: -4 * change),
    "scaling": ("large", lambda change, *_: 20 * change),
    "nothing": ("nothing", lambda change, *_: 0 * change),
    "next to nothing": ("nothing", lambda change, *_: 1e-3 * change),
    "the last result": ("free_rider", lambda change, _, results: results[-1] if results else change),
    "the last result, scaled": ("free_rider", lambda change, _, results: 3 * results[-1] if results else change),
    "a coalition's one vector": ("copy", lambda _, number, __: np.random.default_rng(number).normal(size=SIZE)),
}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
@pytest.mark.parametrize("bad", [2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_attackers_are_named_and_nobody_else(attack: str, bad: int, seed: int) -> None:
    """20 and 40 per cent of the sites."""
    reason, made = ATTACKS[attack]
    found = named(watched(dict.fromkeys(SITES[:bad], made), seed=seed))
    assert found.keys() == set(SITES[:bad])
    assert all(reason in reasons for reasons in found.values())


@pytest.mark.parametrize("bad", [1, 4])
def test_who_repeats_its_own_last_change_is_named(bad: int) -> None:
    def replay() -> Attack:
        kept: list[np.ndarray] = []

        def sent(change: np.ndarray, *_: Any) -> np.ndarray:
            kept.append(change)
            return kept[0]

        return sent

    found = watched({site: replay() for site in SITES[:bad]})
    assert {site: reasons & {"replay"} for site, reasons in named(found).items()} == {
        site: {"replay"} for site in SITES[:bad]
    }
    told = found.told()["suspects"][0]
    assert told["reasons"]["replay"] == {"rounds": ROUNDS - 1, "of": ROUNDS - 1, "figure": 0.0}


def test_who_claims_a_billion_rows_is_named() -> None:
    found = watched({}, claims={"s4": 1e9})
    assert named(found) == {"s4": {"claim"}}
    assert found.told()["suspects"][0]["reasons"]["claim"]["figure"] > 1e7


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 1.0, 3.0]))
def test_honest_sites_are_not_accused_though_they_differ(seed: int, spread: float) -> None:
    assert named(watched({}, seed=seed, spread=spread)) == {}


def test_sites_of_very_different_sizes_are_not_accused() -> None:
    scale = {site: 3.0**i / 3**5 for i, site in enumerate(SITES)}
    attacks = {site: (lambda change, *_, by=by: by * change) for site, by in scale.items()}
    assert named(watched(attacks, claims={site: 1e4 * by for site, by in scale.items()})) == {}


def test_a_breach_of_the_protocol_is_named_at_once() -> None:
    found = watched({}, rounds=5)
    changes = np.random.default_rng(0).normal(size=(8, SIZE))
    beyond = [False] * 7 + [True]
    seen = Seen([(s,) for s in SITES[:8]], changes, np.ones(8), changes.mean(0), np.ones(8) / 8, beyond, ["s9"])
    found.note(seen)
    assert {site: reasons & {"broke"} for site, reasons in named(found).items()} == {"s7": {"broke"}, "s9": {"broke"}}


def test_one_odd_round_is_not_enough() -> None:
    found = watched({"s1": lambda change, number, _: -4 * change if number == 3 else change})
    assert named(found) == {}


def test_a_bad_site_is_found_in_groups_that_are_drawn_anew() -> None:
    attacks = {"s2": ATTACKS["scaling"][1]}
    assert named(watched(attacks, groups=5, rounds=40)) == {"s2": {"large"}}
    assert named(watched({}, groups=5, rounds=40)) == {}


def test_it_goes_on_from_a_checkpoint_to_the_same_bits() -> None:
    attacks = {"s1": ATTACKS["nothing"][1], "s2": ATTACKS["scaling"][1]}
    whole = watched(attacks)
    state = {"weights": np.zeros(3), **watched(attacks, rounds=5).arrays()}
    resumed = Evidence(SITES, 3, True).resumed(state)
    assert set(state) == {"weights"}
    again = watched(attacks, evidence=resumed, first=5)
    for name, array in whole.arrays().items():
        assert name.startswith(PREFIX) and np.array_equal(array, again.arrays()[name], equal_nan=True)
    assert again.told() == whole.told()


def test_trust_is_told_by_site_and_part_of_the_run() -> None:
    told = watched({"s0": ATTACKS["scaling"][1]}, rounds=70).told()["trust"]
    assert {len(parts) for parts in told.values()} == {12}
    assert np.mean(told["s0"]) < 0.7 < np.mean(told["s5"])
    assert sum(parts[0] for parts in told.values()) == pytest.approx(len(SITES))


def test_nothing_seen_is_nothing_told() -> None:
    found = Evidence(SITES, 0, True)
    assert found.told() == {} == found.arrays()


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 255, 256, 5000]))
def test_a_sketch_keeps_lengths_and_tells_equals_from_others(seed: int, size: int) -> None:
    changes = np.random.default_rng(seed).normal(size=(3, size))
    made = sketched(changes, 7)
    assert made.shape == (3, WIDTH) and np.array_equal(made, sketched(changes, 7))
    assert np.allclose(np.linalg.norm(made, axis=1), np.linalg.norm(changes, axis=1), rtol=0.35)
    assert np.allclose(sketched(2 * changes[:1], 7), 2 * made[:1]) and not np.allclose(made[0], made[1])


@pytest.mark.parametrize(("held", "judged", "chance"), [(3, 10, 0.2), (0, 4, 0.5), (7, 7, 0.3), (40, 60, 0.5)])
def test_the_binomial_tail_is_scipys(held: int, judged: int, chance: float) -> None:
    from scipy.stats import binom

    assert _tail(held, judged, chance) == pytest.approx(binom.sf(held - 1, judged, chance), rel=1e-9)
