"""What releases cost together, and how much noise a budget asks for. All of it by dp-accounting.

Each release is a dp-accounting *event*; (event, count) pairs may differ from each other (heterogeneous
composition) and may be chosen adaptively. Neighbours: add or remove one unit. Privacy loss distributions (PLD) are used
where dp-accounting supports every event, Rényi DP otherwise; both are upper bounds, and the smaller is reported.

Source: Koskela, Jälkö & Honkela 2020, and Doroshenko et al. 2022, Connect the Dots (PLD); Mironov 2017, Rényi
Differential Privacy; Canonne, Kamath & Steinke 2020, Proposition 12 (from Rényi DP to (ε, δ)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    ZCDpEvent,
)
from dp_accounting.dp_event import DiscreteLaplaceDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from numpy.typing import NDArray
from scipy import optimize

from atoll.contract.errors import PlanError, PrivacyBudgetError

Events = Sequence[tuple[DpEvent, int]]

WHOLE_ORDERS = np.array([*range(2, 64), 72, 80, 96, 112, 128, 192, 256, 512, 1024], float)
FINE_ORDERS = np.array([*(1 + x / 50 for x in range(1, 50)), *DEFAULT_RDP_ORDERS, *WHOLE_ORDERS[62:]], float)
INTERVAL, FINE_INTERVAL = 1e-3, 1e-4
"""PLD's discretisation of the privacy loss, always an upper bound; finer for discrete Laplace noise, whose few possible
losses are rounded up to it (for other mechanisms dots are connected, which loses next to nothing)."""
PLD_LIMIT = 50.0
"""Above this Rényi ε no PLD is made: it would be huge, and no such ε protects anybody."""


def epsilon(events: Events, delta: float) -> float:
    """ε at *delta* of all *events* together; inf if one is not private.

    Raises PrivacyBudgetError "dp.delta", "dp.unknown-event".
    """
    return _cost(events, delta)


def _cost(events: Events, delta: float) -> float:
    check_delta(delta)
    leaves = _leaves(events)
    bound = _renyi(leaves, delta)
    if bound > PLD_LIMIT and not math.isinf(bound):
        return bound
    fine = any(isinstance(event, DiscreteLaplaceDpEvent) for event, _ in leaves)
    accountant = PLDAccountant(value_discretization_interval=FINE_INTERVAL if fine else INTERVAL)
    if not all(accountant.supports(event) for event, _ in leaves):
        return bound
    for event, count in leaves:
        accountant.compose(event, count)
    return min(bound, float(accountant.get_epsilon(delta)))


def prefix(events: Events, delta: float) -> list[float]:
    """ε after the first release, the first two, …: what a site charges; never falls, and ends at :func:`epsilon`.

    Rényi DP, cut off at the total (which bounds each part of it): one pass, however many releases.
    Raises as :func:`epsilon`.
    """
    total = epsilon(events, delta)
    leaves = [_leaves([one]) for one in events]
    orders = _orders(event for parts in leaves for event, _ in parts)
    known: dict[str, NDArray[np.float64]] = {}
    spent, sofar, charged = np.zeros(len(orders)), 0.0, []
    for parts in leaves:
        for event, count in parts:
            if repr(event) not in known:
                known[repr(event)] = _divergence(event, orders)
            spent = spent + count * known[repr(event)]
        sofar = max(sofar, min(total, float(compute_epsilon(orders, spent, delta)[0])))
        charged.append(sofar)
    return [*charged[:-1], total] if charged else []


def calibrate(epsilon: float, delta: float, plan_of_events: Callable[[float], Events]) -> float:
    """The smallest noise multiplier z, to within 1e-3, at which ``plan_of_events(z)`` costs at most *epsilon*.

    Raises PrivacyBudgetError "dp.epsilon", "dp.delta", "dp.unknown-event", "dp.unreachable".
    """
    check_epsilon(epsilon)
    check_delta(delta)

    def excess(log_z: float) -> float:
        cost = _cost(plan_of_events(math.exp(log_z)), delta)
        return math.log(min(max(cost, 1e-9), 1e9) / epsilon)

    low = high = 0.0
    while excess(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(2.0**40):
            raise PrivacyBudgetError(
                "dp.unreachable", "no amount of noise keeps the plan within its epsilon",
                remedy="ask for fewer releases, a finer step for the fields, or a larger epsilon or delta",
            )  # fmt: skip
    while low == high or excess(low) <= 0:
        low, high = low - math.log(2), low
        if low < math.log(2.0**-20):
            return math.exp(high)
    tolerance = 2e-4 / max(1.0, math.exp(high))
    root = optimize.brentq(excess, low, high, xtol=tolerance)
    while excess(root) > 0:
        root += tolerance
    return math.exp(root)


def check_epsilon(epsilon: float) -> None:
    """Raise PrivacyBudgetError "dp.epsilon" unless 0 < epsilon < ∞."""
    if not 0 < epsilon < math.inf:
        raise PrivacyBudgetError(
            "dp.epsilon", "epsilon must be above 0 and finite", field="epsilon",
            remedy="typical values are 0.1 to 10, smaller being more private",
        )  # fmt: skip


def check_delta(delta: float) -> None:
    """Raise PrivacyBudgetError "dp.delta" unless 0 < delta < 1."""
    if not 0 < delta < 1:
        raise PrivacyBudgetError(
            "dp.delta", "delta must be between 0 and 1", field="delta",
            remedy="choose it well below one over the number of units, such as 1e-6",
        )  # fmt: skip


def _leaves(events: Events) -> list[tuple[DpEvent, int]]:
    """Compositions taken apart, equal events counted together, Gaussians made one: 1/z² = Σ count/z²."""
    counts: dict[str, tuple[DpEvent, int]] = {}
    precision = 0.0

    def add(event: object, count: int) -> None:
        nonlocal precision
        match event:
            case ComposedDpEvent():
                for part in event.events:
                    add(part, count)
            case SelfComposedDpEvent():
                add(event.event, count * event.count)
            case PoissonSampledDpEvent() if event.sampling_probability >= 1:
                add(event.event, count)
            case GaussianDpEvent() if event.noise_multiplier > 0:
                precision += count / event.noise_multiplier**2
            case DpEvent() if _known(event):
                counts[repr(event)] = (event, count + counts.get(repr(event), (event, 0))[1])
            case _:
                raise PrivacyBudgetError(
                    "dp.unknown-event", f"there is no accounting for {type(event).__name__}",
                    remedy="use a mechanism that dp-accounting can account for add-or-remove-one neighbours",
                )  # fmt: skip

    for event, count in events:
        if count < 0:
            raise PlanError("dp.count", "an event happens at least 0 times", field="count")
        if count:
            add(event, count)
    leaves = list(counts.values())
    return [(GaussianDpEvent(precision**-0.5), 1), *leaves] if precision else leaves


def _known(event: DpEvent) -> bool:
    return bool(PLDAccountant().supports(event) or RdpAccountant().supports(_concentrated(event)))


def _concentrated(event: DpEvent) -> DpEvent:
    """What RdpAccountant does not know: pure ε-DP is ε²/2-zCDP (Bun & Steinke 2016, Proposition 1.4)."""
    if isinstance(event, DiscreteLaplaceDpEvent):
        return ZCDpEvent(rho=(event.noise_parameter * event.sensitivity) ** 2 / 2)
    return event


def _orders(events: Iterable[DpEvent]) -> NDArray[np.float64]:
    """Whole ones where there is sampling: there the sampled discrete Gaussian costs what the continuous one does."""
    return WHOLE_ORDERS if any(isinstance(event, PoissonSampledDpEvent) for event in events) else FINE_ORDERS


def _divergence(event: DpEvent, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rényi divergence at each of *orders*; inf where dp-accounting has no bound."""
    accountant = RdpAccountant(orders)
    if not accountant.supports(event := _concentrated(event)):
        return np.full(len(orders), np.inf)
    return np.asarray(accountant.compose(event).rdp, float)


def _renyi(leaves: Events, delta: float) -> float:
    orders = _orders(event for event, _ in leaves)
    spent = np.zeros(len(orders))
    for event, count in leaves:
        spent += count * _divergence(event, orders)
    return float(compute_epsilon(orders, spent, delta)[0])
