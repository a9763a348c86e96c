"""What a site sends of its round: which weights, in what shapes, to what resolution, and how far it can move a sum.

Sizes are checked, rings made wide enough and noise calibrated by what is declared here, before anybody trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from atoll.compression.lowrank import LowRank
from atoll.compression.update import FINE, Compression
from atoll.contract.rounds import Field, opaque
from atoll.contract.sensitivity import Norms, touches, within
from atoll.contract.updates import Update
from atoll.models.model import Model

Shapes = Mapping[str, tuple[tuple[int, ...], float]]
"""By name: an array's shape, and the bound of each of its elements."""
THIN = 2.0**-25
"""Resolution of a low-rank factor, of the largest that it can be: it fits a ring of 32 bits for some sixty sites."""


@dataclass(frozen=True)
class Payload:
    """A site's change of the weights, its loss and *extras*, each times its weight in the mean, and that weight.

    moving: places in "weights" that travel, in order, [num_moving]. most: a site's weight in the mean is at most this.
    compress, clip, clip_norm_l2: as the plan says (see ``FederatedParams``).
    """

    model: Model
    moving: NDArray[np.int64]
    extras: Shapes
    most: float
    compress: Compression
    clip: float
    clip_norm_l2: float | None

    @cached_property
    def factors(self) -> LowRank | None:
        """How its weights that travel are parts of matrices, where the plan says a rank."""
        if self.compress.rank is None:
            return None
        shapes = {name: array.shape for name, array in self.model.arrays().items() if name in self.model.layers}
        return LowRank.of(shapes, self.model.layers, self.moving, self.compress.rank)

    @cached_property
    def shapes(self) -> Shapes:
        """All but the weight, as they leave."""
        sent, bound = self.compress.count(len(self.moving)), self.clip
        if self.factors is not None:
            sent, bound = sum(self.factors.lefts) + len(self.factors.dense), bound * self.factors.longest[0]
        return {"weights": ((sent,), bound), "loss": ((), self.clip), **self.extras}

    @property
    def size(self) -> int:
        """Numbers of an uncompressed reply, but for the weight."""
        others = (shape for name, (shape, _) in self.shapes.items() if name != "weights")
        return len(self.moving) + sum(math.prod(shape) for shape in others)

    def zeros(self) -> dict[str, NDArray[np.float64]]:
        """Of a site that has nothing to say."""
        return {name: np.zeros(shape) for name, (shape, _) in self.shapes.items()}

    def fields(self, exact: bool) -> dict[str, Field]:
        """The fields of a round. exact: no noise is added to them."""
        found = self.fields_of(self.shapes, exact)
        if self.compress.alone:
            found["weights"] = opaque(self.compress.limit_bytes(self.compress.asked(len(self.moving))))
        return found

    def fields_of(self, shapes: Shapes, exact: bool) -> dict[str, Field]:
        """As :meth:`fields`, of arrays of other *shapes*."""
        found: dict[str, Field] = {}
        coarse = self.compress.bits is not None  # a float32 does not hold a place on the grid times a weight
        single = exact and not coarse and self.model.dtype == np.float32  # no more is known of a network's change
        for name, (shape, bound) in shapes.items():
            low_rank = self.compress.rank is not None
            step = max(FINE, bound * self.most * THIN) if low_rank else self.compress.step(bound)
            made = Update.fields({name: np.zeros(shape)}, value_bound=bound, weight_bound=self.most, step=step)
            if single and shape:
                made[name] = replace(made[name], dtype="<f4")
            found |= made
        return found

    def norms(self) -> dict[str, Norms]:
        """How far one site can move each field's sum."""
        found = {name: touches(math.prod(shape), bound) * self.most for name, (shape, bound) in self.shapes.items()}
        if self.compress.rank is None:  # factors: by their bound
            size = self.shapes["weights"][0][0]
            rounding = size**0.5 * self.compress.step(self.clip) if self.compress.bits else 0.0
            norm = min(self.clip * size**0.5, (self.clip_norm_l2 or np.inf) + rounding)
            found["weights"] = within(norm, size) * self.most
        return {**found, "weight": touches(1, self.most)}


def narrowed(fields: Mapping[str, Field], share: float) -> Mapping[str, Field]:
    """*fields*, where the grid of "weights" reaches that share of the clip."""
    whole = fields["weights"]
    if share == 1 or whole.bound is None or whole.step is None:
        return fields
    return {**fields, "weights": replace(whole, bound=whole.bound * share, step=whole.step * share)}
