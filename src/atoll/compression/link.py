"""The coordinator's side of a plan's compression through a run: what sites hold, and what a run saved.

What travels uncompressed is the measure: every weight as a float32, to each site and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from atoll.compression.downlink import Versions
from atoll.compression.lowrank import LowRank
from atoll.compression.update import Compression
from atoll.contract.wire import Array

DENSE_BYTES = 4


class Link:
    """apart: what single sites are sent with the round that was asked last. right: the factors that the next low-rank
    round begins with, [Σ rights]."""

    def __init__(
        self, rule: Compression, first: NDArray[np.floating[Any]], seed: int, sites: Sequence[str],
        factors: LowRank | None = None,
    ) -> None:  # fmt: skip
        """first: what sites are sent of the model at the beginning, [size]."""
        self.rule, self.seed, self.size = rule, seed, len(first)
        self.versions = Versions(rule.down, first, seed, sites) if rule.down.changes else None
        self.right = factors.begin(seed) if factors is not None else np.zeros(0)
        self.apart: Mapping[str, Mapping[str, Array]] = {}
        self.dense = np.zeros(2, np.int64)

    def sent(self, model: NDArray[np.floating[Any]], number: int) -> dict[str, Array]:
        """What all sites are sent of *model* [size] with round *number*."""
        if self.versions is None:
            return self.rule.down.whole(model, self.seed, number)
        told, self.apart = self.versions.towards(model)
        return told

    def answered(self, sites: Sequence[str], values: int) -> None:
        """*sites* were sent the model, and answered with *values* numbers each."""
        if self.versions is not None:
            self.versions.answered(sites)
        self.dense += DENSE_BYTES * len(sites) * np.array([self.size, values])

    def arrays(self) -> dict[str, Array]:
        """For a checkpoint."""
        found: dict[str, Array] = {"dense": self.dense.copy()}
        if len(self.right):
            found["right"] = self.right
        return found | (self.versions.arrays() if self.versions is not None else {})

    def resumed(self, state: dict[str, Array]) -> Self:
        """As :meth:`arrays` was made; takes them out of *state*."""
        self.dense = np.array(state.pop("dense", self.dense))
        self.right = state.pop("right", self.right)
        if self.versions is not None:
            self.versions.restore(state)
        return self

    def told(self) -> dict[str, Any]:
        """Of the run's result: what would have travelled, in bytes."""
        to, back = self.dense.tolist()
        return {"dense": {"to_sites_bytes": to, "from_sites_bytes": back}}
