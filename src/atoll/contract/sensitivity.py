"""Sensitivity: how much one record can change what a site sends.

Differential privacy needs it, and only the code that runs at the site may say it: a handler
declares ``record=``, a method that says, for every field of its reply, by how much the reply
changes when one record is added or removed. A site derives its noise from that, never from what
it is told.

Source: Dwork & Roth 2014, The Algorithmic Foundations of Differential Privacy, Definition 3.1
(add-or-remove-one neighbours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from atoll.contract.wire import Array


@dataclass(frozen=True, slots=True)
class Norms:
    """How far one record moves a field: l1 = Σ|change| and l2 = √Σ change², over its elements, at most. share: of the
    release's budget, beside the other fields'; noise is the larger the smaller it is."""

    l1: float
    l2: float
    share: float = 1.0

    def __mul__(self, times: float) -> Norms:
        """Of *times* records at once (an entity's)."""
        return Norms(self.l1 * times, self.l2 * times, self.share)


def touches(elements: int = 1, each: float = 1.0) -> Norms:
    """A record changes at most *elements* elements, each by at most *each* (its one cell of a histogram: 1, 1)."""
    return Norms(elements * each, math.sqrt(elements) * each)


def within(l2: float, size: int) -> Norms:
    """A record's contribution to a field of *size* elements is clipped to an L2 norm (a clipped gradient)."""
    return Norms(l2 * math.sqrt(size), l2)


Record = Callable[[Any, Any, Mapping[str, Array]], Mapping[str, Norms]]
"""(program, schema of the prepared table, arrays sent with the task) → norms by field."""
