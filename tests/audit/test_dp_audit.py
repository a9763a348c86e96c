"""Bounds on ε by attack stay below what is true, and rise where the noise is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from atoll.audit.dp_audit import audit_gaussian_sum, audit_sum, canaries, guess, one_run, two_worlds
from atoll.contract.errors import PlanError

DELTA = 1e-5


def gaussian_epsilon(noise_multiplier: float, delta: float = DELTA) -> float:
    """Exact ε of the Gaussian mechanism (Balle & Wang 2018, Theorem 8)."""

    def excess(epsilon: float) -> float:
        a, b = 0.5 / noise_multiplier, epsilon * noise_multiplier
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)) - delta

    return float(brentq(excess, 0, 200))


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 2.0, 5.0])
def test_one_run_stays_below_the_true_epsilon(noise_multiplier: float) -> None:
    true = gaussian_epsilon(noise_multiplier)
    bounds = [audit_gaussian_sum(noise_multiplier, DELTA, num_canaries=400, size=4000, seed=s) for s in range(10)]
    assert max(bounds) <= true


def test_one_run_sees_missing_and_weak_noise() -> None:
    claimed = gaussian_epsilon(4.0)
    assert audit_gaussian_sum(1e-6, DELTA, num_canaries=1000, size=20_000) > 3 * claimed
    assert audit_gaussian_sum(0.25, DELTA, num_canaries=1000, size=20_000) > 2 * claimed
    assert audit_gaussian_sum(0.5, DELTA) > 1


def test_one_run_against_published_arithmetic() -> None:
    """Pure DP: with all of r guesses right, ε is the logit of 0.05^(1/r) (Steinke et al. 2023, Section 5)."""
    p = 0.05 ** (1 / 100)
    assert one_run(100, 100, 100, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
    assert one_run(50, 100, 100, 0.0) == 0
    assert one_run(100, 100, 100, 1e-5) < one_run(100, 100, 100, 0.0)
    assert one_run(0, 0, 10, 0.0) == 0


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 3.0])
def test_two_worlds_stays_below_the_true_epsilon(noise_multiplier: float) -> None:
    random = np.random.default_rng(0)
    bounds = []
    for _ in range(10):
        without, inside = random.normal(0, noise_multiplier, (2, 4000)) + np.array([[0.0], [1.0]])
        bounds.append(two_worlds(without, inside, DELTA))
    assert max(bounds) <= gaussian_epsilon(noise_multiplier)
    if noise_multiplier < 1:
        assert min(bounds) > 0.5


def test_two_worlds_sees_missing_noise_in_either_direction() -> None:
    without, inside = np.zeros(1000), np.ones(1000)
    assert two_worlds(without, inside, DELTA) > 4
    random = np.random.default_rng(0)
    one_sided = np.where(random.random(4000) < 0.5, -5.0, random.normal(0, 1, 4000))  # only without it, below −4
    assert two_worlds(one_sided, random.normal(0, 1, 4000), DELTA) > 3


def test_the_same_world_twice_shows_nothing() -> None:
    random = np.random.default_rng(3)
    assert max(two_worlds(*random.normal(size=(2, 500)), DELTA) for _ in range(20)) == 0


def test_canaries_have_the_clipping_norm_and_are_found_in_a_sum() -> None:
    random = np.random.default_rng(0)
    planted = canaries(50, 300, 2.5, random)
    assert np.linalg.norm(planted, axis=1) == pytest.approx(np.full(50, 2.5))
    included = random.random(50) < 0.5
    assert audit_sum(planted[included].sum(0), planted, included, DELTA) > 1
    assert guess(np.arange(10.0), np.arange(10) >= 5, 1.0) == (10, 10)
    assert guess(np.arange(10.0), np.arange(10) < 5, 0.4) == (0, 4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        two_worlds(np.zeros(5), np.zeros(50), DELTA)
    assert caught.value.code == "audit.few-trials"
    with pytest.raises(PlanError) as caught:
        one_run(5, 4, 10, DELTA)
    assert caught.value.code == "audit.bad-count"
