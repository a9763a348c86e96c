"""A reply's fixed-point numbers, side by side in cells below a modulus, and their sums out of sums of cells.

A ring's integers (see ``fixed_point``) lie within ±m. With m added to each, n of them add up to at most 2·n·m, and that
many bits are a slot: nothing runs over into the next one, however many sites drop out. So sums of cells are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from atoll.contract.errors import ProtocolError
from atoll.contract.rounds import Field
from atoll.contract.wire import Array
from atoll.crypto.packing import Packing
from atoll.privacy.fixed_point import Layout, add_to


@dataclass(frozen=True, slots=True)
class _Ring:
    """One ring's *size* numbers: all cells but the last are its own; the last one, mostly empty, rings share.

    offset: m. shared, shift: in which of the shared cells its last *tail_bits* stand, and from which bit on.
    """

    width: int
    size: int
    offset: int
    packing: Packing
    shared: int
    shift: int

    @property
    def own_cells(self) -> int:
        return self.packing.num_cells(self.size) - 1

    @property
    def tail_bits(self) -> int:
        return (self.size - self.own_cells * self.packing.slots_per_cell) * self.packing.slot_bits

    def times(self, number: int) -> Array:
        """offset · number as an element of the ring, to be added to each of a vector."""
        value = self.offset * number
        if self.width == 128:
            return np.array([[value % 2**64, value >> 64]], np.uint64)
        return np.array([value % 2**self.width], f"u{self.width // 8}")


class Slots:
    """Where each number of a reply stands; the same at every party."""

    def __init__(self, fields: Mapping[str, Field], num_sites: int, modulus_bits: int) -> None:
        """Raises PlanError where the sum of *num_sites* replies fits no ring."""
        self._layout = Layout.of(fields, num_sites)
        self._rings: list[_Ring] = []
        self._used = [0]
        for width, size in self._layout.sizes().items():
            offset = max(_largest(field) for name, field in fields.items() if self._layout.widths[name] == width)
            packing = Packing(modulus_bits, (2 * num_sites * offset).bit_length(), num_sites)
            ring = _Ring(width, size, offset, packing, 0, 0)
            if self._used[-1] + ring.tail_bits > modulus_bits - 1:
                self._used.append(0)
            self._rings.append(_Ring(width, size, offset, packing, len(self._used) - 1, self._used[-1]))
            self._used[-1] += ring.tail_bits
        self.num_cells = sum(ring.own_cells for ring in self._rings) + len(self._used)

    def pack(self, arrays: Mapping[str, Array]) -> list[int]:
        """Arrays within their bounds as cells, each below 2^(modulus_bits − 1)."""
        vectors, cells, shared = self._layout.encode(arrays), list[int](), [0] * len(self._used)
        for ring in self._rings:
            vector = vectors[f"ring{ring.width}"]
            add_to(vector, ring.times(1))
            *own, last = ring.packing.pack(vector.astype(np.uint64))
            cells += own
            shared[ring.shared] |= last << ring.shift
        return [*cells, *shared]

    def sums(self, cells: Sequence[int], num_sites: int) -> dict[str, Array]:
        """The sums of *num_sites* replies out of the sums of their cells: counts as int64, reals as float64.

        Raises ProtocolError for cells that no such sum can have.
        """
        shared, vectors, start = cells[len(cells) - len(self._used) :], {}, 0
        if len(cells) != self.num_cells or any(c >> used for c, used in zip(shared, self._used, strict=True)):
            raise ProtocolError(
                "he.not-a-sum", "what was decrypted is not a sum of replies", field="cells",
                remedy="a site or the key holder does not keep the protocol: the ledgers say who sent what",
            )  # fmt: skip
        for ring in self._rings:
            last = shared[ring.shared] >> ring.shift & ((1 << ring.tail_bits) - 1)
            words = ring.packing.unpack([*cells[start : start + ring.own_cells], last], ring.size)
            start += ring.own_cells
            vectors[f"ring{ring.width}"] = vector = words.astype("u8" if ring.width == 128 else f"u{ring.width // 8}")
            add_to(vector, ring.times(num_sites), minus=True)
        return self._layout.decode(vectors)


def reach(field: Field) -> float:
    """The largest |value| that a site sends: the gate clips to the bound as the field's dtype rounds it."""
    bound = field.bound or 0
    return bound * (1 + float(np.finfo(field.dtype).eps)) if np.dtype(field.dtype).kind == "f" else bound


def _largest(field: Field) -> int:
    """The largest |integer| that a value of the field becomes."""
    most, step = reach(field), field.step or 1
    return max(math.ceil(Fraction(most) / Fraction(step)), round(most / step), 1)
