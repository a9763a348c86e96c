"""Sparse and quantised updates that still add up, and so compose with masks, encryption and noise.

*Sparse*: all sites send the same coordinates, so that their sum is the sum at these. Which ones is drawn anew each
round, or half of them are those where the last sums were largest: in both cases it is told to everybody, and the digest
of what is told stands in every mask's label. What a site does not send it adds to its next change (error feedback).
*Quantised*: each value is rounded at random to one of its two neighbours on a grid of 2^bits steps, so that it is
right on average, and what rounding took comes with the next change; the grid is the field's resolution, so a ring as
narrow as the grid allows carries the sum, and under ``plain`` so many bits do.
*Low-rank* (``rank``): see ``lowrank.py``.

Sums do not survive coordinates that each site chooses for itself (``choose: own``), a grid of its own, halves, or
lossless coding: these make messages that stand alone (``coded.py``), and need a protection that shows single replies.

Sources: Konečný et al. 2016, Federated Learning: Strategies for Improving Communication Efficiency, §2 (random masks);
Stich, Cordonnier & Jaggi 2018, Sparsified SGD with Memory, Algorithm 1; Alistarh et al. 2017, QSGD, §3.1; Seide et al.
2014, 1-Bit Stochastic Gradient Descent, §2.1 (what rounding took).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from atoll.compression import coded
from atoll.compression.coded import Form
from atoll.compression.downlink import Downlink
from atoll.compression.half import Precision
from atoll.compression.known import Known
from atoll.compression.places import Indices, largest
from atoll.contract.bits import Bytes
from atoll.contract.errors import AtollError, PlanError, ProtocolError
from atoll.contract.rounds import Task, not_taken
from atoll.contract.wire import Array

FINE = 1e-9
"""Resolution of values that are not quantised."""


class Compression(BaseModel):
    """keep: share of the weights that is sent in a round. choose: which: "random", or "top", half of them where the
    last sums were largest and half at random, or "due", where most has piled up by what sums tell (``known.py``), or
    "own", where each site's own change is largest. bits: of the grid that
    values are rounded to; null: fine. grid: how far it reaches: to the clip, or ("told" with each round) as far as the
    last sums make likely. precision: of values as they travel. lossless: replies are made smaller by zstd. rank: each
    layer's change travels as two factors of this rank. down: what sites are sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: float = Field(default=1.0, gt=0, le=1)
    choose: Literal["random", "top", "due", "own"] = "random"
    bits: int | None = Field(default=None, ge=2, le=24)
    grid: Literal["clip", "told"] = "clip"
    precision: Precision = "float32"
    lossless: bool = False
    rank: int | None = Field(default=None, ge=1, le=256)
    down: Downlink = Downlink()

    @property
    def own(self) -> bool:
        """Does each site choose its coordinates?"""
        return self.choose == "own" and self.keep < 1

    @property
    def common(self) -> bool:
        """Are the coordinates of a round the same at all sites, and not all?"""
        return self.keep < 1 and not self.own

    @property
    def alone(self) -> bool:
        """Is every reply a message that stands alone?"""
        return self.own or self.lossless or self.precision != "float32"

    @property
    def form(self) -> Form:
        """Of such a message."""
        return Form(self.bits, self.precision, lossless=self.lossless)

    @property
    def keeps(self) -> bool:
        """Does a site keep what it did not send?"""
        lossy = self.keep < 1 or self.bits is not None or self.precision != "float32"
        return lossy or self.rank is not None

    @property
    def remembers(self) -> tuple[str, ...]:
        """What of :class:`Known` a round's coordinates and grid follow from."""
        if self.common and self.choose == "due":
            return ("last", "pace", "seen")
        return ("last",) if self.common or self.grid == "told" else ()

    def conflicts(self, rule: str, groups: bool) -> list[AtollError]:
        """What cannot be combined. rule: how sites' changes become one; groups: of groups of sites."""
        found = self.down.conflicts()
        if self.bits is not None and self.precision != "float32":
            found.append(_not_both("bits", "precision", "values are on a grid, or they are floats"))
        if self.alone and groups:
            why = "a message that stands alone is in no sum of a group (own choice, precision, lossless)"
            found.append(_not_both("choose", "aggregate.groups", why))
        if self.rank is None:
            return found
        if rule != "mean":
            found.append(_not_both("rank", "aggregate.rule", "two factors are sums, of which no rule sees single ones"))
        if self.keep < 1 or self.bits is not None or self.alone:
            others = "keep, bits, precision, lossless"
            found.append(_not_both("rank", others, "factors travel as they are"))
        return found

    def count(self, size: int) -> int:
        """How many of *size* coordinates are sent in a round."""
        return max(1, round(self.keep * size))

    def support(self, known: Known, seed: int, number: int) -> Indices:
        """The coordinates of round *number*, [k], in order."""
        size = len(known.last)
        if not self.common or self.count(size) == size:
            return np.arange(size)
        return self._with_drawn(self._best(known, number), size, seed, number)

    def reach(self, known: Known, clip: float) -> float:
        """How far a round's grid reaches, at most *clip*: SPAN times how large the last known changes are."""
        moved = known.last[known.last != 0]
        if self.grid == "clip" or self.bits is None or self.alone or not len(moved):
            return clip
        return float(np.clip(SPAN * np.sqrt(np.mean(moved**2)), NARROWEST * clip, clip))

    def reached(self, task: Task, clip: float) -> float:
        """The same, of a task."""
        if self.grid == "clip" or self.bits is None or self.alone:
            return clip
        return float(np.clip(task.take("reach", ()), NARROWEST * clip, clip))

    def telling(self, known: Known, clip: float, seed: int, number: int) -> dict[str, Array]:
        """What sites are sent of a round's grid and coordinates: how to draw them, and those that are not drawn."""
        told, size = dict[str, Array](), len(known.last)
        if self.grid == "told":
            told["reach"] = np.array(self.reach(known, clip))
        if not self.common:
            return told
        best, told["draw"] = self._best(known, number), np.array([seed, number], np.int64)
        if self._fixed(size):
            told["best"] = coded.encode(np.zeros(len(best), np.uint8), best, size, PLACES)
        return told

    def told(self, task: Task, size: int) -> Indices:
        """The coordinates [k] that a task says, in order; raises ProtocolError."""
        draw, best = task.arrays.get("draw"), np.zeros(0, np.int64)
        if draw is None or draw.dtype != np.int64 or draw.shape != (2,) or min(draw) < 0:
            raise not_taken("draw")
        if self._fixed(size):
            best = coded.decode(task.arrays.get("best", np.zeros(0)), size, PLACES)[0]
            if len(best) != self._fixed(size):
                raise not_taken("best")
        return self._with_drawn(best, size, int(draw[0]), int(draw[1]))

    def _fixed(self, size: int) -> int:
        """How many of *size* are not drawn."""
        count = self.count(size)
        return {"top": count // 2, "due": count - count // EXPLORED}.get(self.choose, 0)

    def _best(self, known: Known, number: int) -> Indices:
        return largest(known.last if self.choose == "top" else known.due(number), self._fixed(len(known.last)))

    def _with_drawn(self, best: Indices, size: int, seed: int, number: int) -> Indices:
        """*best*, and so many others that there are enough: those with the smallest of random keys, which are the same
        for every version of numpy (a generator's choice need not be)."""
        others = np.ones(size, bool)
        others[best] = False
        free = np.flatnonzero(others)
        keys = np.random.Philox(np.random.SeedSequence((seed, number, size))).random_raw(len(free))
        wanted = self.count(size) - len(best)
        if not wanted:
            return best
        drawn = free[np.argpartition(keys, wanted - 1)[:wanted]]
        return np.sort(np.concatenate([best, drawn])).astype(np.int64)

    def step(self, clip: float) -> float:
        """The grid's resolution for values within ±clip."""
        return FINE if self.bits is None or self.alone else 2 * clip / (2**self.bits - 1)

    def carried(self, change: Array, state: dict[str, Array]) -> Array:
        """*change* [size] with what earlier rounds left out."""
        return change + state["residual"] if "residual" in state else change

    def kept(self, rest: Array, state: dict[str, Array], dtype: np.dtype[Any] | type = np.float64) -> None:
        """Keep *rest* [size], what was not sent, for later rounds."""
        if self.keeps:
            state["residual"] = rest.astype(dtype)

    def rounded(self, values: Array, clip: float, task: Task) -> Array:
        """*values* [k] on the grid, each right on average. The coins are public: they hide nothing."""
        if self.bits is None or self.alone:
            return values
        step = self.step(clip)
        most = math.floor(clip / step)
        scaled = np.clip(values, -clip, clip) / step
        return np.clip(np.floor(scaled + coins(task).random(scaled.shape)), -most, most) * step

    def chosen(self, values: Array) -> Indices:
        """Which of *values* [size] leave: all, or where they are largest."""
        return largest(values, self.count(len(values))) if self.own else np.arange(len(values))

    def nothing(self, size: int, task: Task) -> Bytes:
        """The message of a site that has no rows."""
        number = self.asked(size)
        return self.written(np.zeros(self.count(number) if self.own else number),
                            np.arange(self.count(number) if self.own else number), number, task)[0]  # fmt: skip

    def asked(self, size: int) -> int:
        """Of how many coordinates sites send some, or all."""
        return self.count(size) if self.common else size

    def written(self, values: Array, chosen: Indices, size: int, task: Task) -> tuple[Bytes, Array]:
        """(*values* [k] at *chosen* of [size] as a message of its own, what the coordinator reads there, [k])."""
        message = coded.encode(values, chosen, size, self.form, coins(task))
        return message, coded.decode(message, size, self.form)[1].astype(np.float64)

    def limit_bytes(self, size: int) -> int:
        """Most bytes of such a message, where *size* coordinates are asked for, or chosen from."""
        return self.form.limit_bytes(self.count(size) if self.own else size, size)

    def read(self, message: NDArray[np.uint8], size: int) -> Array:
        """Such a message's values, [size], zero where it has none; raises ProtocolError."""
        count = self.count(size) if self.own else size
        chosen, values = coded.decode(message, size, self.form, count)
        if len(chosen) != count:
            raise ProtocolError("compression.malformed", "a message holds fewer values than the plan says",
                                field="coded", remedy="use the same Atoll version at both ends")  # fmt: skip
        spread = np.zeros(size)
        spread[chosen] = values
        return spread


EXPLORED = 20
"""One in so many coordinates is drawn, where the others are chosen by what is known."""
SPAN = 8.0
"""A grid reaches so many times the root mean square of the last known mean changes: a site's own are larger."""
NARROWEST = 1e-4
"""Of the clip: no grid is narrower."""
PLACES = Form(words=1, lossless=True)
"""Coordinates alone: their values are zeros, which zstd makes nothing of."""


def coins(task: Task) -> np.random.Generator:
    """For rounding: others than those that shuffle rows."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((*task.seed, 7))))


def _not_both(one: str, other: str, why: str) -> PlanError:
    return PlanError("plan.illegal-compression", f"{one} and {other} cannot be combined: {why}",
                     field=f"params.compress.{one}", remedy=f"leave out {one}, or {other}")  # fmt: skip
