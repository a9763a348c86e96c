"""Server optimisers: each against its formula written a second time, for one weight at a time."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from atoll.aggregation.optimizers import adagrad, adam, adaptive, momentum, started, yogi

CHANGES = np.random.default_rng(4).normal(0, 0.5, (30, 5))
WEIGHTS = np.random.default_rng(5).normal(0, 1, 5)
NONE = slice(5, 5)


def adapted(squares: Any, running: slice = NONE, **settings: Any) -> dict[str, Any]:
    state = {**started(WEIGHTS, running), "moment": np.zeros(5), "squares": np.full(5, settings["tau"] ** 2)}
    for change in CHANGES:
        adaptive(state, change, squares, **settings)
    return state


def test_momentum_is_a_geometric_sum_of_changes() -> None:
    """v_t = Σ β^(t−s)·Δ_s, and w moves by η·Σ v."""
    state = {**started(WEIGHTS, NONE), "velocity": np.zeros(5)}
    for change in CHANGES:
        momentum(state, change, rate=0.3, beta=0.7)
    velocities = [sum(0.7 ** (t - s) * CHANGES[s] for s in range(t + 1)) for t in range(30)]
    assert np.allclose(state["velocity"], velocities[-1], atol=1e-13)
    assert np.allclose(state["weights"], WEIGHTS + 0.3 * sum(velocities), atol=1e-12)


@pytest.mark.parametrize("rule", ["adagrad", "adam", "yogi"])
def test_adaptive_steps_are_algorithm_2_of_reddi_et_al(rule: str) -> None:
    eta, beta1, beta2, tau = 0.2, 0.6, 0.9, 0.05
    chosen = {"adagrad": adagrad, "adam": partial(adam, beta2=beta2), "yogi": partial(yogi, beta2=beta2)}[rule]
    found = adapted(chosen, rate=eta, beta1=beta1, tau=tau)
    for i in range(5):
        x, m, v = float(WEIGHTS[i]), 0.0, tau**2
        for delta in CHANGES[:, i].tolist():
            m = beta1 * m + (1 - beta1) * delta
            if rule == "adagrad":
                v = v + delta**2
            elif rule == "yogi":
                v = v - (1 - beta2) * delta**2 * math.copysign(1, v - delta**2)
            else:
                v = beta2 * v + (1 - beta2) * delta**2
            x = x + eta * m / (math.sqrt(v) + tau)
        assert found["weights"][i] == pytest.approx(x, abs=1e-12)
        assert found["moment"][i] == pytest.approx(m, abs=1e-13)
        assert found["squares"][i] == pytest.approx(v, abs=1e-13)


def test_second_moments_stay_positive() -> None:
    """Also Yogi's, that subtracts: v − (1 − β₂)·Δ² only where v is the greater."""
    for rule in (adagrad, partial(adam, beta2=0.0), partial(yogi, beta2=0.0), partial(yogi, beta2=0.99)):
        assert (adapted(rule, rate=0.1, beta1=0.9, tau=1e-3)["squares"] >= 0).all()


def test_what_follows_the_data_moves_by_its_mean_change() -> None:
    """A batch normalisation's mean has no gradient: an optimiser's pace would take it away from the data."""
    followed = WEIGHTS[3:] + CHANGES[:, 3:].sum(0)
    free = adapted(adagrad, rate=0.2, beta1=0.5, tau=0.1)
    found = adapted(adagrad, slice(3, 5), rate=0.2, beta1=0.5, tau=0.1)
    assert np.allclose(found["weights"][3:], followed, atol=1e-12)
    assert found["weights"][:3].tobytes() == free["weights"][:3].tobytes()
    state = {**started(WEIGHTS, slice(3, 5)), "velocity": np.zeros(5)}
    for change in CHANGES:
        momentum(state, change, rate=0.3, beta=0.7)
    assert np.allclose(state["weights"][3:], followed, atol=1e-12)


def test_nothing_is_changed_in_place() -> None:
    """A checkpoint that was yielded holds the arrays of its moment."""
    weights, change = WEIGHTS.copy(), CHANGES[0].copy()
    state = {**started(weights, slice(3, 5)), "velocity": np.zeros(5), "moment": np.zeros(5), "squares": np.ones(5)}
    before = {name: (array, array.copy()) for name, array in state.items()}
    momentum(state, change, rate=0.3, beta=0.7)
    adaptive(state, change, adagrad, rate=0.1, beta1=0.9, tau=1.0)
    assert all(np.array_equal(array, copy) for array, copy in before.values())
    assert np.array_equal(change, CHANGES[0])
