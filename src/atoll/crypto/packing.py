"""Many small numbers in one plaintext cell, and masks over cells.

A cell is an integer below 2^(modulus bits - 1), hence below n; its slots of *slot_bits* stand side by side, the first
one lowest, so that sums of cells are sums of slots as long as no slot overflows. Masks are uniform modulo n: a masked
cell is uniform modulo n as well, and says nothing; where masks sum to zero modulo n, the sum of masked cells is the
sum of cells modulo n, which, being below n, is the sum itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from gmpy2 import mpz
from numpy.typing import NDArray

from atoll.contract.errors import PlanError, ProtocolError

Words = NDArray[np.uint64]
WORD_BITS = 64
MAX_SLOT_BITS = 128
MASK_EXTRA_BITS = 128
"""How many bits more than n a mask is drawn from, so that it is uniform modulo n to within 2^-128."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Slots of *slot_bits* (1 … 128, room for the sum included) in cells below 2^(modulus_bits - 1).

    max_addends: how many packed vectors are added at most; numbers above (2^slot_bits - 1) / max_addends are
    refused, so that no sum runs over into the next slot. Raises PlanError when not one slot fits.
    """

    modulus_bits: int
    slot_bits: int
    max_addends: int = 1

    def __post_init__(self) -> None:
        fits = 1 <= self.slot_bits <= min(MAX_SLOT_BITS, self.modulus_bits - 1)
        if not fits or not 1 <= self.max_addends <= self.top:
            raise PlanError(
                "packing.slot", f"slots of {self.slot_bits} bits for {self.max_addends} addends, of cells of "
                f"{self.modulus_bits}", field="slot_bits", remedy="narrow the ranges in the schema, or coarsen steps",
            )  # fmt: skip

    @property
    def top(self) -> int:
        """The largest number that a slot holds."""
        return (1 << self.slot_bits) - 1

    @property
    def slots_per_cell(self) -> int:
        return (self.modulus_bits - 1) // self.slot_bits

    def num_cells(self, num_values: int) -> int:
        """Cells that *num_values* take."""
        return -(-num_values // self.slots_per_cell)

    def pack(self, values: Words) -> list[int]:
        """uint64 *values* [k], or [k, 2] with the low word first, as cells.

        Raises ProtocolError for numbers that are too large for :attr:`max_addends` of them.
        """
        words = np.ascontiguousarray(values, np.uint64).reshape(len(values), 2 if np.ndim(values) == 2 else 1)
        self._check(words)
        cells, slots = self.num_cells(len(words)), self.slots_per_cell
        padded = np.zeros((cells * slots, words.shape[1]), np.uint64)
        padded[: len(words)] = words
        columns = padded.reshape(cells, slots, words.shape[1])
        packed = np.zeros((self._words_per_cell, cells), np.uint64)
        for slot in range(slots):
            for limb, start in enumerate(range(0, self.slot_bits, WORD_BITS)):
                if limb < columns.shape[2]:
                    _put(packed, slot * self.slot_bits + start, columns[:, slot, limb])
        rows = np.ascontiguousarray(packed.T).astype("<u8", copy=False)
        return [int.from_bytes(row.tobytes(), "little") for row in rows]

    def unpack(self, cells: Sequence[int], num_values: int) -> Words:
        """The first *num_values* slots of *cells*: uint64 [num_values], or [num_values, 2] for slots above 64 bits.

        Raises ProtocolError when there are not as many cells as these take, or a cell is not below
        2^(slots · slot_bits): then masks did not cancel, or a slot overflowed.
        """
        if len(cells) != self.num_cells(num_values):
            raise _wrong("are not as many as the values take")
        if any(cell < 0 or cell >> (self.slots_per_cell * self.slot_bits) for cell in cells):
            raise _wrong("do not hold slots: masks did not cancel, or sums overflowed")
        size = self._words_per_cell * WORD_BITS // 8
        joined = b"".join(int(cell).to_bytes(size, "little") for cell in cells)
        packed = np.ascontiguousarray(np.frombuffer(joined, "<u8").reshape(len(cells), self._words_per_cell).T).astype(
            np.uint64
        )
        limbs = range(0, self.slot_bits, WORD_BITS)
        values = np.empty((len(cells), self.slots_per_cell, len(limbs)), np.uint64)
        for slot in range(self.slots_per_cell):
            for limb, start in enumerate(limbs):
                bits = min(WORD_BITS, self.slot_bits - start)
                values[:, slot, limb] = _take(packed, slot * self.slot_bits + start, bits)
        flat = values.reshape(-1, len(limbs))[:num_values]
        return flat[:, 0].copy() if len(limbs) == 1 else flat

    @property
    def _words_per_cell(self) -> int:
        return -(-self.slots_per_cell * self.slot_bits // WORD_BITS)

    def _check(self, words: Words) -> None:
        limit = self.top // self.max_addends
        low, high = np.uint64(limit % 2**WORD_BITS), np.uint64(limit >> WORD_BITS)
        if words.shape[1] == 1:
            above = (words[:, 0] > low) & (high == 0)
        else:
            above = (words[:, 1] > high) | ((words[:, 1] == high) & (words[:, 0] > low))
        if above.any():
            raise ProtocolError(
                "packing.value", "a number does not fit into its slot", field="values",
                remedy="clip values to their declared bounds before they are packed",
            )  # fmt: skip


def _put(packed: Words, position: int, limb: Words) -> None:
    word, shift = divmod(position, WORD_BITS)
    packed[word] |= limb << np.uint64(shift)
    if shift and word + 1 < len(packed):
        packed[word + 1] |= limb >> np.uint64(WORD_BITS - shift)


def _take(packed: Words, position: int, bits: int) -> Words:
    word, shift = divmod(position, WORD_BITS)
    taken: Words = packed[word] >> np.uint64(shift)
    if shift + bits > WORD_BITS:
        taken = taken | packed[word + 1] << np.uint64(WORD_BITS - shift)
    taken &= np.uint64((1 << bits) - 1)
    return taken


def masks(stream_bytes: Callable[[int], bytes], num_cells: int, n: int) -> list[int]:
    """*num_cells* integers uniform modulo *n*, from the next bytes of a pseudo-random stream
    (such as ``prg.Stream(key).bytes``); equal at every party that has its key."""
    size, modulus = -(-(int(n).bit_length() + MASK_EXTRA_BITS) // 8), mpz(n)
    drawn = stream_bytes(size * num_cells)
    return [int(mpz.from_bytes(drawn[i : i + size], "little") % modulus) for i in range(0, len(drawn), size)]


def add_mod(cells: Sequence[int], others: Sequence[int], n: int, sign: int = 1) -> list[int]:
    """cells + sign · others modulo *n*, one by one; raises ProtocolError when their numbers differ."""
    if len(cells) != len(others):
        raise _wrong("and masks are of different numbers")
    return [int((cell + sign * other) % n) for cell, other in zip(cells, others, strict=True)]


def _wrong(what: str) -> ProtocolError:
    return ProtocolError(
        "packing.cells", f"packed cells {what}", field="cells",
        remedy="use the same Atoll version and plan at every site, and run the round again",
    )  # fmt: skip
