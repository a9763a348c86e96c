"""A plan's noise: what each site adds to each release, and what the release costs.

A function of the plan and the cohort's size alone, so that every site and the coordinator derive the same. The noise's
scale follows from the declared sensitivity, never from a setting. Under a protection that shows only sums, each site
adds its share of the noise; under one that shows single replies, each adds all of it. A region adds none: its sum holds
all of the noise by its own sites', whose shares are of those that it must have left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from atoll.contract.errors import PlanError, PrivacyBudgetError
from atoll.contract.privacy import Privacy
from atoll.contract.rounds import Field
from atoll.contract.sensitivity import Norms
from atoll.contract.wire import Array
from atoll.privacy.dp import discrete_gaussian, gaussian, geometric, laplace, tree
from atoll.privacy.dp.noise import field_scales, honest, on_grid
from atoll.privacy.dp.randomness import Secure
from atoll.privacy.dp.schedule import shape

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from atoll.privacy.dp.accounting import Events

SLACK = 1e-9
"""What it may cost a release (ξ of zero-concentrated DP) that discrete shares add up only nearly to discrete noise."""
GRID = 2.0**20
"""Steps of the grid in one scale of the noise are enough: a finer one would be noise too."""
ROOM = {"l2": 12.0, "l1": 45.0}
"""Noise beyond so many scales is improbable (2⁻⁹⁸ and 2⁻⁶⁴): bounds make room for it."""


class Noise:
    """The noise of one run."""

    def __init__(
        self, privacy: Privacy, rates: Sequence[float], survivors: int, *, shared: bool, once: Sequence[int] = (),
        planned: Sequence[str] = (), behind: int = 1,
    ) -> None:  # fmt: skip
        """rates: for each round, the rate of secret Poisson sampling (1: every record takes part; 0: none, as nothing
        of the data leaves). survivors: fewest
        sites in a sum. shared: only sums are seen. once: the rounds of which a record takes part in at most one: their
        noise is a tree's. planned: what each round asks, as its digest. behind: most sites that may stand behind one
        name, each with noise of its own: replies have room for theirs. Raises PrivacyBudgetError
        "dp.no-honest-site", PlanError "dp.gaussian-shares", "dp.tree"."""
        if once and privacy.mechanism not in ("gaussian", "discrete_gaussian"):
            raise PlanError(
                "dp.tree", "a tree of noise is of a Gaussian kind", field="privacy.mechanism",
                remedy="choose discrete_gaussian",
            )  # fmt: skip
        if shared and privacy.mechanism == "gaussian":
            raise PlanError(
                "dp.gaussian-shares", "rounded shares of continuous noise have no proven sum",
                field="privacy.mechanism", remedy="choose discrete_gaussian",
            )  # fmt: skip
        self.privacy, self.rates, self.once, self.planned = privacy, tuple(rates), tuple(once), tuple(planned)
        self.behind = behind
        self.shares = honest(survivors, privacy.colluding) if shared else 1
        self.norm = "l1" if privacy.mechanism in ("laplace", "geometric") else "l2"

    @cached_property
    def multipliers(self) -> tuple[float, ...]:
        """Each round's noise multiplier; together they meet the plan's (ε, δ)."""
        single = [number for number, rate in enumerate(self.rates) if rate and number not in self.once]
        staged = dict(
            zip(single, shape(len(single), self.privacy.stages, self.privacy.ratio) if single else [], strict=True)
        )
        relative = [staged.get(number, 1.0) for number in range(len(self.rates))]
        if self.privacy.delta == 0:
            if self.norm != "l1" or any(rate < 1 for rate in self.rates):
                raise PrivacyBudgetError(
                    "dp.delta", "delta may be 0 only with laplace or geometric noise, and without sampling",
                    field="delta", remedy="choose delta well below one over the number of units, such as 1e-6",
                )  # fmt: skip
            factor = sum(1 / noise for noise, rate in zip(relative, self.rates, strict=True) if rate)
            factor /= self.privacy.epsilon
        else:
            from atoll.privacy.dp.accounting import calibrate

            factor = calibrate(
                self.privacy.epsilon, self.privacy.delta, lambda z: self._events([z * n for n in relative])
            )
        return tuple(factor * noise for noise in relative)

    @cached_property
    def costs(self) -> list[float]:
        """ε after each round, never more than the plan's."""
        if self.privacy.delta == 0:
            each = [1 / z if rate else 0.0 for z, rate in zip(self.multipliers, self.rates, strict=True)]
            return [float(cost) for cost in np.cumsum(each)]
        from atoll.privacy.dp.accounting import prefix

        return [min(cost, self.privacy.epsilon) for cost in prefix(self._each(self.multipliers), self.privacy.delta)]

    def _event(self, multiplier: float, rate: float) -> DpEvent:
        match self.privacy.mechanism:
            case "gaussian":
                return gaussian.event(multiplier, sampling_rate=rate)
            case "discrete_gaussian":
                return discrete_gaussian.event(multiplier, slack=SLACK, sampling_rate=rate)
            case "geometric":
                return geometric.event(multiplier, sampling_rate=rate)
            case _:
                return laplace.event(multiplier, sampling_rate=rate)

    def _tree(self, multiplier: float) -> DpEvent:
        """Of all rounds in ``once`` together: each record moves as many nodes as the tree is deep."""
        steps = len(self.once)
        if self.privacy.mechanism == "gaussian":
            return tree.event(multiplier, steps)
        return discrete_gaussian.event(multiplier / math.sqrt(tree.depth(steps)), slack=2 * steps * SLACK)

    def _each(self, multipliers: Sequence[float]) -> Events:
        """A tree is paid for with its first round."""
        first = min(self.once, default=-1)
        return [
            (self._tree(z), int(number == first)) if number in self.once else (self._event(z, rate or 1), int(rate > 0))
            for number, (z, rate) in enumerate(zip(multipliers, self.rates, strict=True))
        ]

    def _events(self, multipliers: Sequence[float]) -> Events:
        counts: dict[tuple[float, float], int] = {}
        for number, key in enumerate(zip(multipliers, self.rates, strict=True)):
            if key[1] and number not in self.once:
                counts[key] = counts.get(key, 0) + 1
        trees = [(self._tree(multipliers[self.once[0]]), 1)] if self.once else []
        return [*trees, *((self._event(z, rate), count) for (z, rate), count in counts.items())]

    def fitted(
        self, number: int, fields: Mapping[str, Field], norms: Mapping[str, Norms]
    ) -> tuple[dict[str, Field], dict[str, float]]:
        """For round *number*: its *fields* with room for noise in their bounds, and the whole noise's scale for each,
        in steps of its grid.

        norms: of one unit. A grid much finer than the noise is made coarser: to GRID steps a scale. Raises PlanError
        where a field has no step, PrivacyBudgetError beyond the planned rounds.
        """
        if not 0 <= number < len(self.rates):
            raise PrivacyBudgetError(
                "dp.more-releases", f"the plan's budget is for {len(self.rates)} rounds, and this is another",
                field="privacy", remedy="the program asks for more sums than planned: submit a new plan",
            )  # fmt: skip
        kind: Literal["l1", "l2"] = "l1" if self.norm == "l1" else "l2"
        multiplier, steps, grid = self.multipliers[number], dict[str, float](), dict[str, Norms]()
        split = {name: one.share for name, one in norms.items()}
        rough = field_scales(norms, multiplier, norm=kind, split=split)
        for name, field in fields.items():
            counts = np.dtype(field.dtype).kind in "iu"
            if not field.step or None in field.shape or (counts and field.step != 1):
                raise PlanError("dp.no-step", "noise needs a declared shape and step, of counts 1", field=name)
            if self.privacy.mechanism == "geometric" and not counts and norms[name].l2:
                raise PlanError(
                    "dp.geometric-counts", "geometric noise is for counts", field=name,
                    remedy="choose laplace, or discrete_gaussian",
                )  # fmt: skip
            finer = rough[name] / field.step / GRID
            steps[name] = field.step * 2.0 ** math.ceil(math.log2(finer)) if finer > 1 and not counts else field.step
            size = math.prod(int(n or 0) for n in field.shape)
            grid[name] = on_grid(norms[name], steps[name], size, exact=counts) if norms[name].l2 else Norms(0, 0)
        scales = field_scales(grid, multiplier, norm=kind, split=split)
        own, most = (
            {n: max(scale, self._least(fields[n], len(fields), shares)) if scale else 0 for n, scale in scales.items()}
            for shares in (self.shares, max(self.shares, self.behind))
        )
        nodes = math.sqrt(tree.depth(len(self.once)) + 1) if number in self.once else 1.0
        return {name: self._with_room(field, steps[name], nodes * most[name]) for name, field in fields.items()}, own

    def _least(self, field: Field, num_fields: int, shares: int) -> float:
        """The scale below which *shares* of discrete noise on the field's grid do not add up as SLACK says."""
        if self.privacy.mechanism != "discrete_gaussian" or shares == 1:
            return 0.0
        size = math.prod(int(n or 0) for n in field.shape)
        terms = 10 * (shares - 1) * max(size, 1) * num_fields / SLACK
        return math.sqrt(shares * math.log(terms)) / math.pi * (1 + 1e-9)

    def _with_room(self, field: Field, step: float, scale: float) -> Field:
        room = (ROOM[self.norm] * scale + 1) * step if scale else 0
        return replace(field, step=step, bound=self.behind * ((field.bound or 0) + room))

    def add(
        self, number: int, arrays: Mapping[str, Array], fields: Mapping[str, Field], scales: Mapping[str, float],
        random: Callable[[str], Secure],
    ) -> dict[str, Array]:  # fmt: skip
        """A site's *arrays* with its share of the noise, on their fields' grids. random: secret, by field."""
        noised = {}
        slack = 0.0
        for name, array in arrays.items():
            scale, step = scales[name], float(fields[name].step or 1)
            if not scale:
                noised[name] = array
                continue
            draw = partial(self._draw, array.shape, scale)
            if number in self.once:
                drawn, extra = self._increment(self.once.index(number), draw, random, name)
            else:
                drawn, extra = draw(random(f"round {number} {name}"))
            slack += extra
            if array.dtype.kind in "iu":
                noised[name] = array + drawn.astype(np.int64)
            else:
                noised[name] = (np.rint(np.asarray(array, np.float64) / step) + drawn) * step
        if slack > SLACK * (tree.depth(len(self.once)) + 1 if number in self.once else 1):
            raise PrivacyBudgetError(
                "dp.coarse-grid", "a share of the noise is too small for the field's grid", field="privacy",
                remedy="ask for a smaller epsilon, or choose mechanism gaussian",
            )  # fmt: skip
        return noised

    def _increment(
        self, step: int, draw: Callable[[Secure], tuple[Array, float]], random: Callable[[str], Secure], name: str
    ) -> tuple[Array, float]:
        """The tree's noise up to *step* less that before it: of the nodes that cover 0 … step, less those that cover
        0 … step − 1. A node's noise is its own stream's, so nothing is kept between rounds."""
        noise, slack = np.zeros((), np.float64), 0.0
        for sign, nodes in (
            (1, tree.cover(step + 1) - tree.cover(step)),
            (-1, tree.cover(step) - tree.cover(step + 1)),
        ):
            for height, place in sorted(nodes):
                drawn, extra = draw(random(f"node {height} {place} {name}"))
                noise, slack = noise + sign * drawn, slack + extra
        return noise, slack

    def _draw(self, size: tuple[int, ...], scale: float, random: Secure) -> tuple[Array, float]:
        match self.privacy.mechanism:
            case "discrete_gaussian":
                extra = discrete_gaussian.slack(scale, self.shares, math.prod(size))
                return discrete_gaussian.share(size, scale, self.shares, random), extra
            case "gaussian":
                return np.rint(gaussian.sample(size, scale / math.sqrt(self.shares), random)), 0.0
            case "geometric":
                return geometric.share(size, scale, self.shares, random), 0.0
            case _:  # Laplace noise has no shares of its own kind here: each site adds all of it
                return np.rint(laplace.sample(size, scale, random)), 0.0
