"""Stochastic quantisation (QSGD): each value is rounded at random to one of its two neighbours on a grid, so that it is
right on average.

Source: Alistarh et al. 2017, QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding (NIPS), §3.1; as
in its §4 and experiments, values stand in buckets, and the grid of each is scaled to its largest |value|.

Such a grid is one sender's own, so that numbers on two of them do not add up: it is for messages that stand alone. What
is summed under a protection is rounded to a grid that all sites share (``update.py``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BUCKET = 512
"""Values that share a scale."""


def levels(bits: int) -> int:
    """s: steps from zero to the largest value; with as many below zero, and zero, these are 2^bits − 1 values."""
    return int(2 ** (bits - 1) - 1)


def quantised(
    values: NDArray[np.floating], bits: int, random: np.random.Generator | None
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """(places of *values* [k] on their grids, 0 … 2·s, [k]; each bucket's largest |value|, [buckets]). random: None:
    to the nearest."""
    scales = np.zeros(-(-len(values) // BUCKET), np.float32)
    padded = np.zeros(len(scales) * BUCKET)
    padded[: len(values)] = values
    buckets = padded.reshape(len(scales), BUCKET)
    most = np.abs(buckets).max(axis=1, initial=0)
    scales[:] = most
    scales = np.where(scales < most, np.nextafter(scales, np.float32(np.inf)), scales).astype(np.float32)
    steps = levels(bits)
    shares = np.divide(buckets, scales[:, None], out=np.zeros_like(buckets), where=scales[:, None] > 0) * steps
    flat = shares.reshape(-1)[: len(values)]
    rounded = np.rint(flat) if random is None else np.floor(flat + random.random(len(flat)))
    return (np.clip(rounded, -steps, steps) + steps).astype(np.uint64), scales


def restored(places: NDArray[np.uint64], scales: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """What *places* [k] stand for. The same bits on every machine: each is a product and a quotient."""
    each = np.repeat(scales, BUCKET)[: len(places)]
    signed = places.astype(np.int64) - levels(bits)
    return (signed.astype(np.float32) * each) / np.float32(levels(bits))
