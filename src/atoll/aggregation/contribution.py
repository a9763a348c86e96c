"""What each site's part in a model is worth: Shapley values, and what is left out when a site is; and shares of them.

The worth v(S) of a coalition S is how good the model is that its sites' changes make. Whoever knows v is asked for many
coalitions at once: a method is a generator that yields coalitions and is sent their worths.

- :func:`exact`: Shapley's value (1953), φᵢ = Σ over S without i of |S|! (n − |S| − 1)! / n! · (v(S ∪ i) − v(S)); all
  2ⁿ.
- :func:`gtg`: Liu, Chen, Yu, Liu & Cui 2022, GTG-Shapley: Efficient and Accurate Participant Contribution Evaluation in
  Federated Learning (ACM TIST 13), Algorithm 1: nothing where the round changed little (between-round truncation);
  permutations of which each begins with another site, in turn (guided sampling); along each, no more coalitions once
  one is worth nearly what all are (within-round truncation); until the means have settled.
- :func:`leave_one_out`: v(N) − v(N without i): n + 2 coalitions; does not add up to v(N) − v(∅).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np

Coalition = frozenset[str]
Worths = dict[Coalition, float]
Valuing = Generator[list[Coalition], Worths, dict[str, float]]
"""Yields coalitions that were not asked before; is sent the worth of each; returns the value of each site."""
Method = Literal["gtg", "exact", "leave_one_out"]
NOBODY: Coalition = frozenset()
SETTLED, LAST, PARTS = 0.05, 10, 1_000_000


def exact(sites: Sequence[str]) -> Valuing:
    """Every site's Shapley value, by all coalitions."""
    size = len(sites)
    known = yield [frozenset(some) for count in range(size + 1) for some in combinations(sites, count)]
    values = dict.fromkeys(sites, 0.0)
    for coalition, worth in known.items():
        for site in sites:  # each coalition stands in every site's sum once: with it, or without it
            inside = site in coalition
            others = len(coalition) - inside
            values[site] += (1 if inside else -1) * worth / (size * comb(size - 1, others))
    return values


def leave_one_out(sites: Sequence[str]) -> Valuing:
    """What the model loses without each site."""
    everybody = frozenset(sites)
    known = yield [everybody, *(everybody - {site} for site in sites)]
    return {site: known[everybody] - known[everybody - {site}] for site in sites}


def gtg(
    sites: Sequence[str], random: np.random.Generator, *, between: float = 0.0, within: float = 0.0, most: int = 100
) -> Valuing:
    """Shapley values by guided permutations. between: least |v(N) − v(∅)| of a round that counts. within: how near to
    v(N) a coalition must be for the rest of its permutation not to count. most: passes, each of one permutation for
    every site. The walks of a pass go on side by side, so that their coalitions are asked together."""
    everybody, sums = frozenset(sites), dict.fromkeys(sites, 0.0)
    known: Worths = yield [NOBODY, everybody]
    start, end = known[NOBODY], known[everybody]
    if abs(end - start) <= between:
        return sums
    means: list[list[float]] = []
    for number in range(1, most + 1):
        orders = []
        for first in sites:
            rest = [site for site in sites if site != first]
            orders.append([first, *(rest[place] for place in random.permutation(len(rest)))])
        now = [start] * len(orders)
        for length in range(1, len(sites) + 1):
            going = [i for i, worth in enumerate(now) if abs(end - worth) > within]  # the others' steps are worth 0
            asked = {frozenset(orders[i][:length]) for i in going} - known.keys()
            if asked:
                known |= yield sorted(asked, key=sorted)
            for i in going:
                after = known[frozenset(orders[i][:length])]
                sums[orders[i][length - 1]] += after - now[i]
                now[i] = after
        means.append([sums[site] / (number * len(sites)) for site in sites])
        if _settled(means):
            break
    return dict(zip(sites, means[-1], strict=True))


def _settled(means: Sequence[Sequence[float]]) -> bool:
    """Did the last LAST means of every site move by no more than SETTLED of them, on average?"""
    if len(means) <= LAST:
        return False
    recent = np.array(means[-LAST - 1 :])
    moved = np.abs(recent[:-1] - recent[-1]) / np.maximum(np.abs(recent[-1]), 1e-12)
    return bool(moved.mean(1).max() <= SETTLED)


def valued(method: Valuing, worth: Callable[[Coalition], float]) -> dict[str, float]:
    """Run a method where worths are to be had at once."""
    asked = next(method)
    while True:
        try:
            asked = method.send({coalition: worth(coalition) for coalition in asked})
        except StopIteration as stop:
            found: dict[str, float] = stop.value
            return found


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """Each site's share in what is to be shared: its value if that is positive, else nothing, over the sum; in
    millionths that sum to exactly 1 (largest remainders first, then by name). All 0 where no value is positive."""
    positive = {site: max(value, 0.0) for site, value in values.items()}
    total = sum(positive.values())
    if not total > 0:
        return dict.fromkeys(values, 0.0)
    exactly = {site: PARTS * value / total for site, value in positive.items()}
    parts = {site: int(part) for site, part in exactly.items()}
    order = sorted(exactly, key=lambda site: (parts[site] - exactly[site], site))
    for site in order[: PARTS - sum(parts.values())]:
        parts[site] += 1
    return {site: part / PARTS for site, part in parts.items()}
