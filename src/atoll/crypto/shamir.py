"""Shamir's secret sharing of byte strings, over GF(2⁸) byte by byte.

Any *threshold* shares give the secret; fewer tell nothing. Holders are numbered 1 … 255.
Source: Shamir 1979, How to share a secret (CACM 22:11); the field is AES's, x⁸+x⁴+x³+x+1
(FIPS 197 §4). Tables are looked up by secret bytes: an attacker who measures caches on the
site's own machine is not in the threat model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import ProtocolError

Bytes = NDArray[np.uint8]
MAX_HOLDERS = 255


def _tables() -> tuple[Bytes, NDArray[np.int64]]:
    power = np.zeros(510, np.uint8)
    log = np.zeros(256, np.int64)
    x = 1
    for i in range(255):
        power[i] = power[i + 255] = x
        log[x] = i
        x ^= x << 1  # times 3, a generator
        x ^= 0x11B if x > 255 else 0
    return power, log


_POWER, _LOG = _tables()


def _products() -> Bytes:
    """Of any two bytes, [256, 256]."""
    found: Bytes = _POWER[_LOG[:, None] + _LOG]
    found[0, :] = found[:, 0] = 0
    return found


_PRODUCT = _products()


def _times(a: Bytes, b: Bytes) -> Bytes:
    product: Bytes = _PRODUCT[a, b]
    return product


def split(secret: bytes, threshold: int, holders: Sequence[int]) -> dict[int, bytes]:
    """A share of *secret* for each of *holders* (numbers 1 … 255, each once); any *threshold* give it back.

    Raises ProtocolError for a threshold that is not within 1 … number of holders.
    """
    if not 1 <= threshold <= len(holders) or len(set(holders)) != len(holders) or len(holders) > MAX_HOLDERS:
        raise ProtocolError(
            "shamir.threshold", f"a threshold of {threshold} for {len(holders)} holders", field="threshold",
            remedy="choose a threshold between 1 and the number of sites",
        )  # fmt: skip
    if not all(1 <= x <= MAX_HOLDERS for x in holders):
        raise ProtocolError("shamir.holder", "a share holder's number is not within 1 … 255", field="holders")
    size = len(secret)
    coefficients = np.frombuffer(os.urandom(size * (threshold - 1)) + secret, np.uint8).reshape(threshold, size)
    xs = np.array(holders, np.uint8)[:, None]
    values = np.zeros((len(holders), size), np.uint8)
    for row in coefficients:  # Horner, the secret last
        values = _times(values, xs) ^ row
    return {x: values[i].tobytes() for i, x in enumerate(holders)}


@lru_cache(maxsize=256)
def weights(holders: tuple[int, ...]) -> Bytes:
    """Lagrange weights at zero, [len(holders)]: the secret is Σ weight · share. Kept, as every round has the same
    holders."""
    xs = np.array(holders, np.uint8)
    top = np.broadcast_to(xs[None, :], (len(xs), len(xs))).copy()
    bottom = xs[None, :] ^ xs[:, None]
    np.fill_diagonal(top, 1)
    np.fill_diagonal(bottom, 1)
    logs = (_LOG[top] - _LOG[bottom]).sum(axis=1) % 255
    found: Bytes = _POWER[logs]
    found.flags.writeable = False
    return found


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of which *shares* by holder are given, at least the threshold of them.

    Fewer give another string: check the result against what was committed to. Raises ProtocolError
    for shares of different lengths, or none.
    """
    if not shares or len({len(share) for share in shares.values()}) != 1:
        raise ProtocolError("shamir.shares", "shares are missing or of different lengths", field="shares")
    rows = np.stack([np.frombuffer(share, np.uint8) for share in shares.values()])
    return bytes(np.bitwise_xor.reduce(_times(rows, weights(tuple(shares))[:, None]), axis=0).tobytes())
