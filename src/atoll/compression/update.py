"""Sparse and quantised updates that still add up, and so compose with masks, encryption and noise.

*Sparse*: all sites send the same coordinates, so that their sum is the sum at these. Which ones is drawn anew each
round, or half of them are those where the last sums were largest: in both cases it is told to everybody, and the digest
of what is told stands in every mask's label. What a site does not send it adds to its next change (error feedback).
*Quantised*: each value is rounded at random to one of its two neighbours on a grid of 2^bits steps, so that it is
right on average; the grid is the field's resolution, so a ring as narrow as the grid allows carries the sum.

What is refused, because sums do not survive it: coordinates that each site chooses for itself, and a grid of its own.

Sources: Konečný et al. 2016, Federated Learning: Strategies for Improving Communication Efficiency, §2 (random masks);
Stich, Cordonnier & Jaggi 2018, Sparsified SGD with Memory, Algorithm 1; Alistarh et al. 2017, QSGD, §3.1.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import Task
from atoll.contract.wire import Array

Indices = NDArray[np.int64]
FINE = 1e-9
"""Resolution of values that are not quantised."""


class Compression(BaseModel):
    """keep: share of the weights that is sent in a round. choose: which: "random", or "top", half of them where the
    last sums were largest and half at random. bits: of the grid that values are rounded to; null: fine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: float = Field(default=1.0, gt=0, le=1)
    choose: Literal["random", "top"] = "random"
    bits: int | None = Field(default=None, ge=2, le=24)

    def count(self, size: int) -> int:
        """How many of *size* coordinates are sent in a round."""
        return max(1, round(self.keep * size))

    def support(self, last: Array, seed: int, number: int) -> Indices:
        """The coordinates of round *number*, [k], in order. last: the last change known of each weight, [size]."""
        size = len(last)
        count = self.count(size)
        if count == size:
            return np.arange(size)
        best = np.argsort(-np.abs(last), kind="stable")[: count // 2 if self.choose == "top" else 0]
        rest = np.setdiff1d(np.arange(size), best)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number, size))))
        drawn = random.choice(rest, count - len(best), replace=False, shuffle=False)
        return np.sort(np.concatenate([best, drawn])).astype(np.int64)

    def told(self, task: Task, size: int) -> Indices:
        """The coordinates that came with a task, after checking them; raises ProtocolError."""
        given = task.arrays.get("support")
        right = given is not None and given.dtype == np.int64 and given.shape == (self.count(size),)
        if given is None or not right or (np.diff(given) <= 0).any() or given[0] < 0 or given[-1] >= size:
            raise ProtocolError("task.array", "a task's array is not what the handler takes", field="support")
        return given

    def step(self, clip: float) -> float:
        """The grid's resolution for values within ±clip."""
        return FINE if self.bits is None else 2 * clip / (2**self.bits - 1)

    def carried(self, change: Array, support: Indices | slice, state: dict[str, Array]) -> Array:
        """*change* at *support*, [k], with what earlier rounds left out; the rest is kept for later rounds."""
        if self.keep == 1:
            return change
        whole = change + state.get("residual", 0.0)
        sent = whole[support]
        whole[support] = 0
        state["residual"] = whole
        return sent

    def rounded(self, values: Array, clip: float, task: Task) -> Array:
        """*values* [k] on the grid, each right on average. The coins are public: they hide nothing."""
        if self.bits is None:
            return values
        step = self.step(clip)
        most = math.floor(clip / step)
        scaled = np.clip(values, -clip, clip) / step
        return np.clip(np.floor(scaled + task.shuffler().random(scaled.shape)), -most, most) * step
