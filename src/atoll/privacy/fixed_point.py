"""Reals and counts as integers modulo a power of two, wide enough for the cohort's sum.

x becomes round(x / step). A field of bound B needs numbers up to ±n·(B/step + 1) for n sites, and a little more
where B is no float32 and they are; it is put into the narrowest ring of 32, 64 or 128 bits that holds them, and refused
where none does; many coarse reals, as compressed updates are, into one of 8 or 16 bits. So nothing overflows, and the
sum's error is at most n·step/2 on each element (counts: none), beside float64's own relative error of 2⁻⁵³ for each
site and the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from atoll.contract.errors import PlanError
from atoll.contract.rounds import Field
from atoll.contract.wire import Array
from atoll.crypto.prg import Stream, pieces_of

WIDTHS = (8, 16, 32, 64, 128)
FEWEST = 256
"""Elements below which a narrow ring of their own saves nothing."""
PIECE = 1 << 15
"""Elements converted at a time, so that intermediates stay in cache."""


def width_of(name: str, field: Field, num_sites: int) -> int:
    """Bits of the ring for a field: 32, 64 or, for reals only, 8, 16 and 128. Raises PlanError when it is unbounded,
    has no step, or does not fit."""
    if None in field.shape or field.bound is None or not field.step or (_whole(field) and field.step != 1):
        raise PlanError(
            "ring.unbounded", "a masked sum needs a declared shape, bound and step", field=name,
            remedy="declare them in the program's round, or choose protection plain",
        )  # fmt: skip
    whole = _whole(field)
    slack = 0.0 if whole else float(np.finfo(field.dtype).eps)  # of a bound that was rounded to the dtype
    bits = math.log2(2 * num_sites * (field.bound * (1 + slack) / field.step + 1) + 1)
    many = not whole and math.prod(int(size or 0) for size in field.shape) >= FEWEST
    for width in WIDTHS[2:-1] if whole else WIDTHS if many else WIDTHS[2:]:  # counts add up in int64
        if bits <= width - 1e-9:
            return width
    raise PlanError(
        "ring.too-wide", f"the sum of {num_sites} sites needs a ring of {bits:.1f} bits, and {width} is the widest",
        field=name, remedy="narrow the columns' ranges or max_rows in the schema",
    )  # fmt: skip


def _whole(field: Field) -> bool:
    return np.dtype(field.dtype).kind in "iu"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each field of a reply stands in the vectors of its ring; the same at every party."""

    fields: Mapping[str, Field]
    widths: Mapping[str, int]

    @staticmethod
    def of(fields: Mapping[str, Field], num_sites: int) -> Layout:
        """For replies of *fields* by *num_sites* sites. Raises as :func:`width_of`."""
        return Layout(fields, {name: width_of(name, field, num_sites) for name, field in fields.items()})

    def sizes(self) -> dict[int, int]:
        """Number of elements in each ring that is used, narrowest first."""
        found = dict.fromkeys(WIDTHS, 0)
        for name, field in self.fields.items():
            found[self.widths[name]] += math.prod(int(size or 0) for size in field.shape)
        return {width: size for width, size in found.items() if size}

    def declared(self) -> dict[str, Field]:
        """The vectors as they travel: "ring8" … "ring64" (unsigned numbers), "ring128" (low and high uint64)."""
        return {f"ring{w}": Field(*_carrier(w, size)) for w, size in self.sizes().items()}

    def encode(
        self, arrays: Mapping[str, Array], plus: Sequence[Stream] = (), minus: Sequence[Stream] = ()
    ) -> dict[str, Array]:
        """Arrays within their bounds as ring vectors (see :meth:`declared`), under masks as :func:`add_masks` adds."""
        vectors = {w: np.empty(shape, dtype) for w, (dtype, shape) in self._carriers().items()}
        flat = {name: np.asarray(array).reshape(-1) for name, array in arrays.items()}
        for width, vector in vectors.items():
            places = [(name, start, stop) for name, w, start, stop in self._places() if w == width]
            for begin, piece, masks in pieces_of(vector, [*plus, *minus]):
                for name, start, stop in places:
                    first, last = max(start, begin), min(stop, begin + len(piece))
                    if first < last:
                        step = self.fields[name].step or 1
                        _encode(flat[name][first - start : last - start], step, vector[first:last])
                _add_all(piece, masks, len(plus))  # while the piece is in the cache
        return {f"ring{width}": vector for width, vector in vectors.items()}

    def decode(self, vectors: Mapping[str, Array]) -> dict[str, Array]:
        """The sums: counts as int64, reals as float64."""
        sums = {}
        for name, width, start, stop in self._places():
            field = self.fields[name]
            if start == stop:
                sums[name] = np.zeros([size or 0 for size in field.shape], np.int64 if _whole(field) else np.float64)
                continue
            vector = vectors[f"ring{width}"][start:stop]
            values = _signed(vector).astype(np.int64) if _whole(field) else _decode(vector, field.step or 1)
            sums[name] = values.reshape([size or 0 for size in field.shape])
        return sums

    def _carriers(self) -> dict[int, tuple[str, tuple[int, ...]]]:
        return {width: _carrier(width, size) for width, size in self.sizes().items()}

    def _places(self) -> list[tuple[str, int, int, int]]:
        ends, places = dict.fromkeys(WIDTHS, 0), []
        for name, field in self.fields.items():
            width = self.widths[name]
            start = ends[width]
            ends[width] = start + math.prod(int(size or 0) for size in field.shape)
            places.append((name, width, start, ends[width]))
        return places


