"""Where masked vectors are added up: a finite group, in which masks are uniform and cancel.

``secagg`` adds in rings modulo a power of two (:class:`Ring`); ``paillier`` modulo its key, under encryption.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from atoll.contract.errors import ProtocolError
from atoll.contract.protection import Exchange, Replies
from atoll.contract.rounds import Field
from atoll.contract.wire import Array
from atoll.crypto.prg import Stream
from atoll.privacy.fixed_point import Layout, add_masks, add_to

Vectors = dict[str, Any]
"""Numbers of a group, by its own names."""


class Group(Protocol):
    """One round's arithmetic; the same at the coordinator and at every site."""

    told: Mapping[str, Array]
    """What the coordinator sends to all sites with the request."""

    def declared(self) -> dict[str, Field]:
        """The masked vectors as they travel."""

    def masked(self, arrays: Mapping[str, Array], plus: Sequence[Stream], minus: Sequence[Stream]) -> dict[str, Array]:
        """A site's reply, within its bounds, plus and minus uniform numbers made of the streams' next bytes."""

    def total(self, replies: Replies) -> Generator[Exchange, Replies, Vectors]:
        """The sum of what arrived, still under masks; the coordinator may need a site's help for it."""

    def add_masks(self, vectors: Vectors, plus: Sequence[Stream], minus: Sequence[Stream]) -> None:
        """Add the same uniform numbers to *vectors*, in place."""

    def decode(self, vectors: Vectors, num_sites: int) -> dict[str, Array]:
        """The sums of *num_sites* replies: counts as int64, reals as float64."""


class Ring:
    """Vectors modulo 2³², 2⁶⁴ or 2¹²⁸ (see :class:`Layout`)."""

    told: Mapping[str, Array] = {}

    def __init__(self, fields: Mapping[str, Field], num_sites: int) -> None:
        """Raises PlanError where the sum of *num_sites* replies fits no ring."""
        self._layout = Layout.of(fields, num_sites)

    def declared(self) -> dict[str, Field]:
        return self._layout.declared()

    def masked(self, arrays: Mapping[str, Array], plus: Sequence[Stream], minus: Sequence[Stream]) -> dict[str, Array]:
        return self._layout.encode(arrays, plus, minus)

    def total(self, replies: Replies) -> Generator[Exchange, Replies, Vectors]:
        """Read piece by piece: memory is one total and one piece."""
        yield from ()
        declared = self.declared()
        total = {name: np.zeros([n or 0 for n in field.shape], field.dtype) for name, field in declared.items()}
        for received in replies.values():
            for name, vector in total.items():
                for offset, piece in received.pieces(name):
                    there = vector.reshape(-1)[offset : offset + piece.size]
                    if vector.ndim == 2:
                        there, piece = there.reshape(-1, 2), piece.reshape(-1, 2)
                    add_to(there, piece)
        return total

    def add_masks(self, vectors: Vectors, plus: Sequence[Stream], minus: Sequence[Stream]) -> None:
        add_masks(vectors, plus, minus)

    def decode(self, vectors: Vectors, num_sites: int) -> dict[str, Array]:
        """Raises ProtocolError for a sum that honest sites cannot come to: one lied, or masks do not cancel."""
        sums = self._layout.decode(vectors)
        for name, field in self._layout.fields.items():
            limit, values = num_sites * ((field.bound or 0) * (1 + 1e-6) + (field.step or 0)), sums[name]
            if values.size and max(float(values.max()), -float(values.min())) > limit:
                raise ProtocolError(
                    "reply.bound", "a sum is beyond what its sites may send", field=name,
                    remedy="a site does not keep the protocol: do not go on with it",
                )  # fmt: skip
        return sums
