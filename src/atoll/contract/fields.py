"""The fields of a reply: what each named array must be, declared before anything is computed.

From a field's shape, dtype, bound and step its size is checked before memory is allocated, the masking ring is made
wide enough, and the sensitivity of a sum is known. A field travels with the task, so that both ends check the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import ProtocolError
from atoll.contract.wire import DTYPES, Array, ArraySpec, Json

COMPARE = "compare the versions at both ends; where they agree, the site does not keep the protocol"
"""Remedy for a reply that is not what was asked for."""


@dataclass(frozen=True, slots=True)
class Field:
    """What one named array of a reply must be.

    shape: exact shape; a leading None means "any length", up to *limit_bytes*.
    bound: every |element| a *single site* sends is at most this; None when not bounded.
    step: resolution; a protection may round elements to multiples of it.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()
    bound: float | None = None
    step: float | None = None
    limit_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Most bytes that this field may take."""
        sizes = [size for size in self.shape if size is not None]
        return self.limit_bytes if None in self.shape else math.prod(sizes) * int(self.dtype[2:])

    def check(self, name: str, spec: ArraySpec) -> None:
        """Raise ProtocolError unless *spec* is what this field declares. Reads no data."""
        if spec.dtype != self.dtype:
            raise _other("reply.dtype", f"dtype {spec.dtype} instead of {self.dtype}", name)
        open_ended = bool(self.shape) and self.shape[0] is None
        same = len(spec.shape) == len(self.shape) and spec.shape[open_ended:] == self.shape[open_ended:]
        if not same or (open_ended and spec.size_bytes > self.limit_bytes):
            raise _other("reply.shape", f"shape {spec.shape} instead of {self.shape}", name)

    @staticmethod
    def check_finite(name: str, values: Array, *, undefined: bool = False) -> None:
        """Raise ProtocolError for infinity, or for NaN unless *undefined* values (a metric of no rows) may be told."""
        if values.dtype.kind in "iub":
            return
        finite = np.isfinite(values)
        if not (finite | (np.isnan(values) if undefined else False)).all():
            raise ProtocolError(
                "reply.not-finite",
                "a reply holds NaN or infinity",
                field=name,
                remedy="look for missing cells, a learning rate that is too high, or an overflow",
            )

    def check_values(self, name: str, values: Array, *, undefined: bool = False) -> None:
        """As :meth:`check_finite`, and for elements beyond the bound (to the accuracy of float32)."""
        self.check_finite(name, values, undefined=undefined)
        if self.bound is not None and values.size and values.dtype.kind in "fiu":
            limit = self.bound * (1 + 1e-6)
            if float(values.max()) > limit or float(values.min()) < -limit:
                raise ProtocolError(
                    "reply.bound", "a reply holds a value beyond its declared bound", field=name,
                    remedy="the site does not keep the protocol: do not go on with it",
                )  # fmt: skip

    def to_json(self) -> list[Json]:
        """As sent in a task, so that the site can check before anything leaves."""
        return [self.dtype, list(self.shape), self.bound, self.step, self.limit_bytes]

    @staticmethod
    def from_json(value: Json) -> Field:
        """Inverse of :meth:`to_json`; raises ProtocolError on anything else."""
        match value:
            case [str(dtype), list(shape), bound, step, int(limit_bytes)] if dtype in DTYPES:
                sizes = shape[1:] if shape and shape[0] is None else shape
                numbers = all(n is None or (isinstance(n, int | float) and n >= 0) for n in (bound, step))
                if numbers and all(type(n) is int and n >= 0 for n in sizes):
                    return Field(dtype, tuple(shape), bound, step, limit_bytes)
        raise ProtocolError("task.field", "a task declares a malformed reply field")


def _other(code: str, what: str, name: str) -> ProtocolError:
    return ProtocolError(code, f"a reply has {what}", field=name, remedy=COMPARE)


def _shape(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def real(
    shape: int | tuple[int, ...] = (), *, bound: float | None = None, step: float | None = None, dtype: str = "<f8"
) -> Field:
    """A real-valued field: |element| ≤ *bound* at each site, to a resolution of *step*."""
    return Field(dtype, _shape(shape), bound, step)


def count(shape: int | tuple[int, ...] = (), *, bound: int | None = None) -> Field:
    """A field of counts (int64)."""
    return Field("<i8", _shape(shape), bound, 1)


def withheld(shape: int | tuple[int, ...] = ()) -> Field:
    """The field in which a site's gate marks cells that it withheld (see ``contract.disclosure.Cells``)."""
    return Field("|u1", _shape(shape), 1, 1)


def opaque(limit_bytes: int) -> Field:
    """A byte string (uint8, any length up to *limit_bytes*), such as a sealed envelope."""
    return Field("|u1", (None,), 255, 1, limit_bytes=limit_bytes)


def as_arrays(reply: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, NDArray[Any]]:
    """A handler's reply as arrays of exactly the declared fields, dtypes and shapes.

    Raises ProtocolError for missing or additional fields, wrong shapes, values that are not
    numbers or do not fit the dtype, and reals given where counts are declared.
    """
    if set(reply) != set(fields):
        odd = sorted(set(reply) ^ set(fields))
        raise ProtocolError("reply.fields", "a handler's reply has other fields than declared", field=", ".join(odd))
    arrays: dict[str, NDArray[Any]] = {}
    for name, declared in fields.items():
        try:
            value = np.asarray(reply[name])
        except ValueError:  # ragged lists
            raise ProtocolError("reply.shape", "a handler gave no array", field=name) from None
        if value.dtype.kind not in "fiub":
            raise ProtocolError("reply.dtype", "a handler gave values that are not numbers", field=name)
        if value.dtype.kind == "f" and np.dtype(declared.dtype).kind in "iu":
            raise ProtocolError("reply.dtype", "a handler gave reals where counts are declared", field=name)
        array = np.ascontiguousarray(value, dtype=declared.dtype).reshape(value.shape)
        if array.dtype.kind in "iub" and array.dtype != value.dtype and not np.array_equal(array, value):
            raise ProtocolError("reply.dtype", f"a handler gave values beyond {declared.dtype}", field=name)
        declared.check(name, ArraySpec(name, declared.dtype, array.shape))
        arrays[name] = array
    return arrays


def for_members(fields: Mapping[str, Field], members: int) -> dict[str, Field]:
    """*fields* where up to *members* sites stand behind one name: the bounds hold for the sum of so many."""
    if members == 1:
        return dict(fields)
    return {n: f if f.bound is None else replace(f, bound=f.bound * members) for n, f in fields.items()}


def clip(arrays: dict[str, Array], fields: Mapping[str, Field]) -> tuple[dict[str, Array], int]:
    """Every element within its declared bound, and how many were not."""
    clipped = 0
    bounded: dict[str, Array] = {}
    for name, array in arrays.items():
        bound = fields[name].bound
        if bound is not None and array.dtype.kind in "fiu" and array.size:
            low = 0 if array.dtype.kind == "u" else -bound  # abs(-2**63) is negative
            if not (array.min() >= low and array.max() <= bound):  # or one is undefined
                beyond = int(((array > bound) | (array < low)).sum())
                if beyond:
                    array = np.clip(array, low, bound).astype(array.dtype)
                clipped += beyond
        bounded[name] = array
    return bounded, clipped