def _carrier(width: int, size: int) -> tuple[str, tuple[int, ...]]:
    return ("<u8", (size, 2)) if width == 128 else (f"{'|' if width == 8 else '<'}u{width // 8}", (size,))


def _encode(values: Array, step: float, out: Array) -> None:
    """round(values / step) into ring elements; the ring is wide enough for them as signed integers."""
    if values.dtype.kind in "iub" and step == 1:
        np.copyto(out, values, casting="unsafe")
        return
    scratch = np.empty(min(PIECE, values.size))
    for start in range(0, values.size, PIECE):
        piece, there = values[start : start + PIECE], out[start : start + PIECE]
        scaled = np.divide(piece, step, out=scratch[: piece.size], dtype=np.float64)
        np.rint(scaled, out=scaled)
        if there.ndim == 2:
            _encode_wide(scaled, there)
        else:
            np.copyto(_signed(there), scaled, casting="unsafe")


def _encode_wide(scaled: Array, out: Array) -> None:
    magnitude = np.abs(scaled)  # a sign at the end: −5 + 2⁶⁴ is no float
    high = np.floor(magnitude / 2.0**64)
    out[:, 0], out[:, 1] = (magnitude - high * 2.0**64).astype(np.uint64), high.astype(np.uint64)
    out[scaled < 0] = _negated(out[scaled < 0])


def _decode(vector: Array, step: float) -> Array:
    if vector.ndim == 1:
        return np.multiply(_signed(vector), step, dtype=np.float64)
    negative = vector[:, 1] >> np.uint64(63) == 1
    magnitude = np.where(negative[:, None], _negated(vector), vector).astype(np.float64)
    return np.where(negative, -1.0, 1.0) * (magnitude[:, 1] * 2.0**64 + magnitude[:, 0]) * step


def _signed(vector: Array) -> Array:
    return vector.view(f"i{vector.itemsize}")


def _negated(vector: Array) -> Array:
    low = ~vector[:, 0] + np.uint64(1)
    return np.column_stack([low, ~vector[:, 1] + (low == 0)])


def add_to(total: Array, more: Array, *, minus: bool = False) -> None:
    """Add the ring vector *more* to *total* in place (or subtract it)."""
    if total.ndim == 1:
        (np.subtract if minus else np.add)(total, more, out=total)
        return
    low, high = total[:, 0], total[:, 1]
    before = low.copy()
    if minus:
        low -= more[:, 0]
        high -= more[:, 1] + (low > before)
    else:
        low += more[:, 0]
        high += more[:, 1] + (low < before)


def add_masks(vectors: Mapping[str, Array], plus: Sequence[Stream], minus: Sequence[Stream]) -> None:
    """Add the next bytes of the *plus* streams to ring *vectors*, in place, and subtract those of *minus*."""
    for vector in vectors.values():
        for _, piece, masks in pieces_of(vector, [*plus, *minus]):
            _add_all(piece, masks, len(plus))


def _add_all(piece: Array, masks: Iterable[Array], num_plus: int) -> None:
    for i, mask in enumerate(masks):
        add_to(piece, mask, minus=i >= num_plus)
