"""Reals in 16 bits: IEEE 754 binary16, and bfloat16, which has float32's range and 8 bits of precision.

Sources: IEEE 754-2019, §3.6; Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training, §2. Rounding is to
the nearest, ties to even, so that the error of a value within range is at most 2⁻¹¹ of it (bfloat16: 2⁻⁹).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.contract.wire import Array

Precision = Literal["float32", "float16", "bfloat16"]
LARGEST = 65504.0
"""The largest binary16; what is larger is sent as it."""


def halved(values: Array, precision: Precision) -> NDArray[Any]:
    """*values* [k], finite, as they travel: float32, or the bits of 16, [k] uint16."""
    if precision == "float32":
        return np.asarray(values, np.float32)
    if precision == "float16":
        return np.clip(values, -LARGEST, LARGEST).astype(np.float16).view(np.uint16)
    bits = np.asarray(values, np.float32).view(np.uint32)
    even = bits >> np.uint32(16) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)


def whole(told: Array, precision: Precision) -> NDArray[np.float32]:
    """Inverse of :func:`halved`, but for what rounding took."""
    if precision == "float32":
        return np.asarray(told, np.float32)
    if precision == "float16":
        return told.view(np.float16).astype(np.float32)
    return (told.astype(np.uint32) << np.uint32(16)).view(np.float32)
