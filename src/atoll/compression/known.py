"""What the coordinator knows of how each weight moves, from sums alone: by it a round's common coordinates are chosen.

*Due*: a weight that is not asked for piles up its change at the sites. How much that is by now follows from how fast it
moved when it was last asked for, and how long ago that is; asked for are those of which most has piled up. What was
never asked for is taken to move as fast as the others do. So weights that do not move (of pixels that are always black)
cost nothing, and those that move most are asked for in nearly every round. It is top-k selection with an age, made from
sums instead of one's own gradient: Mortaheb, Kaswan & Ulukus 2024, rAge-k: Communication-Efficient Federated Learning
Using Age Factor, §3 (there of each client's reports).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from atoll.contract.wire import Array


class Known:
    """last: each weight's last known mean change, [size]. pace: its size, by the rounds that it piled up; −1 where
    nothing is known. seen: the round it was last asked for, −1: none."""

    def __init__(self, size: int, seed: int) -> None:
        self.last, self.pace, self.seen = np.zeros(size), np.full(size, -1.0), np.full(size, -1, np.int64)
        random = np.random.Philox(np.random.SeedSequence((seed, size, 13))).random_raw(size)
        self._order = 0.5 + random / 2.0**64

    def due(self, number: int) -> Array:
        """About how much of each weight's change has piled up before round *number*, [size]."""
        known = self.pace >= 0
        middle = float(self.pace[known].mean()) if known.any() else 1.0
        return np.where(known, self.pace, (middle or 1.0) * self._order) * (number - self.seen)

    def note(self, support: Array, mean: Array, number: int) -> None:
        """Round *number* told the *mean* change at *support*, [k]."""
        self.last[support] = mean
        self.pace[support] = np.abs(mean) / (number - self.seen[support])
        self.seen[support] = number

    def arrays(self, names: Sequence[str]) -> dict[str, Array]:
        """For a checkpoint: those that are needed."""
        return {name: getattr(self, name).copy() for name in names}

    def resumed(self, state: dict[str, Array]) -> Self:
        """As :meth:`arrays` was made; takes them out of *state*."""
        self.last = np.array(state.pop("last", self.last))
        self.pace, self.seen = np.array(state.pop("pace", self.pace)), np.array(state.pop("seen", self.seen))
        return self
