"""A plan's noise: what each site adds to each release, and what the release costs.

A function of the plan and the cohort's size alone, so that every site and the coordinator derive the same. The noise's
scale follows from the declared sensitivity, never from a setting. Under a protection that shows only sums, each site
adds its share of the noise; under one that shows single replies, each adds all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

import numpy as np
from dp_accounting import DpEvent

from atoll.contract.errors import PlanError, PrivacyBudgetError
from atoll.contract.privacy import Privacy
from atoll.contract.rounds import Field
from atoll.contract.sensitivity import Norms
from atoll.contract.wire import Array
from atoll.privacy.dp import discrete_gaussian, gaussian, geometric, laplace
from atoll.privacy.dp.accounting import Events, calibrate, prefix
from atoll.privacy.dp.noise import field_scales, honest, on_grid
from atoll.privacy.dp.randomness import Secure
from atoll.privacy.dp.schedule import shape

SLACK = 1e-9
"""What it may cost a release (ξ of zero-concentrated DP) that discrete shares add up only nearly to discrete noise."""
GRID = 2.0**20
"""Steps of the grid in one scale of the noise are enough: a finer one would be noise too."""
ROOM = {"l2": 12.0, "l1": 45.0}
"""Noise beyond so many scales is improbable (2⁻⁹⁸ and 2⁻⁶⁴): bounds make room for it."""


class Noise:
    """The noise of one run."""

    def __init__(self, privacy: Privacy, rates: Sequence[float], survivors: int, *, shared: bool) -> None:
        """rates: for each round, the rate of secret Poisson sampling (1: every record takes part). survivors: fewest
        sites in a sum. shared: only sums are seen. Raises PrivacyBudgetError "dp.no-honest-site", PlanError
        "dp.gaussian-shares"."""
        if shared and privacy.mechanism == "gaussian":
            raise PlanError(
                "dp.gaussian-shares", "rounded shares of continuous noise have no proven sum",
                field="privacy.mechanism", remedy="choose discrete_gaussian",
            )  # fmt: skip
        self.privacy, self.rates = privacy, tuple(rates)
        self.shares = honest(survivors, privacy.colluding) if shared else 1
        self.norm = "l1" if privacy.mechanism in ("laplace", "geometric") else "l2"

    @cached_property
    def multipliers(self) -> tuple[float, ...]:
        """Each round's noise multiplier; together they meet the plan's (ε, δ)."""
        relative = shape(len(self.rates), self.privacy.stages, self.privacy.ratio)
        if self.privacy.delta == 0:
            if self.norm != "l1" or any(rate < 1 for rate in self.rates):
                raise PrivacyBudgetError(
                    "dp.delta", "delta may be 0 only with laplace or geometric noise, and without sampling",
                    field="delta", remedy="choose delta well below one over the number of units, such as 1e-6",
                )  # fmt: skip
            factor = sum(1 / noise for noise in relative) / self.privacy.epsilon
        else:
            factor = calibrate(
                self.privacy.epsilon, self.privacy.delta, lambda z: self._events([z * n for n in relative])
            )
        return tuple(factor * noise for noise in relative)

    @cached_property
    def costs(self) -> list[float]:
        """ε after each round, never more than the plan's."""
        if self.privacy.delta == 0:
            return [float(cost) for cost in np.cumsum([1 / z for z in self.multipliers])]
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

    def _each(self, multipliers: Sequence[float]) -> Events:
        return [(self._event(z, rate), 1) for z, rate in zip(multipliers, self.rates, strict=True)]

    def _events(self, multipliers: Sequence[float]) -> Events:
        counts: dict[tuple[float, float], int] = {}
        for key in zip(multipliers, self.rates, strict=True):
            counts[key] = counts.get(key, 0) + 1
        return [(self._event(z, rate), count) for (z, rate), count in counts.items()]

    def fitted(
        self, number: int, fields: Mapping[str, Field], norms: Mapping[str, Norms]
    ) -> tuple[dict[str, Field], dict[str, float]]:
        """For round *number*: its *fields* with room for noise in their bounds, and the whole noise's scale for each,
        in steps of its grid.

        norms: of one unit. A grid much finer than the noise is made coarser: to GRID steps a scale. Raises PlanError
        where a field has no step, PrivacyBudgetError beyond the planned rounds.
        """
        if number >= len(self.rates):
            raise PrivacyBudgetError(
                "dp.more-releases", f"the plan's budget is for {len(self.rates)} rounds, and this is another",
                field="privacy", remedy="the program asks for more sums than planned: submit a new plan",
            )  # fmt: skip
        kind: Literal["l1", "l2"] = "l1" if self.norm == "l1" else "l2"
        multiplier, steps, grid = self.multipliers[number], dict[str, float](), dict[str, Norms]()
        rough = field_scales(norms, multiplier, norm=kind)
        for name, field in fields.items():
            counts = np.dtype(field.dtype).kind in "iu"
            if not field.step or None in field.shape:
                raise PlanError("dp.no-step", "noise needs a declared shape and step", field=name)
            if self.privacy.mechanism == "geometric" and not counts and norms[name].l2:
                raise PlanError(
                    "dp.geometric-counts", "geometric noise is for counts", field=name,
                    remedy="choose laplace, or discrete_gaussian",
                )  # fmt: skip
            finer = rough[name] / field.step / GRID
            steps[name] = field.step * 2.0 ** math.ceil(math.log2(finer)) if finer > 1 and not counts else field.step
            size = math.prod(int(n or 0) for n in field.shape)
            grid[name] = on_grid(norms[name], steps[name], size, exact=counts) if norms[name].l2 else Norms(0, 0)
        scales = field_scales(grid, multiplier, norm=kind)
        return {name: self._with_room(field, steps[name], scales[name]) for name, field in fields.items()}, scales

    def _with_room(self, field: Field, step: float, scale: float) -> Field:
        room = (ROOM[self.norm] * scale + 1) * step if scale else 0
        return replace(field, step=step, bound=(field.bound or 0) + room)

    def add(
        self, arrays: Mapping[str, Array], fields: Mapping[str, Field], scales: Mapping[str, float],
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
            drawn, extra = self._draw(array.shape, scale, random(name))
            slack += extra
            if array.dtype.kind in "iu":
                noised[name] = array + drawn.astype(np.int64)
            else:
                noised[name] = (np.rint(np.asarray(array, np.float64) / step) + drawn) * step
        if slack > SLACK:
            raise PrivacyBudgetError(
                "dp.coarse-grid", "a share of the noise is too small for the field's grid", field="privacy",
                remedy="ask for a smaller epsilon, or choose mechanism gaussian",
            )  # fmt: skip
        return noised

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
