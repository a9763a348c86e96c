"""Fixed-point numbers in parts that CKKS adds up exactly.

A CKKS sum errs by a share of the bound (``crypto.ckks.error_bound``). So x becomes round(x / step), as in
``fixed_point``; and a whole number too large for its sum to come out whole after rounding is split into digits
that are not. Scales are powers of two, so that nothing is rounded in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.rounds import Field
from atoll.contract.wire import Array
from atoll.crypto.ckks import MAX_SITES, error_bound
from atoll.privacy.fixed_point import Layout
from atoll.privacy.he.slots import reach

Values = NDArray[np.float64]
WHOLE = 0.25
"""An error below this does not change what a whole number is rounded to."""


class Limbs:
    """A reply as one vector within ±1; the same at every party. Sums are exact for counts, and for reals err by at
    most n·step/2 for n sites, beside float64's own error: they are those of ``secagg``."""

    def __init__(self, fields: Mapping[str, Field], num_sites: int) -> None:
        """Raises PlanError for fields without bound or resolution, counts that float64 does not hold, and more sites
        than are added up."""
        Layout.of(fields, num_sites)
        if num_sites > MAX_SITES:
            raise PlanError(
                "ckks.sites", f"a sum over {num_sites} sites", field="cohort",
                remedy=f"at most {MAX_SITES}; choose secagg for larger cohorts",
            )  # fmt: skip
        self._fields, self._num_sites = fields, num_sites
        self._digit = 2.0 ** math.floor(math.log2(WHOLE / error_bound(1.0, num_sites)))
        self._scales = {name: self._scales_of(name, field) for name, field in fields.items()}
        self.num_values = sum(len(self._scales[name]) * _size(field) for name, field in fields.items())

    def split(self, arrays: Mapping[str, Array]) -> Values:
        """Arrays within their bounds as [num_values] numbers within ±1."""
        parts = []
        for name, field in self._fields.items():
            rest = np.rint(arrays[name].astype(np.float64).reshape(-1) / (field.step or 1))
            *larger, last = self._scales[name]
            for scale in larger:
                digits = np.rint(rest * (self._digit / scale))
                rest = rest - digits * (scale / self._digit)
                parts.append(digits / self._digit)
            parts.append(rest / last)
        return np.concatenate(parts) if parts else np.zeros(0)

    def sums(self, values: Values, num_sites: int) -> dict[str, Array]:
        """The sums of *num_sites* replies out of the sums of their numbers: counts as int64, reals as float64.

        Raises ProtocolError for numbers that no such sum can have.
        """
        if values.shape != (self.num_values,) or not bool((np.abs(values) <= 1.01 * num_sites).all()):
            raise ProtocolError(
                "he.not-a-sum", "what was decrypted is not a sum of replies", field="values",
                remedy="a site or the key holder does not keep the protocol: the ledgers say who sent what",
            )  # fmt: skip
        sums, start = {}, 0
        for name, field in self._fields.items():
            *larger, last = self._scales[name]
            size, total = _size(field), np.zeros(_size(field))
            for unit, digit in [*((scale / self._digit, self._digit) for scale in larger), (1.0, last)]:
                total += np.rint(values[start : start + size] * digit) * unit
                start += size
            told = total.astype(np.int64) if _whole(field) else total * float(field.step or 1)
            sums[name] = told.reshape([n or 0 for n in field.shape])
        return sums

    def _scales_of(self, name: str, field: Field) -> tuple[float, ...]:
        """What ±1 stands for in each part of a field, the largest first."""
        largest = reach(field) / (field.step or 1) + 1
        if _whole(field) and largest * self._num_sites >= 2.0**53:
            raise PlanError(
                "ckks.counts", "counts this large are not exact under ckks", field=name,
                remedy="narrow the columns' ranges or max_rows in the schema, or choose secagg",
            )  # fmt: skip
        scales = [2.0 ** math.frexp(largest)[1]]
        while error_bound(scales[-1], self._num_sites) > WHOLE:
            scales.append(scales[-1] / (2 * self._digit))
        return tuple(scales)


def _size(field: Field) -> int:
    return math.prod(int(n or 0) for n in field.shape)


def _whole(field: Field) -> bool:
    return np.dtype(field.dtype).kind in "iu"
