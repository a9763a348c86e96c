"""Server optimisers: what a coordinator does with a round's mean change of the weights.

Each is a function on the coordinator's state, a dict of flat arrays [size] that checkpoints hold, and takes the mean
change Δ as if it were a gradient's opposite. What an optimiser remembers is the coordinator's own: it is not sent.

Weights that are not learned but follow the data (a batch normalisation's means; ``running``) have no gradient: they
move by their mean change, whatever the optimiser.

Sources: Hsu, Qi & Brown 2019, Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification, §4 (momentum); Reddi et al. 2021, Adaptive Federated Optimization (ICLR), Algorithm 2 (the others).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from atoll.contract.wire import Array

State = dict[str, Array]
Squares = Callable[[Array, Array], Array]
"""(second moments so far, Δ²) → second moments."""


def started(weights: Array, running: slice) -> State:
    """A state to begin with. weights: [size]; running: those of them that follow the data."""
    return {"weights": weights, "running": np.array([running.start, running.stop])}


def move(state: State, step: Array, change: Array) -> None:
    """Add *step* [size] to the weights, and the mean *change* [size] to those that follow the data."""
    running = slice(*state["running"])
    step = step.copy()
    step[running] = change[running]
    state["weights"] = state["weights"] + step


def momentum(state: State, change: Array, *, rate: float, beta: float) -> None:
    """v ← β·v + Δ; w ← w + η·v. Keeps "velocity"."""
    state["velocity"] = beta * state["velocity"] + change
    move(state, rate * state["velocity"], change)


def adaptive(state: State, change: Array, squares: Squares, *, rate: float, beta1: float, tau: float) -> None:
    """m ← β₁·m + (1 − β₁)·Δ; v by *squares*; w ← w + η·m / (√v + τ), without correction for the beginning. Keeps
    "moment" and "squares", which begin with 0 and τ²."""
    state["moment"] = beta1 * state["moment"] + (1 - beta1) * change
    state["squares"] = squares(state["squares"], change**2)
    move(state, rate * state["moment"] / (np.sqrt(state["squares"]) + tau), change)


def adagrad(squares: Array, new: Array) -> Array:
    """v + Δ²."""
    return squares + new


def adam(squares: Array, new: Array, *, beta2: float) -> Array:
    """β₂·v + (1 − β₂)·Δ²."""
    return beta2 * squares + (1 - beta2) * new


def yogi(squares: Array, new: Array, *, beta2: float) -> Array:
    """v − (1 − β₂)·Δ²·sign(v − Δ²): as Adam's, but v shrinks no faster than Δ² says."""
    return np.asarray(squares - (1 - beta2) * new * np.sign(squares - new))
